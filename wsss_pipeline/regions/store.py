"""Regions in files of the cache: a set of them is kept as masks are, by what determines them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.cache.mask_cache import RecordCache
from wsss_pipeline.cache.records import Parts, RecordInfo, own_member
from wsss_pipeline.data.images import MAX_DECODED_PIXELS
from wsss_pipeline.errors import CacheRecordError, RegionError
from wsss_pipeline.regions.regions import MAX_REGIONS, Regions

MAX_RUNS = 2**26  # of all regions of an image, 256 MiB

# one record is read at a time: threads share the open files of a set, which close when there are too many
_reading = threading.Lock()


@dataclass(frozen=True)
class RegionRecords:
    """A ``RecordKind``: the arrays of ``Regions``, its run lengths in one piece."""

    holds: Literal["regions"] = "regions"
    class_names: tuple[str, ...] = ()
    remedy: str = "`wsss propose-regions` with --out {folder} and the options of the first run adds it"

    def parts(self, content: Regions) -> Parts:
        """All arrays; a ValueError where they are no regions, or too many."""
        if reason := content.problem():
            raise ValueError(f"no regions: {reason}")
        _check_size(content.size, len(content), len(content.counts))
        arrays = {
            "size": np.array(content.size, "<i4"),
            "counts": np.asarray(content.counts, "<i4"),
            "lengths": np.asarray(content.lengths, "<i4"),
            "levels": np.asarray(content.levels, "|u1"),
            "iou": np.asarray(content.iou, "<f4"),
            "stability": np.asarray(content.stability, "<f4"),
            "points": np.asarray(content.points, "<f4"),
        }
        return Parts(content.size, (), arrays)

    def layout(self, group: h5py.Group, info: RecordInfo) -> dict[str, tuple[tuple[int, ...], str]]:
        """By the declared numbers of regions and runs; a ValueError where no image of this size has so many."""
        (number,) = own_member(group, "lengths", h5py.Dataset).shape
        (runs,) = own_member(group, "counts", h5py.Dataset).shape
        _check_size((info.height, info.width), number, runs)
        floats = dict.fromkeys(("iou", "stability"), ((number,), "<f4"))
        integers = {"size": ((2,), "<i4"), "counts": ((runs,), "<i4"), "lengths": ((number,), "<i4")}
        return {**integers, "levels": ((number,), "|u1"), **floats, "points": ((number, 2), "<f4")}

    def content(self, info: RecordInfo, arrays: Mapping[str, NDArray[Any]]) -> Regions:
        """The regions; a ValueError where the arrays are none."""
        height, width = map(int, arrays["size"])
        if (height, width) != (info.height, info.width):
            raise ValueError(
                f"regions of {height} x {width} pixels in a record of {info.height} x {info.width}"
            )
        names = ("counts", "lengths", "levels", "iou", "stability", "points")
        regions = Regions((height, width), *(arrays[name] for name in names))
        if reason := regions.problem():
            raise ValueError(reason)
        return regions


def _check_size(size: tuple[int, int], number: int, runs: int) -> None:
    height, width = size
    # a run has a pixel, but for the first of a region
    most = min(MAX_RUNS, number * (height * width + 1))
    if min(size) < 1 or height * width > MAX_DECODED_PIXELS or number > MAX_REGIONS or runs > most:
        raise ValueError(
            f"{width} x {height} pixels with {number} regions of {runs} runs; the limits are {MAX_DECODED_PIXELS} "
            f"pixels, {MAX_REGIONS} regions, and {MAX_RUNS} runs that have a pixel each"
        )


class StoredRegions(RecordCache[Regions]):
    """A ``RegionSource``: the regions of one set, by image id; further as ``RecordCache``. Threads may share it.

    Raises:
        CacheFormatError: the folder is no set of regions, or one of another format version.
    """

    holds = "regions"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.description = f"region set {path}"
        self.identity: dict[str, object] = {"region set": self.manifest.fingerprint}

    def __call__(self, image_id: str, pixels: NDArray[np.uint8]) -> Regions:
        """Regions of an image, uint8 (H, W, 3) RGB; errors as ``RegionSource``."""
        try:
            with _reading:
                info = self.record_info(image_id)
                if (info.height, info.width) == pixels.shape[:2]:  # else nothing of it is read
                    return self.read(image_id)
        except CacheRecordError as error:
            raise RegionError(str(error)) from error
        height, width = pixels.shape[:2]
        raise RegionError(
            f"the regions of image '{image_id}' in {self.path} are of {info.width} x {info.height} pixels, the image "
            f"has {width} x {height}; was it scaled since? Propose its regions anew"
        )
