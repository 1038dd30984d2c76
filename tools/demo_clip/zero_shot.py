"""Does the demo's CLIP know its classes? Zero-shot accuracy on fresh scenes of one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.clip.text import class_embeddings
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.demo.scenes import CLASS_NAMES, draw_scene


def zero_shot_accuracy(
    embed_images: Callable[[NDArray[np.uint8]], Tensor],
    embed_texts: Callable[[Sequence[str]], Tensor],
    seed: int,
    count: int,
    size: tuple[int, int] = (128, 96),
) -> float:
    """Share of single-object scenes whose class has the nearest prompt, with the templates of class set ``demo``.

    Args:
        embed_images: uint8 (B, H, W, 3) RGB to float32 (B, P) unit rows.
        embed_texts: N texts to float32 (N, P) unit rows.
        seed: of the scenes; one that training didn't use.
        count: how many scenes.
        size: their width and height.
    """
    classes = load_class_set("demo")
    prompts = class_embeddings(classes, classes.templates, embed_texts).foreground
    right = 0
    for start in range(0, count, 50):
        scenes = [
            draw_scene((seed, index), *size, classes=1) for index in range(start, min(count, start + 50))
        ]
        truth = torch.tensor([CLASS_NAMES.index(scene.labels[0]) for scene in scenes])
        found = (embed_images(np.stack([scene.image for scene in scenes])) @ prompts.T).argmax(dim=1)
        right += int((found == truth).sum())
    return right / count
