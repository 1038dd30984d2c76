"""Several masks of the same images side by side: how far they agree, and which is likely the best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.masks import CERTAIN, Mask, PseudoMask, ignore_value
from wsss_pipeline.errors import MaskError
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.runtime.output import MARK

# Measured on 91 pairs of settings on drawn scenes (benchmarks/compare.py); nothing is known of other images.
CLEAR_LEAD = 0.02
CLEAR = "on drawn scenes right for nine in ten pairs with such a lead"
UNCLEAR = (
    "a lead under 2 points: on drawn scenes right for seven in ten such pairs, so score some images (--gt)"
)


class Comparison:
    """Counts of S masks an image, added image by image.

    Without ground truth each of the S is judged by all of them, itself included: of a pixel to which a mask gives a
    label with confidence p, this label has the probability p, and the image's other labels, its classes and the
    background, an equal part of the rest each. The mean of these over the S masks is what the truth is taken to be,
    and a mask's expected IoU for a class is the expected intersection over the expected union, summed over all
    images. Masks without confidence count as certain. What all have wrong alike isn't noticed.

    Args:
        names: the S masks, for people; no two the same.
        class_names: names of mask values 1..C.
    """

    def __init__(self, names: Sequence[str], class_names: Sequence[str]) -> None:
        self.names, self.class_names = tuple(names), ("background", *class_names)
        count, labels = len(self.names), len(self.class_names)
        self.different: dict[
            str, float
        ] = {}  # image id to the mean share, over the pairs, of pixels that differ
        self.matrices = np.zeros((count, labels, labels + 1), np.int64)
        self._hits, self._unions = np.zeros((count, labels)), np.zeros((count, labels))
        self._same, self._pixels = np.zeros((count, count), np.int64), 0
        self._shared, self._either = np.zeros(labels, np.int64), np.zeros(labels, np.int64)

    def add(self, image_id: str, records: Sequence[PseudoMask], truth: Mask | None = None) -> None:
        """Count an image's masks, in the order of ``names``, and its ground truth.

        Raises:
            MaskError: their sizes differ; nothing was counted.
            EvaluationError: the ground truth has another size, or values that are no class; nothing was counted.
        """
        masks = [record.mask for record in records]
        if len({mask.shape for mask in masks}) > 1:
            sizes = ", ".join(f"{mask.shape[1]}x{mask.shape[0]}" for mask in masks)
            raise MaskError(f"its masks have several sizes ({sizes}): they don't belong together")
        labels = len(self.class_names)
        if truth is not None:
            self.matrices += np.stack([confusion_matrix(mask, truth, labels, image_id) for mask in masks])
        differing = []
        for one, other in combinations(range(len(masks)), 2):
            same = masks[one] == masks[other]
            self._same[one, other] += np.count_nonzero(same)
            differing.append(1 - float(same.mean()))
            first, second, shared = (
                np.bincount(values, minlength=labels)[:labels]
                for values in (masks[one].ravel(), masks[other].ravel(), masks[one][same])
            )
            self._shared += shared
            self._either += first + second - shared
        self._pixels += masks[0].size
        self.different[image_id] = float(np.mean(differing))
        given = {name for record in records for name in record.labels}
        seen = np.unique(np.stack(masks))
        present = [
            value
            for value, name in enumerate(self.class_names)
            if not value or value in seen or name in given
        ]
        probabilities = _mean_probabilities(records, present, ignore_value(labels))
        for value, truly in zip(present, probabilities, strict=True):
            total = float(truly.sum())
            for number, mask in enumerate(masks):
                inside = mask == value
                hit = float(truly[inside].sum())
                self._hits[number, value] += hit
                self._unions[number, value] += np.count_nonzero(inside) + total - hit

    @property
    def expected_iou(self) -> list[dict[str, float]]:
        """For each of the masks, expected IoU in [0, 1] by class name, of classes that any of them knows of."""
        there = self._unions.max(axis=0) > 0
        return [
            {
                name: float(hit / union) if union else 0.0
                for name, hit, union, is_there in zip(self.class_names, hits, unions, there, strict=True)
                if is_there
            }
            for hits, unions in zip(self._hits, self._unions, strict=True)
        ]

    @property
    def expected_miou(self) -> dict[str, float]:
        """Mean of it over the classes, by name of the masks."""
        return {
            name: float(np.mean([*ious.values()]))
            for name, ious in zip(self.names, self.expected_iou, strict=True)
        }

    @property
    def scores(self) -> dict[str, Scores] | None:
        """Against the ground truth, by name of the masks; None without any."""
        if not self.matrices.any():
            return None
        return {
            name: Scores.from_matrix(matrix, self.class_names)
            for name, matrix in zip(self.names, self.matrices, strict=True)
        }

    @property
    def best(self) -> str:
        """The masks with the largest mIoU; without ground truth, the largest expected one."""
        values = self.expected_miou
        if self.scores is not None:
            values = {name: one.miou for name, one in self.scores.items()}
        return max(values, key=values.__getitem__)

    @property
    def agreement(self) -> dict[tuple[str, str], float]:
        """Share of the pixels with the same label, for each pair."""
        return {
            (self.names[one], self.names[other]): float(self._same[one, other] / self._pixels)
            for one, other in combinations(range(len(self.names)), 2)
        }

    @property
    def agreement_by_class(self) -> dict[str, float]:
        """IoU of one mask with another, by class, over all pairs; least first."""
        found = {
            name: float(shared / either)
            for name, shared, either in zip(self.class_names, self._shared, self._either, strict=True)
            if either
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def most_different(self) -> list[str]:
        """Image ids, those whose masks differ most first."""
        return sorted(self.different, key=lambda image_id: -self.different[image_id])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of a table: a row a class and one for the mean, a column for each of the masks, in percent.

        IoU where there is ground truth, else expected IoU.
        """
        scores = self.scores
        columns: list[dict[str, float | None]]
        if scores is None:
            columns = [{**ious} for ious in self.expected_iou]
            means = list(self.expected_miou.values())
        else:
            columns = [one.per_class_iou for one in scores.values()]
            means = [one.miou for one in scores.values()]
        rows = [
            [name, *(_percent(column.get(name)) for column in columns)]
            for name in self.class_names
            if any(column.get(name) is not None for column in columns)
        ]
        head = "expected IoU %" if scores is None else "IoU %"
        return [head, *self.names], [*rows, ["mean", *map(_percent, means)]]

    def conclusion(self) -> str:
        """Which is the best, and how far that is to be trusted."""
        if self.scores is not None:
            return f"best by ground truth: {self.best}"
        first, second = sorted(self.expected_miou.values(), reverse=True)[:2]
        return f"likely the best: {self.best} ({CLEAR if first - second >= CLEAR_LEAD else UNCLEAR})"

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``, as fractions of 1."""
        scores = self.scores
        return {
            "program": MARK,
            "images": len(self.different),
            "masks": {
                name: {
                    "expected_miou": self.expected_miou[name],
                    "expected_iou": ious,
                    "miou": None if scores is None else scores[name].miou,
                    "per_class_iou": None if scores is None else scores[name].per_class_iou,
                }
                for name, ious in zip(self.names, self.expected_iou, strict=True)
            },
            "agreement": [
                {"masks": list(pair), "same_pixels": share} for pair, share in self.agreement.items()
            ],
            "agreement_by_class": self.agreement_by_class,
            "different": {image_id: self.different[image_id] for image_id in self.most_different},
            "best": self.best,
            "by": "expected IoU" if scores is None else "ground truth",
        }


def _mean_probabilities(
    records: Sequence[PseudoMask], present: Sequence[int], ignore: int
) -> NDArray[np.float32]:
    """Probabilities (n, H, W) of an image's n labels, the mean of those that each of its masks implies."""
    total = np.zeros((len(present), *records[0].mask.shape), np.float32)
    for record in records:
        sure = record.confidence.astype(np.float32) / np.float32(CERTAIN)
        # no label says nothing of any
        sure[record.mask == ignore] = 1 / len(present)
        rest = (1 - sure) / np.float32(max(1, len(present) - 1))
        for number, value in enumerate(present):
            total[number] += np.where(record.mask == value, sure, rest)
    total /= np.float32(len(records))
    return total


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
