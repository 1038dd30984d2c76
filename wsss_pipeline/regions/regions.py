"""Regions of one image: masks as run lengths, each with a level and what its finder said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.errors import RegionError

SUB_PART, PART, WHOLE = 0, 1, 2

MAX_REGIONS = (
    2**14
)  # of an image; SAM's published settings find some hundreds, and a mask takes a byte a pixel


@dataclass(frozen=True, eq=False)
class Regions:
    """N regions of an image, which may overlap and leave pixels uncovered; N may be 0.

    Attributes:
        size: (H, W).
        counts: int32 (R,), run lengths of all regions, one after another. Runs go down the columns, one column after
            another, and begin with those outside the region, 0 where there are none (COCO's order).
        lengths: int32 (N,), number of runs of each region; each region's runs sum to H * W.
        levels: uint8 (N,), ``SUB_PART``, ``PART`` or ``WHOLE``.
        iou: float32 (N,), the finder's guess of each mask's overlap with the truth, 1 where it has none.
        stability: float32 (N,), overlap of the masks at a higher and a lower threshold, 1 where there is none.
        points: float32 (N, 2), (x, y) of the prompts that found them, NaN where there were none.
    """

    size: tuple[int, int]
    counts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    levels: NDArray[np.uint8]
    iou: NDArray[np.float32]
    stability: NDArray[np.float32]
    points: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of_masks(
        cls,
        masks: NDArray[np.bool_],
        levels: Sequence[int] | NDArray[np.integer] | None = None,
        *,
        iou: NDArray[np.floating] | None = None,
        stability: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
    ) -> Regions:
        """Regions out of masks.

        Args:
            masks: bool (N, H, W).
            levels: (N,); all ``WHOLE`` where None.
            iou, stability: (N,); all 1 where None.
            points: (N, 2); NaN where None.
        """
        number, height, width = masks.shape
        runs = [run_lengths(mask) for mask in masks]
        empty = np.zeros(0, np.int32)
        return cls(
            size=(height, width),
            counts=np.concatenate([*runs, empty]).astype(np.int32),
            lengths=np.array([len(run) for run in runs], np.int32),
            levels=np.full(number, WHOLE, np.uint8) if levels is None else np.asarray(levels, np.uint8),
            iou=np.ones(number, np.float32) if iou is None else np.asarray(iou, np.float32),
            stability=np.ones(number, np.float32) if stability is None else np.asarray(stability, np.float32),
            points=np.full((number, 2), np.nan, np.float32)
            if points is None
            else np.asarray(points, np.float32),
        )

    def masks(self) -> NDArray[np.bool_]:
        """bool (N, H, W)."""
        height, width = self.size
        # a run at an odd place of its region is inside
        first = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        inside = (np.arange(len(self.counts)) - first) % 2 == 1
        return np.repeat(inside, self.counts).reshape(len(self), width, height).transpose(0, 2, 1)

    def runs_inside(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Region, first pixel and pixel after the last of each run inside a region, each (Q,).

        Pixels are counted down the columns of the image, from 0 to H * W. Runs come in order, region by region; there
        may be some of no pixel.
        """
        first = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        inside = (np.arange(len(self.counts)) - first) % 2 == 1
        owner = np.repeat(np.arange(len(self)), self.lengths)[inside]
        height, width = self.size
        end = np.cumsum(self.counts, dtype=np.int64)[inside] - owner * (height * width)
        return owner, end - self.counts[inside], end

    def areas(self) -> NDArray[np.int64]:
        """Pixels of each region, (N,)."""
        owner, start, end = self.runs_inside()
        return np.bincount(owner, end - start, minlength=len(self)).astype(np.int64)

    def boxes(self) -> NDArray[np.int64]:
        """First and last column and row of each region as (x0, y0, x1, y1), (N, 4); all 0 where it has no pixel."""
        height, width = self.size
        owner, start, end = self.runs_inside()
        owner, start, last = (part[end > start] for part in (owner, start, end - 1))
        # a run that goes on in the next column has reached the last row of one and the first of the other
        beyond = last // height > start // height
        lowest = np.full((len(self), 2), [width, height], np.int64)
        highest = np.full((len(self), 2), -1, np.int64)
        np.minimum.at(lowest, owner, np.stack([start // height, np.where(beyond, 0, start % height)], 1))
        np.maximum.at(
            highest, owner, np.stack([last // height, np.where(beyond, height - 1, last % height)], 1)
        )
        boxes = np.concatenate([lowest, highest], axis=1)
        boxes[highest[:, 0] < 0] = 0
        return boxes

    def select(self, indices: NDArray[np.integer] | NDArray[np.bool_] | Sequence[int]) -> Regions:
        """Those of the indices, in their order, or those where a (N,) mask is true."""
        chosen = np.arange(len(self))[np.asarray(indices, None if len(indices) else np.int64)]
        runs = np.split(self.counts, np.cumsum(self.lengths)[:-1])
        return Regions(
            self.size,
            np.concatenate([np.zeros(0, np.int32), *(runs[index] for index in chosen)]),
            *(
                values[chosen]
                for values in (self.lengths, self.levels, self.iou, self.stability, self.points)
            ),
        )

    @classmethod
    def joined(cls, size: tuple[int, int], parts: Sequence[Regions]) -> Regions:
        """Regions of one image, of ``size``, one part after another."""
        names = ("counts", "lengths", "levels", "iou", "stability", "points")
        parts = [cls.of_masks(np.zeros((0, *size), bool)), *parts]
        return cls(size, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def check(self, image_id: str) -> None:
        """A RegionError where the numbers are no regions of any image."""
        if reason := self.problem():
            raise RegionError(f"{image_id}: its regions are damaged: {reason}; propose or write them anew")

    def problem(self) -> str:
        """What makes the numbers no regions of any image; empty where nothing does."""
        height, width = self.size
        number = len(self)
        reason = ""
        if height < 1 or width < 1:
            reason = f"an image of {height} x {width}"
        elif number > MAX_REGIONS:
            reason = f"{number} regions, where an image may have {MAX_REGIONS}"
        elif any(
            len(values) != number for values in (self.levels, self.iou, self.stability, self.points)
        ) or self.points.shape != (number, 2):
            reason = "levels, scores and points of another number of regions"
        elif (self.lengths < 1).any() or self.lengths.sum(dtype=np.int64) != len(self.counts):
            reason = "numbers of runs that don't add up"
        elif (self.counts < 0).any():
            reason = "a negative run"
        elif (
            number
            and (
                np.add.reduceat(self.counts.astype(np.int64), np.cumsum(self.lengths) - self.lengths)
                != height * width
            ).any()
        ):
            reason = f"runs that don't fill {height} x {width} pixels"
        elif (self.levels > WHOLE).any():
            reason = f"level {self.levels.max()}, where {SUB_PART} to {WHOLE} are known"
        elif not (np.isfinite(self.iou).all() and np.isfinite(self.stability).all()):
            reason = "a score that is no number"
        return reason


def run_lengths(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Runs of a mask (H, W) down its columns, outside first, as ``Regions.counts`` holds them."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return np.concatenate([[0], runs]) if flat[0] else runs


class RegionSource(Protocol):
    """Where an image's regions come from.

    Attributes:
        description: text for people.
        identity: all that determines the regions, for the fingerprint of masks made with them.
    """

    description: str
    identity: dict[str, object]

    def __call__(self, image_id: str, pixels: NDArray[np.uint8]) -> Regions:
        """Regions of an image, uint8 (H, W, 3) RGB, of its size.

        Raises:
            RegionError: it has none here, or they are damaged or of another size.
        """
