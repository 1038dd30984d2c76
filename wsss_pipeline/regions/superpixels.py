"""Superpixels: small regions of one colour that cover an image without overlap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import SlicConfig
from wsss_pipeline.errors import MissingDependencyError
from wsss_pipeline.regions.regions import WHOLE, Regions

VERSION = 1  # to be raised when the same settings give other superpixels


class Slic:
    """A ``RegionSource``: superpixels of the pixels themselves, all of level ``WHOLE``; nothing is stored.

    Args:
        config: settings.

    Raises:
        MissingDependencyError: scikit-image isn't installed.
    """

    def __init__(self, config: SlicConfig) -> None:
        try:
            from skimage.segmentation import slic
        except ImportError as error:
            raise MissingDependencyError(
                'superpixels (slic) need scikit-image; install it with: pip install "wsss-pipeline[regions]"'
            ) from error
        self._slic, self._config = slic, config
        self.description = f"about {config.segments} SLIC superpixels"
        self.identity: dict[str, object] = {"slic": {"version": VERSION, **config.model_dump(mode="json")}}

    def __call__(self, image_id: str, pixels: NDArray[np.uint8]) -> Regions:
        """Superpixels of an image, uint8 (H, W, 3) RGB."""
        config = self._config
        labels = self._slic(
            pixels,
            n_segments=config.segments,
            compactness=config.compactness,
            sigma=config.sigma,
            start_label=0,
            channel_axis=-1,
        )
        regions = regions_of_labels(labels)
        regions.check(image_id)
        return regions


def regions_of_labels(labels: NDArray[np.integer]) -> Regions:
    """The pixels of each value as a region of level ``WHOLE``, in ascending order of the values.

    Args:
        labels: (H, W).
    """
    height, width = labels.shape
    flat = labels.T.reshape(-1)
    start = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    end = np.append(start[1:], flat.size)
    # runs of one value after another, each in the order of the image
    order = np.argsort(flat[start], kind="stable")
    start, end, value = start[order], end[order], flat[start][order]
    first = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    number = len(first)
    before = np.concatenate([[0], end[:-1]])  # where the run before it in its region ended
    before[first] = 0
    counts = np.stack([start - before, end - start], axis=1).reshape(-1)
    last = np.append(first[1:], len(start)) - 1
    rest = flat.size - end[last]
    ends_outside = rest > 0
    counts = np.insert(counts, 2 * (last[ends_outside] + 1), rest[ends_outside])
    return Regions(
        size=(height, width),
        counts=counts.astype(np.int32),
        lengths=(2 * (last - first + 1) + ends_outside).astype(np.int32),
        levels=np.full(number, WHOLE, np.uint8),
        iou=np.ones(number, np.float32),
        stability=np.ones(number, np.float32),
        points=np.full((number, 2), np.nan, np.float32),
    )
