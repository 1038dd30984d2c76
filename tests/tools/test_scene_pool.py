"""The pool of training scenes and the views of them."""

from __future__ import annotations

import numpy as np
import pytest

from tools.demo_clip import scene_pool
from tools.demo_clip.scene_pool import POOL_SIZE, ScenePool, draw_pool
from wsss_pipeline.demo.scenes import DrawnObject, draw_scene

SIZE = (64, 48)


@pytest.fixture(scope="module")
def pool() -> ScenePool:
    return draw_pool(seed=2, count=70, processes=2)


def test_a_scene_depends_on_seed_and_number_alone(pool: ScenePool) -> None:
    assert len(pool) == 70
    for number in (0, 69):
        scene = draw_scene((2, number), *POOL_SIZE)
        assert np.array_equal(pool.images[number], scene.image)
        assert np.array_equal(pool.masks[number], scene.mask)
        assert pool.contents[number] == (scene.objects, scene.backgrounds, scene.horizon)


def test_views_come_in_the_size_asked_for_and_no_two_alike(pool: ScenePool) -> None:
    rng = np.random.default_rng(0)
    views = [pool.view(0, SIZE, rng) for _ in range(16)]
    assert all(view.image.shape == (48, 64, 3) and view.image.dtype == np.uint8 for view in views)
    assert len({view.image.tobytes() for view in views}) == 16


def test_a_view_tells_of_something_and_of_nothing_but_its_scene(pool: ScenePool) -> None:
    rng = np.random.default_rng(1)
    counts = set()
    for index in range(len(pool)):
        objects, backgrounds, _ = pool.contents[index]
        for _ in range(8):
            view = pool.view(index, SIZE, rng)
            assert set(view.objects) <= set(objects)
            assert set(view.backgrounds) <= set(backgrounds)
            assert view.objects or view.backgrounds
            counts.add((bool(view.objects), bool(view.backgrounds)))
    assert counts == {(True, True), (True, False), (False, True)}, "near views show one without the other"


def test_a_near_view_does_not_tell_of_what_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ball on the left, sky above grass; the window is put by hand."""
    mask = np.zeros((96, 128), np.uint8)
    mask[60:80, 10:30] = 1
    pool = ScenePool(
        np.zeros((1, 96, 128, 3), np.uint8),
        mask[None],
        [((DrawnObject("ball", "red"),), ("grass", "sky"), 40)],
    )
    monkeypatch.setattr(scene_pool, "NEAR_SHARE", 1.0)
    seen = {}
    for name, window in {
        "upper right": (slice(0, 30), slice(60, 100)),
        "lower right": (slice(45, 90), slice(64, 124)),
        "left": (slice(50, 95), slice(0, 60)),
        "ball": (slice(62, 77), slice(10, 30)),
    }.items():
        monkeypatch.setattr(scene_pool, "_window", lambda *_, window=window: window)
        view = pool.view(0, SIZE, np.random.default_rng(0))
        seen[name] = ([drawn.name for drawn in view.objects], view.backgrounds)
    assert seen == {
        "upper right": ([], ("sky",)),
        "lower right": ([], ("grass",)),
        "left": (["ball"], ("grass",)),
        "ball": (["ball"], ()),
    }
