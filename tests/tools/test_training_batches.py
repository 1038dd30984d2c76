"""Batches of views and captions."""

from __future__ import annotations

import numpy as np
import pytest

from tools.demo_clip.scene_pool import ScenePool, draw_pool
from tools.demo_clip.training_batches import TrainingBatches, image_size


@pytest.fixture(scope="module")
def pool() -> ScenePool:
    return draw_pool(seed=5, count=40, processes=1)


def test_a_batch_is_a_function_of_seed_and_step(pool: ScenePool) -> None:
    batches = TrainingBatches(pool, seed=1, steps=10, batch=8)
    again, other = TrainingBatches(pool, 1, 10, 8)[3], TrainingBatches(pool, 2, 10, 8)[3]
    assert np.array_equal(batches[3].images, again.images)
    assert batches[3].texts == again.texts
    assert not np.array_equal(batches[3].images, other.images)
    assert not np.array_equal(batches[3].images, batches[4].images)


def test_each_text_is_true_of_its_image_and_some_of_others(pool: ScenePool) -> None:
    batch = TrainingBatches(pool, seed=0, steps=10, batch=32)[0]
    assert batch.images.shape == (32, 48, 64, 3)
    assert batch.truth.diagonal().all()
    assert batch.truth.sum() > 40
    assert not batch.truth.all(axis=1).any()
    assert 0 < batch.single.sum() < 32
    for text, single in zip(batch.texts, batch.single, strict=True):
        if single:
            assert " and " not in text


def test_images_grow() -> None:
    areas = [width * height for width, height in (image_size(step, 100) for step in range(100))]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]
