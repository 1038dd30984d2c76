"""The augmentation of WeakCLIP: OpenCV's arithmetic, crops drawn for their classes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wsss_pipeline.data.transforms import fitted_size
from wsss_pipeline.segmentation import augmentation as module
from wsss_pipeline.segmentation.augmentation import OpenCvAugmentation, distorted
from wsss_pipeline.segmentation.network import IMAGE_MEAN, IMAGE_STD
from wsss_pipeline.segmentation.train_config import AugmentationConfig

LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden data of WeakCLIP"
)


def augmentation(**values: Any) -> OpenCvAugmentation:
    config = AugmentationConfig.model_validate({"style": "opencv", "crop": 64, **values})
    return OpenCvAugmentation(config, IMAGE_MEAN, IMAGE_STD)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Published draws, function, arguments and result each, that come out in place of random numbers."""
    draws: list[Any] = []

    def integer(low: int, high: int) -> int:
        _, arguments, (result,) = draws.pop(0)
        assert [0, *arguments][-2:] == [low, high]
        return int(result)

    def uniform(low: float, high: float) -> float:
        name, arguments, (result,) = draws.pop(0)
        if name == "uniform":
            assert arguments == [low, high]
            return float(result)
        return low + (high - low) * float(result)

    monkeypatch.setattr(module, "integer", integer)
    monkeypatch.setattr(module, "uniform", uniform)
    return draws


def published(name: str) -> tuple[Any, Any]:
    folder = LARGE / "weakclip"
    return np.load(folder / "data.npz"), json.loads((folder / "data_draws.json").read_text())[name]


@needs_large
@pytest.mark.parametrize("number", range(6))
def test_colours_are_the_published_ones(replayed: list[Any], number: int) -> None:
    arrays, replayed[:] = published(f"photometric/{number}")
    found = distorted(np.ascontiguousarray(arrays["photometric/input_bgr"][..., ::-1]))
    assert np.array_equal(found[..., ::-1], arrays[f"photometric/{number}_bgr"])
    assert not replayed


@needs_large
@pytest.mark.parametrize("number", range(6))
def test_scale_crop_and_flip_are_the_published_ones(replayed: list[Any], number: int) -> None:
    arrays, told = published(f"geometry/{number}")
    replayed[:] = told["draws"]
    image = torch.from_numpy(arrays["geometry/input_bgr"][..., ::-1].copy()).permute(2, 0, 1)
    mask = torch.from_numpy(arrays["geometry/mask"])
    chosen = augmentation(short_side=64, long_side=256, scale_max=2.0, photometric=False)
    pixels, labels, confidence = chosen(image, mask, mask)
    assert np.array_equal(labels, arrays[f"geometry/{number}_mask"])
    assert np.array_equal(confidence, np.where(labels == 255, confidence, labels))
    assert np.array_equal(pixels[:, ::2, ::2], arrays[f"geometry/{number}_tensor"])
    assert not replayed


@needs_large
def test_sizes_of_views_are_the_published_ones() -> None:
    arrays = np.load(LARGE / "weakclip/predict_chelsea.npz")
    sizes = [fitted_size((300, 451), scale, 512, 2048) for scale in (0.5, 0.75, 1, 1.25, 1.5, 1.75)]
    assert [list(size) for size in sizes for _ in range(2)] == arrays["view_sizes"].tolist()


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((100, 200), 1.0, (512, 1024)), ((1000, 100), 1.0, (2048, 205)), ((7, 7000), 0.5, (1, 1024))],
)
def test_an_image_is_fitted_into_the_frame(
    size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    assert fitted_size(size, scale, 512, 2048) == expected


def sample(mask: Tensor, seed: int, **values: Any) -> Sequence[Tensor]:
    torch.manual_seed(seed)
    image = torch.arange(3 * mask.numel()).reshape(3, *mask.shape).to(torch.uint8)
    plain = {"scale_min": 1.0, "scale_max": 1.0, "short_side": 64, "long_side": 400, "crop": 32}
    return augmentation(**{**plain, **values})(image, mask, mask)


def test_crops_of_one_class_are_drawn_anew() -> None:
    mask = torch.zeros(64, 400, dtype=torch.uint8)
    mask[:, 200:240] = 1
    mixed = [len(sample(mask, seed)[1].unique()) > 1 for seed in range(40)]
    as_they_come = [len(sample(mask, seed, largest_share=0.0)[1].unique()) > 1 for seed in range(40)]
    assert sum(mixed) > 20 > 10 > sum(as_they_come)


def test_a_class_that_covers_too_much_is_one_and_pixels_without_label_count_nothing() -> None:
    mask = torch.zeros(64, 400, dtype=torch.uint8)
    mask[:, 200:240] = 1
    mask[:, 240:] = 255

    def mixed(**values: float) -> int:
        crops = [sample(mask, seed, **values)[1] for seed in range(30)]
        counts = [[int((labels == value).sum()) for value in (0, 1)] for labels in crops]
        return sum(max(pair) < 0.75 * sum(pair) for pair in counts)

    assert mixed() > mixed(largest_share=1.0) > 5 > mixed(largest_share=0.0)


@pytest.mark.parametrize(("value", "share"), [(255, 0.75), (1, 0.5)], ids=["one class", "just too much"])
def test_a_picture_without_a_mixed_crop_ends_after_ten_tries(
    monkeypatch: pytest.MonkeyPatch, value: int, share: float
) -> None:
    drawn: list[int] = []
    draw = module.integer
    monkeypatch.setattr(module, "integer", lambda low, high: drawn.append(high) or draw(low, high))
    mask = torch.zeros(64, 400, dtype=torch.uint8)
    mask[:, ::2] = value
    sample(mask, 0, photometric=False, largest_share=share)
    assert len(drawn) == 2 * 11


def test_every_second_sample_is_mirrored() -> None:
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:8, :16] = 1
    found = [sample(mask, seed, crop=64, long_side=64, largest_share=0.0)[1] for seed in range(40)]
    assert all(torch.equal(labels, mask) or torch.equal(labels, mask.flip(1)) for labels in found)
    assert 10 < sum(torch.equal(labels, mask) for labels in found) < 30
    assert torch.equal(sample(mask, 0, crop=64, long_side=64, largest_share=0.0, flip=False)[1], mask)


def test_what_is_beyond_the_edge_has_no_label_and_the_mean_colour() -> None:
    mask = torch.ones(40, 50, dtype=torch.uint8)
    pixels, labels, confidence = sample(
        mask, 0, crop=100, short_side=40, long_side=50, photometric=False, flip=False
    )
    assert (labels[:40, :50] == 1).all()
    assert (labels == 255).sum() == 100 * 100 - 40 * 50 == (confidence == 0).sum()
    assert (pixels[:, 40:] == 0).all()
    assert (pixels[:, :, 50:] == 0).all()
