"""Regions as run lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wsss_pipeline.errors import RegionError
from wsss_pipeline.regions.regions import PART, WHOLE, Regions

MASKS = arrays.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 7)))


@given(MASKS)
def test_masks_come_back(masks: np.ndarray) -> None:
    regions = Regions.of_masks(masks)
    regions.check("a")
    assert (regions.masks() == masks).all()
    assert (regions.areas() == masks.sum(axis=(1, 2))).all()


def test_runs_are_those_of_coco() -> None:
    mask = np.array([[[True, False], [True, True]]])
    regions = Regions.of_masks(mask, [PART])
    assert regions.counts.tolist() == [0, 2, 1, 1]  # down the columns, outside first
    assert regions.levels.tolist() == [PART]
    assert np.isnan(regions.points).all()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        ({"counts": np.array([0, 2, 1, 2], np.int32)}, "fill 2 x 2"),
        ({"counts": np.array([0, 5, -2, 1], np.int32)}, "negative"),
        ({"lengths": np.array([3], np.int32)}, "add up"),
        ({"lengths": np.array([4, 0], np.int32)}, "another number"),
        ({"levels": np.array([WHOLE + 1], np.uint8)}, "level 3"),
        ({"iou": np.array([np.nan], np.float32)}, "no number"),
        ({"points": np.zeros((1, 3), np.float32)}, "another number"),
        ({"size": (0, 4)}, "an image of 0 x 4"),
        ({"size": (4, 0)}, "an image of 4 x 0"),
    ],
)
def test_what_is_no_regions_is_refused(damage: dict[str, object], word: str) -> None:
    sound = Regions.of_masks(np.array([[[True, False], [True, True]]]))
    with pytest.raises(RegionError, match=f"a/b: .*{word}"):
        replace(sound, **damage).check("a/b")  # type: ignore[arg-type]


@given(MASKS)
def test_boxes_are_those_of_the_masks(masks: np.ndarray) -> None:
    expected = []
    for mask in masks:
        y, x = np.nonzero(mask)
        expected.append([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])
    assert Regions.of_masks(masks).boxes().tolist() == expected


@given(MASKS, st.data())
def test_regions_can_be_chosen_from_and_joined(masks: np.ndarray, data: st.DataObject) -> None:
    number = len(masks)
    indices = data.draw(st.lists(st.integers(0, number - 1))) if number else []
    regions = Regions.of_masks(masks, np.arange(number) % 3, iou=np.arange(number) / 8)
    chosen = regions.select(indices)
    chosen.check("a")
    assert (chosen.masks() == masks[np.array(indices, int)]).all()
    assert chosen.levels.tolist() == [index % 3 for index in indices]
    assert chosen.iou.tolist() == [index / 8 for index in indices]
    assert (regions.select(masks.any(axis=(1, 2))).masks() == masks[masks.any(axis=(1, 2))]).all()
    joined = Regions.joined(regions.size, [regions, chosen])
    joined.check("a")
    assert (joined.masks() == np.concatenate([masks, chosen.masks()])).all()
    assert joined.iou.tolist() == [*regions.iou, *chosen.iou]
