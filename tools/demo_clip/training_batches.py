"""Batches of views and captions for the demo's CLIP, made by worker processes in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tools.demo_clip.captions import scene_facts, write_caption
from tools.demo_clip.scene_pool import ScenePool

# share of the steps -> width and height of the images: cheap ones first, since most is learnt on them
SIZES: tuple[tuple[float, tuple[int, int]], ...] = ((0.88, (64, 48)), (1.0, (96, 72)))


class TrainingBatch(NamedTuple):
    """``images`` uint8 (B, H, W, 3) RGB, ``texts`` B captions, ``truth`` bool (B, B): image, text,
    ``single`` bool (B,): texts that speak of one thing or place alone."""

    images: NDArray[np.uint8]
    texts: list[str]
    truth: NDArray[np.bool_]
    single: NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingBatches(Dataset[TrainingBatch]):
    """Batch ``step`` of ``steps``; a function of ``seed`` and ``step`` alone."""

    pool: ScenePool
    seed: int
    steps: int
    batch: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> TrainingBatch:
        rng = np.random.default_rng((self.seed, step))
        size = image_size(step, self.steps)
        chosen = rng.choice(len(self.pool), self.batch, replace=False)
        views = [self.pool.view(int(index), size, rng) for index in chosen]
        captions = [write_caption(view.objects, view.backgrounds, rng) for view in views]
        known = [scene_facts(view.objects, view.backgrounds) for view in views]
        # a text written for one image may be true of another
        truth = np.array([[caption.facts <= facts for caption in captions] for facts in known])
        return TrainingBatch(
            np.stack([view.image for view in views]),
            [caption.text for caption in captions],
            truth,
            np.array([caption.single for caption in captions]),
        )


def image_size(step: int, steps: int) -> tuple[int, int]:
    """Width and height of the training images at a step."""
    return next(size for share, size in SIZES if step < share * steps or share == 1.0)
