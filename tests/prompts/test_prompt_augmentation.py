"""Crops: sizes, that labels stay with their pixels, colours by their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsss_pipeline.data.transforms import CLIP_STATISTICS
from wsss_pipeline.prompts.augmentation import PromptAugmentation, varied_colours
from wsss_pipeline.prompts.config import CropConfig


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """The normalised pixels as 0..255 again."""
    mean, std = (torch.tensor(row)[:, None, None] for row in CLIP_STATISTICS)
    return 255 * (pixels * std + mean)


@pytest.mark.parametrize("size", [(40, 100), (300, 50), (64, 64)])
def test_labels_stay_with_their_pixels(size: tuple[int, int]) -> None:
    config = CropConfig(colours=False, long_min=80, long_max=120, crop=48)
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[:, size[1] // 2 :] = 7
    image = (mask * 30).expand(3, -1, -1).contiguous()
    mirrored = 0
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, labels, certainty = PromptAugmentation(config)(image, mask, mask * 20)
        assert pixels.shape == (3, 48, 48)
        assert torch.equal(certainty, labels * 20)
        # bicubic mixes the colours at the edge alone
        away = (levels(pixels)[0] / 30 - labels).abs() > 1
        assert away.float().mean() < 0.1
        mirrored += int(labels[0, 0] > labels[0, -1])
    assert set(labels.unique().tolist()) <= {0, 7}
    assert mirrored or size[0] > size[1]


def test_the_longer_side_is_drawn_and_the_shorter_never_under_the_crop() -> None:
    """A ramp of 0..255 along the longer side: how much of it is seen says how long that was."""
    ramp = torch.linspace(0, 255, 256).to(torch.uint8).expand(3, 128, -1).contiguous()
    blank = torch.zeros(128, 256, dtype=torch.uint8)
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        config = CropConfig(colours=False, flip=False, long_min=96, long_max=192, crop=32)
        row = levels(PromptAugmentation(config)(ramp, blank, blank)[0])[0, 0]
        seen.append(255 * 31 / float(row[-1] - row[0]))
    assert 90 < min(seen) < 115
    assert 170 < max(seen) < 200
    small = CropConfig(colours=False, flip=False, long_min=32, long_max=32, crop=32)
    row = levels(PromptAugmentation(small)(ramp, blank, blank)[0])[0, 0]
    assert 255 * 31 / float(row[-1] - row[0]) == pytest.approx(64, abs=3), (
        "the shorter side has to hold the crop"
    )


def test_colours_are_reflected_at_0_and_saturated() -> None:
    """Of a dark and a light grey, on which hue and saturation do nothing, brightness and contrast alone are seen."""
    image = np.repeat(np.array([[5, 250]], np.uint8)[..., None], 3, axis=2)
    dark, light = set(), set()
    for seed in range(300):
        torch.manual_seed(seed)
        found = varied_colours(image)
        assert (found == found[..., :1]).all()
        dark.add(int(found[0, 0, 0]))
        light.add(int(found[0, 1, 0]))
    assert min(dark) == 0
    # 5 - 25 is -20, which is 20; 5 + 25 is 30, and times 1.4 it is 42
    assert 28 <= max(dark) <= 42
    assert max(light) == 255
    assert 130 <= min(light) <= 160


def test_hue_saturates_and_grey_is_without_it() -> None:
    red, seen = np.zeros((1, 1, 3), np.uint8), set()
    red[..., 0] = 200
    for seed in range(200):
        torch.manual_seed(seed)
        seen.add(tuple(varied_colours(red)[0, 0].tolist()))
    assert any(green > 60 for _, green, _ in seen), "the hue turns to yellow"
    assert not any(blue > green + 40 for _, green, blue in seen), "and never beyond 0, to violet"
