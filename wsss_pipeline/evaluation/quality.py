"""What masks are likely to score, out of their own confidence: no ground truth is looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsss_pipeline.data.masks import CERTAIN, MaskSource, PseudoMask
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)

# Of the odds of a confidence. Chosen once, on drawn scenes (seeds 901 to 903), among 1, 1.5, 2 and 3: on edges,
# which are most of an object's unsure pixels, labels are right more often than they are sure.
SHARPNESS = 2.0
_STEPS = np.arange(CERTAIN + 1) / CERTAIN
_RIGHT = _STEPS**SHARPNESS / (_STEPS**SHARPNESS + (1 - _STEPS) ** SHARPNESS)

POSTERIOR_REMARK = (
    "its confidence is the refiner's posterior, which is sure of nearly everything: take the order of classes and "
    "images for a hint; masks made with --confidence product are judged better"
)


@dataclass
class Quality:
    """Estimated IoU of masks that are added one after another.

    A label with confidence p is taken to be right with the probability q of odds (p / (1 - p))^2. A class's
    intersection is then the sum of q over its pixels, and its union those pixels and its share of what the background
    has wrong, the sum of 1 - q over the background divided by the number of the image's classes.

    Attributes:
        class_names: names of mask values 1..C.
        images: image id to class name to estimated IoU in [0, 1], of the image's labels; of the classes in its mask,
            where its labels aren't known. Images without any class aren't there.
    """

    class_names: Sequence[str]
    images: dict[str, dict[str, float]] = field(default_factory=dict)
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, image_id: str, record: PseudoMask) -> None:
        """Count a mask; pixels without a label take no part."""
        known = record.mask <= len(self.class_names)
        values, sure = record.mask[known].astype(np.int64), record.confidence[known]
        areas = np.bincount(values, minlength=1 + len(self.class_names))
        hits = np.bincount(values, _RIGHT[sure], minlength=len(areas))
        places = [
            value
            for value, name in enumerate(self.class_names, start=1)
            if areas[value] or name in record.labels
        ]
        for value in places:
            name, hit = self.class_names[value - 1], float(hits[value])
            union = float(areas[value] + (areas[0] - hits[0]) / len(places))
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + hit, before[1] + union)
            self.images.setdefault(image_id, {})[name] = hit / union if union else 0.0

    @property
    def by_class(self) -> dict[str, float]:
        """Estimated IoU of each class over all masks, worst first."""
        found = {name: hit / union if union else 0.0 for name, (hit, union) in self._sums.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def by_image(self) -> dict[str, float]:
        """Mean over each image's classes, worst first."""
        found = {image_id: float(np.mean([*own.values()])) for image_id, own in self.images.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def mean(self) -> float | None:
        """Mean over the classes; None without any."""
        return float(np.mean([*self.by_class.values()])) if self._sums else None

    def note(self, image_id: str) -> str:
        """An image's classes with their estimates, worst first, as a person reads them; empty without any."""
        own = sorted(self.images.get(image_id, {}).items(), key=lambda item: item[1])
        return "estimated IoU " + ", ".join(f"{name} {100 * iou:.0f} %" for name, iou in own) if own else ""

    def lines(self, shown: int = 10) -> list[str]:
        """The mean, the classes, and the images that are most likely wrong."""
        if self.mean is None:
            return ["no mask has a class: there is nothing to estimate"]
        classes = ", ".join(f"{name} {100 * iou:.1f}" for name, iou in self.by_class.items())
        worst = list(self.by_image.items())[:shown]
        return [
            f"estimated mIoU {100 * self.mean:.1f} % over {len(self.by_class)} classes, worst first: {classes}",
            "most likely wrong:",
            *(f"  {image_id}: {100 * iou:.1f} % ({self.note(image_id)})" for image_id, iou in worst),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values, as fractions of 1, worst first."""
        return {
            "estimated_miou": self.mean,
            "estimated_iou": self.by_class,
            "images": {image_id: self.images[image_id] for image_id in self.by_image},
        }


LIKELY_WRONG = (
    "1 - the IoU that the mask's own confidence lets one expect of a class; of an image its worst class's"
)


def likely_wrong(record: PseudoMask, class_names: Sequence[str]) -> dict[str, float]:
    """1 - estimated IoU of a mask's classes, by name."""
    quality = Quality(class_names)
    quality.add("", record)
    return {name: 1 - iou for name, iou in quality.images.get("", {}).items()}


def estimate(masks: MaskSource, ids: Sequence[str]) -> Quality:
    """The estimate of these masks; those that can't be read are warned of and left out."""
    quality = Quality(masks.class_names)
    with Progress(len(ids), "masks") as progress:
        for image_id in progress.over(ids):
            try:
                quality.add(image_id, masks[image_id])
            except (MaskError, ImageError) as error:
                logger.warning("%s: left out: %s", image_id, error)
    return quality


def is_sure_of_everything(determinants: Mapping[str, object]) -> bool:
    """Whether masks with these determinants have the posterior of a CRF or a vote for their confidence."""
    crf = determinants.get("crf")
    is_refined = isinstance(crf, Mapping) and crf.get("backend") != "none"
    return "confidence" not in determinants and (is_refined or "vote" in determinants)
