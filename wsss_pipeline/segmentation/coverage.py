"""The surest share of each class's pixels, to learn from these alone.

One threshold for all classes keeps the background and throws small and rare objects away, since a class is surer the
more of the image it fills (class-balanced selection: Zou et al., "Domain Adaptation for Semantic Segmentation via
Class-Balanced Self-Training", ECCV 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.masks import CERTAIN, MaskSource
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class Coverage:
    """Confidences from which on pixels count.

    Attributes:
        least: uint8 (1+C,), for each mask value the smallest confidence, in half percents; at least 1, so that a
            pixel without any confidence never counts.
        pixels: int64 (1+C,), all that were looked at.
        kept: int64 (1+C,), those of them that count: the wanted share, and those as sure as the last of these.
    """

    least: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    kept: NDArray[np.int64]

    def share(self, values: slice) -> float:
        """Of these mask values' pixels, how many count; 1 where there is none."""
        return (
            float(self.kept[values].sum() / self.pixels[values].sum()) if self.pixels[values].any() else 1.0
        )


def surest(masks: MaskSource, ids: Sequence[str], keep: float, *, is_shown: bool = True) -> Coverage:
    """The surest pixels of each class, over all masks. One that can't be read is left out; training warns of it.

    Args:
        masks: masks with their confidence.
        ids: ids of these.
        keep: share of each class's pixels, in (0, 1].
        is_shown: choice to show progress.
    """
    labels = 1 + len(masks.class_names)
    counts = np.zeros((labels, CERTAIN + 1), np.int64)
    with Progress(len(ids), "masks", is_shown=is_shown) as progress:
        for image_id in progress.over(ids):
            with suppress(MaskError, ImageError):
                record = masks[image_id]
                known = record.mask < labels
                places = record.mask[known].astype(np.int64) * (CERTAIN + 1) + record.confidence[known]
                counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
    pixels = counts.sum(axis=1)
    # as sure as a step, or surer
    surer = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    # ceil: 80 % of 3 pixels are 3; what floating point adds to a product is no pixel
    enough = surer >= np.ceil(keep * pixels - 1e-6)[:, None]
    least = np.maximum(1, CERTAIN - np.argmax(enough[:, ::-1], axis=1)).astype(np.uint8)
    return Coverage(least, pixels, surer[np.arange(labels), least])
