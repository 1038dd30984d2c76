"""Drawn scenes: the same for ever, and in agreement with themselves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from wsss_pipeline.demo.backgrounds import BACKGROUNDS
from wsss_pipeline.demo.scenes import CLASS_NAMES, Scene, draw_scene
from wsss_pipeline.demo.shapes import OBJECT_CLASSES


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene((5, index), 80, 60) for index in range(300)]


def test_a_seed_gives_the_same_scene_and_another_seed_another() -> None:
    first, again, other = draw_scene(3), draw_scene(3), draw_scene(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert (first.objects, first.backgrounds) == (again.objects, again.backgrounds)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [(160, 120), (33, 97), (16, 16)])
def test_image_and_mask_have_the_size_asked_for(size: tuple[int, int]) -> None:
    scene = draw_scene(1, *size)
    assert scene.image.shape == (size[1], size[0], 3)
    assert scene.mask.shape == (size[1], size[0])
    assert scene.image.dtype == scene.mask.dtype == np.uint8


def test_labels_are_what_the_mask_shows(scenes: list[Scene]) -> None:
    for scene in scenes:
        shown = {CLASS_NAMES[value - 1] for value in np.unique(scene.mask) if value}
        assert shown == set(scene.labels)
        assert len(scene.labels) == len(shown)


def test_an_object_stands_out_where_its_mask_says(scenes: list[Scene]) -> None:
    """The same world without its objects' edges would have no more contrast there than elsewhere."""
    on_edge, elsewhere = [], []
    for scene in scenes:
        difference = np.abs(np.diff(scene.image.astype(int), axis=1)).sum(axis=2)
        edge = np.diff(scene.mask.astype(int), axis=1) != 0
        on_edge.append(difference[edge].mean())
        elsewhere.append(difference[~edge].mean())
    assert np.mean(on_edge) > 3 * np.mean(elsewhere)


def test_all_classes_backgrounds_and_counts_appear(scenes: list[Scene]) -> None:
    assert {name for scene in scenes for name in scene.labels} == set(CLASS_NAMES)
    assert {word for scene in scenes for word in scene.backgrounds} == set(BACKGROUNDS)
    assert Counter(len(scene.labels) for scene in scenes).keys() == {1, 2, 3}


def test_some_objects_hide_part_of_others(scenes: list[Scene]) -> None:
    touching = 0
    for scene in scenes:
        left, right = scene.mask[:, :-1], scene.mask[:, 1:]
        touching += bool(((left != right) & (left > 0) & (right > 0)).any())
    assert touching > 10


def test_classes_prefer_their_habitat(scenes: list[Scene]) -> None:
    for kind in OBJECT_CLASSES:
        home = [
            bool(set(scene.backgrounds) & set(kind.habitat)) for scene in scenes if kind.name in scene.labels
        ]
        rest = [
            bool(set(scene.backgrounds) & set(kind.habitat))
            for scene in scenes
            if kind.name not in scene.labels
        ]
        assert np.mean(home) > np.mean(rest) + 0.1, kind.name


def test_the_number_of_classes_can_be_chosen() -> None:
    assert all(len(draw_scene(seed, 64, 48, classes=2).labels) == 2 for seed in range(10))
    with pytest.raises(ValueError, match="1, 2 or 3"):
        draw_scene(0, 64, 48, classes=4)
    with pytest.raises(ValueError, match="too small"):
        draw_scene(0, 64, 8)
