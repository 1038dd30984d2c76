"""Zero-shot accuracy, with encoders that know everything or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.demo_clip.zero_shot import zero_shot_accuracy
from wsss_pipeline.demo.scenes import CLASS_NAMES, draw_scene

SEED, COUNT, SIZE = 11, 60, (32, 24)
SYNONYMS = {"automobile": "car", "mug": "cup"}


def one_hot(name: str) -> Tensor:
    return torch.eye(len(CLASS_NAMES) + 1)[CLASS_NAMES.index(name) if name in CLASS_NAMES else -1]


def embed_texts(texts: Sequence[str]) -> Tensor:
    words = [text.removeprefix("a photo of a ").removesuffix(".") for text in texts]
    return torch.stack([one_hot(SYNONYMS.get(word, word)) for word in words])


def test_one_who_knows_all_scenes_is_always_right() -> None:
    known = {
        scene.image.tobytes(): scene.labels[0]
        for scene in (draw_scene((SEED, index), *SIZE, classes=1) for index in range(COUNT))
    }

    def embed_images(images: NDArray[np.uint8]) -> Tensor:
        return torch.stack([one_hot(known[image.tobytes()]) for image in images])

    assert zero_shot_accuracy(embed_images, embed_texts, SEED, COUNT, SIZE) == 1.0


def test_one_who_always_says_ball_is_right_about_balls() -> None:
    accuracy = zero_shot_accuracy(
        lambda images: one_hot("ball").expand(len(images), -1), embed_texts, SEED, COUNT, SIZE
    )
    balls = sum(draw_scene((SEED, index), *SIZE, classes=1).labels == ("ball",) for index in range(COUNT))
    assert accuracy == balls / COUNT
    assert 0 < accuracy < 0.4
