"""Scores against their definition in plain loops, and what must hold for any masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from wsss_pipeline.evaluation.metrics import IGNORE, Scores, confusion_matrix

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
CLASSES = 4
NAMES = ("background", "cat", "dog", "sofa")
labels = st.sampled_from([*range(CLASSES), IGNORE])


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    return tuple(draw(arrays.arrays(np.uint8, size, elements=labels)) for _ in range(2))  # type: ignore[return-value]


def matrix(*found: Pair) -> NDArray[np.int64]:
    counts = [confusion_matrix(prediction, truth, CLASSES) for prediction, truth in found]
    return np.sum(counts, axis=0)


@given(pairs())
def test_iou_is_intersection_over_union(pair: Pair) -> None:
    prediction, truth = pair
    counted = truth != IGNORE
    if not counted.any():
        return
    expected: dict[str, float | None] = {}
    for label, name in enumerate(NAMES):
        intersection = int((counted & (truth == label) & (prediction == label)).sum())
        union = int((counted & ((truth == label) | (prediction == label))).sum())
        expected[name] = intersection / union if (truth == label).any() else None
    found = Scores.from_matrix(matrix(pair), NAMES)
    assert found.per_class_iou == pytest.approx(expected)
    assert found.miou == pytest.approx(np.mean([iou for iou in expected.values() if iou is not None]))
    assert found.pixel_accuracy == pytest.approx((prediction == truth)[counted].mean())
    assert found.ignored_predictions == pytest.approx((prediction == IGNORE)[counted].mean())


@given(pairs(), pairs())
def test_images_add_up_and_their_order_says_nothing(one: Pair, other: Pair) -> None:
    flat = tuple(np.concatenate([a.ravel(), b.ravel()])[None] for a, b in zip(one, other, strict=True))
    assert np.array_equal(matrix(one, other), matrix(other, one))
    assert np.array_equal(matrix(one, other), matrix((flat[0], flat[1])))


@given(pairs())
def test_truth_scores_one_and_what_is_ignored_says_nothing(pair: Pair) -> None:
    prediction, truth = pair
    if (truth != IGNORE).any():
        assert Scores.from_matrix(matrix((truth, truth)), NAMES).miou == 1
        scores = Scores.from_matrix(matrix(pair), NAMES)
        assert 0 <= scores.miou_predicted_or_present <= scores.miou <= 1
    otherwise = np.where(truth == IGNORE, 0, prediction).astype(np.uint8)
    assert np.array_equal(matrix((otherwise, truth)), matrix(pair))
