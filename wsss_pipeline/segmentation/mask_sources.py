"""Where training masks come from: the pseudo-mask cache, or ground truth for an upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.errors import ImageError

IGNORE = 255
CHECKED = 32  # masks of a folder, before training starts

LabelledMask = tuple[NDArray[np.uint8], NDArray[np.float32]]


class MaskSource(Protocol):
    """Masks by image id. ``class_names``: of mask values 1..C."""

    class_names: tuple[str, ...]
    description: str

    def has(self, image_id: str) -> bool:
        """Whether there is a mask."""

    def read(self, image_id: str) -> LabelledMask:
        """Mask uint8 (H, W), 0..C and 255, and confidence float32 (H, W) in [0, 1].

        Raises:
            WsssError: the mask is damaged or doesn't fit the classes.
        """


class CachedMasks:
    """The masks of a mask set; may be pickled and forked, each process opens files of its own."""

    def __init__(self, path: Path) -> None:
        self._cache = MaskCache.open(path)
        self.class_names = tuple(self._cache.class_names)
        self.description = f"mask set {self._cache.path}"
        self.fingerprint = self._cache.manifest.fingerprint

    def has(self, image_id: str) -> bool:
        """Whether the cache holds it."""
        return image_id in self._cache

    def read(self, image_id: str) -> LabelledMask:
        """Mask without 255, and its stored confidence; CacheRecordError where the record is damaged."""
        record = self._cache[image_id]
        return record.mask, record.confidence.astype(np.float32) / np.float32(200)


class GroundTruthMasks:
    """A folder of index masks, certain of every pixel.

    Some of the masks are read at once: values that are no class say that the class set is wrong, not a mask.

    Raises:
        ImageError: the folder or one of these masks can't be used.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self._files = find_images(folder)
        self.class_names = tuple(class_names)
        self.description = f"ground truth {folder}"
        ids = list(self._files)
        for image_id in ids[:: max(1, len(ids) // CHECKED)]:
            self.read(image_id)

    def has(self, image_id: str) -> bool:
        """Whether the folder holds it."""
        return image_id in self._files

    def read(self, image_id: str) -> LabelledMask:
        """The mask; ImageError where it can't be read or holds values that are no class."""
        mask = read_mask(self._files[image_id])
        largest = int(np.where(mask == IGNORE, 0, mask).max())
        if largest > len(self.class_names):
            raise ImageError(
                f"{self._files[image_id]} holds the value {largest}, but there are {len(self.class_names)} "
                "classes; give the class set that the masks were made with"
            )
        return mask, np.ones(mask.shape, np.float32)
