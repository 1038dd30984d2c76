"""What a run that fills a cache did, for people and for machines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wsss_pipeline.cache.records import Holds
from wsss_pipeline.data.few_warnings import FewWarnings

logger = logging.getLogger(__name__)

FAILURES_SHOWN = 20
MISSING = "the labels or the split name it, but there is no such image"


@dataclass
class MaskReport:
    """What a run did.

    Attributes:
        path: the mask set, a folder that ``MaskCache.open`` reads, or the region set.
        images: number of images in this run's share.
        unlabelled: images that the labels don't name, left out.
        computed: images whose masks, or regions, were made now.
        reused: those whose were in the cache.
        without_labels: computed ones with no class: all background.
        scaled: computed ones over ``max_pixels``.
        failed: image id to reason.
        interrupted: a request to stop came before the end.
        seconds: the whole run.
        computing: seconds from the first image to the last, without loading CLIP.
        busy: stage to the seconds it worked; those of the stages in ``shared`` are the sum over ``workers`` threads.
        workers: threads.
        shared: stages that all threads take part in.
        model: what looked at the images; a network's seconds are its refiner's as well.
        holds: what was made.
    """

    path: Path
    images: int = 0
    unlabelled: int = 0
    computed: int = 0
    reused: int = 0
    without_labels: int = 0
    scaled: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0
    computing: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    workers: int = 0
    shared: tuple[str, ...] = ()
    model: str = "CLIP"
    holds: Holds = "masks"

    def fail(self, image_id: str, reason: str) -> None:
        """Note one image that can't be used, and warn."""
        self.failed[image_id] = reason
        logger.warning("%s: %s", image_id, reason)

    def miss(self, image_ids: Iterable[str], unread: Mapping[str, str] | None = None) -> None:
        """Note images that the labels name and that aren't there, of which a label file may hold millions.

        ``unread``: image id to what is wrong with the format of a file that is there.
        """
        with FewWarnings(logger, "images that the labels or the split name aren't there") as missing:
            for image_id in image_ids:
                self.failed[image_id] = (unread or {}).get(image_id, MISSING)
                missing.warn("%s: %s", image_id, self.failed[image_id])

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = []
        what = "masks" if self.holds == "masks" else "images' regions"
        if self.computed:
            rate = self.computed / max(self.seconds, 1e-9)
            lines.append(f"{self.computed} {what} computed in {self.seconds:.1f} s ({rate:.2f} images/s)")
        if self.computed and self.busy and self.computing:
            shares = {
                stage: seconds / self.computing / (max(1, self.workers) if stage in self.shared else 1)
                for stage, seconds in self.busy.items()
                if seconds
            }
            listed = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in shares.items())
            lines.append(f"busy: {listed}; waiting on {max(shares, key=lambda stage: shares[stage])}")
        if self.reused:
            lines.append(f"{self.reused} {what} reused from the cache")
        if self.reused and not self.computed and not self.failed:
            consequence = ", so CLIP was not loaded" if self.model == "CLIP" else ""
            lines.append(f"nothing was left to compute{consequence}")
        if self.without_labels:
            lines.append(f"{self.without_labels} of {self.images} images without a label: all background")
        if self.scaled:
            lines.append(
                f"{self.scaled} of {self.images} images scaled down for CLIP and the refiner (--max-pixels)"
            )
        if self.unlabelled:
            lines.append(f"images left out, since the labels don't name them: {self.unlabelled}")
        if self.failed:
            lines.append(f"{len(self.failed)} of {self.images} images failed:")
            shown = list(self.failed.items())[:FAILURES_SHOWN]
            lines += [f"  {image_id}: {reason}" for image_id, reason in shown]
            if len(self.failed) > FAILURES_SHOWN:
                lines.append(f"  and {len(self.failed) - FAILURES_SHOWN} more; --json has them all")
        left = self.images - self.computed - self.reused - len(self.failed)
        if left:
            lines.append(f"{left} of {self.images} images left to do")
        return lines
