"""Confusion matrix and the scores read off it.

The rule is that of CLIP-ES (arXiv 2212.09506) and of most weakly supervised segmentation papers: one
confusion matrix over all images, pixels that are 255 in the ground truth left out, and the mean
IoU taken over the classes that occur in the ground truth. Published masks are scored without 255.
Where a prediction does hold 255 ("no label here"), the pixel counts as a miss: it belongs to the union
of its ground-truth class and to no predicted class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.masks import IGNORE, Mask, ignore_value, size_cause, values_problem
from wsss_pipeline.errors import EvaluationError


def check_sizes(prediction: Mask, ground_truth: Mask, origin: str = "ground truth") -> None:
    """Passes two masks (H, W) of the same size; an EvaluationError names ``origin`` and the likely cause else."""
    if prediction.ndim != 2 or ground_truth.ndim != 2:
        shapes = f"{ground_truth.shape} and {prediction.shape}"
        raise EvaluationError(f"{origin}: masks are (H, W) arrays of class indices, not {shapes}")
    if prediction.shape == ground_truth.shape:
        return
    size, true_size = prediction.shape[::-1], ground_truth.shape[::-1]
    cause = size_cause((size[0], size[1]), (true_size[0], true_size[1]))
    raise EvaluationError(
        f"{origin}: ground truth is {true_size[0]}x{true_size[1]}, prediction is {size[0]}x{size[1]}: {cause}"
    )


def confusion_matrix(
    prediction: Mask,
    ground_truth: Mask,
    num_classes: int,
    origin: str = "ground truth",
) -> NDArray[np.int64]:
    """Pixel counts of one image, ready to be added up over a data set.

    Args:
        prediction: uint8 (H, W), 0 background, 1..num_classes-1 classes, 255 no label; with more than 255 classes
            uint16, and 65,535 in the place of 255.
        ground_truth: the same type and values; 255 leaves the pixel out.
        num_classes: number of classes with the background, 1..65,535. The counts take its square times 8 bytes.
        origin: file or image id, for the messages.

    Returns:
        int64 (num_classes, num_classes + 1): row ground truth, column prediction; the last column
        counts the pixels whose prediction is 255.

    Raises:
        EvaluationError: the sizes differ, or a value is neither a class nor 255.
    """
    check_sizes(prediction, ground_truth, origin)
    ignore = ignore_value(num_classes)
    if ignore == IGNORE:
        # All 65,536 pairs at once: as fast as counting the classes alone, and it finds wrong values too.
        pairs = (ground_truth.astype(np.uint16) << 8) | prediction
        counts = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
        wrong_truth, wrong_prediction = counts[num_classes:IGNORE].any(), counts[:, num_classes:IGNORE].any()
    else:
        wrong_truth = ((ground_truth >= num_classes) & (ground_truth != ignore)).any()
        wrong_prediction = ((prediction >= num_classes) & (prediction != ignore)).any()
    if wrong_truth:
        raise EvaluationError(f"{origin}: ground truth {values_problem(ground_truth, num_classes - 1)}")
    if wrong_prediction:
        wrong = [value for value in np.unique(prediction) if num_classes <= value < ignore]
        listed = ", ".join(map(str, wrong[:12])) + (f" and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise EvaluationError(
            f"{origin}: the prediction holds values {listed}, but with {num_classes - 1} classes and the "
            f"background the largest value is {num_classes - 1}; give the class set it was made with"
        )
    if ignore == IGNORE:
        return counts[:num_classes, [*range(num_classes), IGNORE]].astype(np.int64)
    counted = ground_truth != ignore
    columns = np.minimum(prediction[counted], num_classes).astype(np.int64)
    flat = ground_truth[counted] * np.int64(num_classes + 1) + columns
    return np.bincount(flat, minlength=num_classes * (num_classes + 1)).reshape(num_classes, -1)


@dataclass(frozen=True)
class Scores:
    """Scores of one data set, all in [0, 1].

    Attributes:
        miou: mean IoU over the classes that occur in the ground truth (the published rule).
        miou_predicted_or_present: mean IoU over the classes that occur in the ground truth or in the
            predictions; lower than ``miou`` where a class is predicted that is nowhere to be found.
        per_class_iou: IoU by class name, background first; None where the ground truth lacks the class.
        pixel_accuracy: share of the pixels that are right.
        mean_accuracy: share of the pixels that are right, by ground-truth class, then their mean.
        frequency_weighted_iou: IoU of the classes weighted by their share of the ground truth.
        ignored_predictions: share of the scored pixels whose prediction is 255, counted as misses.
    """

    miou: float
    miou_predicted_or_present: float
    per_class_iou: dict[str, float | None]
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    ignored_predictions: float

    @classmethod
    def from_matrix(cls, matrix: NDArray[np.int64], class_names: Sequence[str]) -> Scores:
        """Scores of an added-up ``confusion_matrix``.

        Args:
            matrix: int64 (C, C + 1) as ``confusion_matrix`` returns it.
            class_names: C names, background first.

        Raises:
            EvaluationError: no pixel was scored.
        """
        in_truth = matrix.sum(axis=1)
        total = int(in_truth.sum())
        if total == 0:
            raise EvaluationError(
                f"no pixel to score: every ground-truth pixel is {ignore_value(len(matrix))} (ignore)"
            )
        hits = np.diagonal(matrix).astype(np.float64)
        predicted = matrix[:, :-1].sum(axis=0)
        union = in_truth + predicted - hits
        present = in_truth > 0
        occurring = union > 0
        iou = np.divide(hits, union, out=np.zeros_like(hits), where=occurring)
        return cls(
            miou=float(iou[present].mean()),
            miou_predicted_or_present=float(iou[occurring].mean()),
            per_class_iou={
                name: float(value) if there else None
                for name, value, there in zip(class_names, iou, present, strict=True)
            },
            pixel_accuracy=float(hits.sum() / total),
            mean_accuracy=float((hits[present] / in_truth[present]).mean()),
            frequency_weighted_iou=float((in_truth * iou).sum() / total),
            ignored_predictions=float(matrix[:, -1].sum() / total),
        )
