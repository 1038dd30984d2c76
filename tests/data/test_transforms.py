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
    CLIP_STATISTICS,
    PixelStatistics,
    clip_input_size,
    normalise,
    prepare_image,
    resize,
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
def test_larger_images_keep_area_and_aspect(size: tuple[int, int], patch: int) -> None:
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
    resized = resize(image, 80, 64)
    expected = (
        Image.open(GOLDEN / "images" / "tiny_odd.png")
        .convert("RGB")
        .resize((80, 64), Image.Resampling.BICUBIC)
    )
    assert resized.dtype == np.uint8
    assert np.array_equal(resized, np.array(expected))
    assert np.array_equal(resize(image, 67, 49), image)


def test_a_grey_image_resized_in_colour_equals_one_resized_in_grey() -> None:
    path = GOLDEN / "images" / "camera_gray.png"
    expected = Image.open(path).resize((80, 112), Image.Resampling.BICUBIC).convert("RGB")
    assert np.array_equal(resize(read_image(path), 80, 112), np.array(expected))


@pytest.mark.parametrize(
    "statistics", [CLIP_STATISTICS, PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def test_normalising_has_the_bits_of_the_formula_in_float32(statistics: PixelStatistics) -> None:
    image = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    tensor = normalise(image, statistics)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, (pixels - mean) / std)


@pytest.mark.parametrize(
    ("size", "prepared", "scale"),
    [
        ((64, 48), (32, 16), 0.5),
        ((48, 64), (16, 32), 0.5),
        ((15, 17), (16, 32), 1.0),
        ((16, 16), (16, 16), 1.0),
    ],
)
def test_an_image_is_prepared_at_the_size_and_scale_of_clips_input(
    size: tuple[int, int], prepared: tuple[int, int], scale: float
) -> None:
    """Sizes are (H, W) of the image and of what CLIP gets."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    statistics = PixelStatistics((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    found = prepare_image(image, 16, 768, statistics)
    height, width = prepared
    assert torch.equal(found.pixels, normalise(resize(image, width, height), statistics))
    assert found.scale == scale
    with_clips_own = prepare_image(image, 16, 768).pixels
    assert torch.equal(with_clips_own, normalise(resize(image, width, height), CLIP_STATISTICS))
