"""Several masks of the same images side by side."""

from __future__ import annotations

import numpy as np
import pytest

from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import EvaluationError, MaskError
from wsss_pipeline.evaluation.comparison import CLEAR, UNCLEAR, Comparison

NAMES = ("cat", "dog")


def record(mask: list[int], confidence: list[int], labels: tuple[str, ...] = ()) -> PseudoMask:
    return PseudoMask(np.array([mask], np.uint8), np.array([confidence], np.uint8), labels)


def test_expected_iou_and_agreement_worked_out_by_hand() -> None:
    found = Comparison(("one", "other"), NAMES)
    found.add("a", [record([0, 1, 1], [200, 100, 200], ("cat",)), record([0, 0, 1], [160, 180, 160])])
    # the cat's probability at each pixel, the mean of both: 0.1, 0.3, 0.9
    one, other = found.expected_iou
    assert one == {
        "background": pytest.approx(0.9 / (0.9 + 0.7 + 0.1 + 0.1)),
        "cat": pytest.approx(1.2 / (2 + 0.1)),
    }
    assert other == {"background": pytest.approx(1.6 / (2 + 0.1)), "cat": pytest.approx(0.9 / (1 + 0.4))}
    assert found.agreement == {("one", "other"): pytest.approx(2 / 3)}
    assert found.agreement_by_class == {"background": 0.5, "cat": 0.5}
    assert found.different == {"a": pytest.approx(1 / 3)}
    assert found.best == "other"
    assert found.conclusion() == f"likely the best: other ({CLEAR})"
    assert found.scores is None
    heads, rows = found.table()
    assert heads == ["expected IoU %", "one", "other"]
    assert [row[0] for row in rows] == ["background", "cat", "mean"]


def test_a_small_lead_is_said_to_be_one() -> None:
    found = Comparison(("one", "other"), NAMES)
    found.add("a", [record([1] * 50 + [0] * 50, [200] * 100), record([1] * 51 + [0] * 49, [199] * 100)])
    assert found.conclusion() == f"likely the best: one ({UNCLEAR})"


def test_ground_truth_decides_where_there_is_some() -> None:
    found = Comparison(("one", "other"), NAMES)
    truth = np.array([[0, 1, 1]], np.uint8)
    found.add("a", [record([0, 1, 1], [200, 100, 200]), record([0, 0, 1], [160, 180, 160])], truth)
    assert found.best == "one"
    assert found.conclusion() == "best by ground truth: one"
    heads, rows = found.table()
    assert heads[0] == "IoU %"
    assert rows[-1] == ["mean", "100.0", "50.0"]
    values = found.as_json()
    assert values["by"] == "ground truth"
    assert values["masks"]["other"]["miou"] == 0.5


def test_no_label_is_no_vote_and_three_agree_more_than_one() -> None:
    found = Comparison(("a", "b", "c"), NAMES)
    sure = [200] * 4
    found.add("x", [record([2, 2, 0, 0], sure), record([2, 2, 0, 0], sure), record([2, 255, 255, 0], sure)])
    assert found.expected_miou["a"] == found.expected_miou["b"] > found.expected_miou["c"]
    assert found.agreement[("a", "b")] == 1.0
    assert found.most_different == ["x"]
    found.add("y", [record([0], [200])] * 3)
    assert found.different["y"] == 0.0
    assert found.most_different == ["x", "y"]


def test_nothing_is_counted_of_an_image_that_does_not_fit() -> None:
    found = Comparison(("a", "b"), NAMES)
    with pytest.raises(MaskError, match=r"several sizes \(2x1, 1x1\)"):
        found.add("x", [record([0, 1], [200, 200]), record([0], [200])])
    with pytest.raises(EvaluationError):
        found.add("x", [record([0, 1], [200, 200])] * 2, np.array([[0, 9]], np.uint8))
    assert found.different == {}
    assert not found.agreement_by_class
