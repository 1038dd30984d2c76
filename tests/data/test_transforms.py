from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    clip_input_size,
    resize_for_clip,
    to_clip_tensor,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MEGAPIXEL = 1_048_576


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (512, 384)),
        ((16, 32), (16, 32)),
        ((17, 1), (32, 16)),
        ((1, 5000), (16, 5008)),
        ((1024, 1024), (1024, 1024)),
        ((1000, 1048), (1008, 1056)),
        ((1, 1), (16, 16)),
    ],
)
def test_sides_go_up_to_the_next_patch_separately(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert clip_input_size(*size, 16, MEGAPIXEL) == (*expected, 1.0)


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "labels.json").read_text())))
def test_grids_are_those_of_the_published_code(name: str) -> None:
    case = json.loads((GOLDEN / "labels.json").read_text())[name]
    target = clip_input_size(case["width"], case["height"], 16, MEGAPIXEL)
    assert [target.height // 16, target.width // 16] == case["grid"]


@pytest.mark.parametrize(
    "size", [(4000, 3000), (3000, 4000), (1025, 1024), (10_000, 300), (6000, 6000), (1100, 1090)]
)
@pytest.mark.parametrize("patch", [14, 16, 32])
def test_larger_pictures_keep_area_and_aspect(size: tuple[int, int], patch: int) -> None:
    width, height = size
    target = clip_input_size(width, height, patch, MEGAPIXEL)
    assert target.width % patch == target.height % patch == 0
    assert 0.75 * MEGAPIXEL < target.width * target.height <= MEGAPIXEL
    assert target.scale == pytest.approx(math.sqrt(MEGAPIXEL / (width * height)))
    # Half a patch more or less on the shorter side.
    assert target.width / target.height == pytest.approx(width / height, rel=patch / min(target[:2]))


@pytest.mark.parametrize("size", [(10_000_000, 1), (1, 10_000_000), (1_000_000, 1), (1, 1_000_000)])
def test_extreme_aspects_keep_a_patch_each_side_and_stay_bounded(size: tuple[int, int]) -> None:
    target = clip_input_size(*size, 16, MEGAPIXEL)
    assert min(target[:2]) == 16
    assert target.width * target.height <= MEGAPIXEL


def test_a_limit_below_one_patch_still_gives_one() -> None:
    assert clip_input_size(100, 100, 32, 4)[:2] == (32, 32)


def test_resizing_is_pillow_bicubic_on_uint8() -> None:
    image = read_image(GOLDEN / "images" / "tiny_odd.png")
    resized = resize_for_clip(image, 80, 64)
    expected = (
        Image.open(GOLDEN / "images" / "tiny_odd.png")
        .convert("RGB")
        .resize((80, 64), Image.Resampling.BICUBIC)
    )
    assert resized.dtype == np.uint8
    assert np.array_equal(resized, np.array(expected))
    assert np.array_equal(resize_for_clip(image, 67, 49), image)


def test_a_grey_picture_resized_in_colour_equals_one_resized_in_grey() -> None:
    path = GOLDEN / "images" / "camera_gray.png"
    expected = Image.open(path).resize((80, 112), Image.Resampling.BICUBIC).convert("RGB")
    assert np.array_equal(resize_for_clip(read_image(path), 80, 112), np.array(expected))


def test_normalising_has_the_bits_of_the_formula_in_float32() -> None:
    image = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    tensor = to_clip_tensor(image)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float().div(255)
    expected = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, expected)
