from __future__ import annotations

import numpy as np
import pytest

from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import ConfigError, MaskError

MASK = np.ones((1, 201), np.uint8)
EVERY_CONFIDENCE = np.arange(201, dtype=np.uint8)[None]


@pytest.mark.parametrize("n", range(201))
def test_every_threshold_that_is_a_multiple_of_half_a_percent_is_exact(n: int) -> None:
    pseudo_mask = PseudoMask(MASK, EVERY_CONFIDENCE, ())
    expected = [255] * n + [1] * (201 - n)
    for threshold in (n / 200, float(np.float32(n / 200)), n * 0.005):
        assert pseudo_mask.with_ignore(threshold).tolist() == [expected]
    assert pseudo_mask.with_ignore(n / 200).dtype == np.uint8


def test_other_thresholds_round_up() -> None:
    pseudo_mask = PseudoMask(MASK, EVERY_CONFIDENCE, ())
    assert (pseudo_mask.with_ignore(0.951) == 1).sum() == 201 - 191
    assert (pseudo_mask.with_ignore(0.949) == 1).sum() == 201 - 190
    assert (pseudo_mask.with_ignore(0.0001) == 1).sum() == 200


@pytest.mark.parametrize("threshold", [-0.01, 1.01, 95, float("nan"), float("inf")])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PseudoMask(MASK, EVERY_CONFIDENCE, ()).with_ignore(threshold)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mask": np.ones((1, 201), np.int64)}, "uint8"),
        ({"mask": np.ones(201, np.uint8)}, "H, W"),
        ({"mask": np.ones((0, 0), np.uint8), "confidence": np.ones((0, 0), np.uint8)}, "H, W"),
        ({"confidence": np.ones((1, 200), np.uint8)}, "confidence"),
        ({"confidence": np.full((1, 201), 201, np.uint8)}, "201"),
        ({"cams": np.ones((2, 1, 201), np.float16)}, "CAMs"),
        ({"cams": np.ones((1, 1, 201), np.float32)}, "CAMs"),
    ],
)
def test_what_is_no_pseudo_mask_is_refused(change: dict[str, np.ndarray], problem: str) -> None:
    good = {"mask": MASK, "confidence": EVERY_CONFIDENCE, "labels": ("cat",)}
    PseudoMask(**good)
    with pytest.raises(MaskError, match=problem):
        PseudoMask(**(good | change))
