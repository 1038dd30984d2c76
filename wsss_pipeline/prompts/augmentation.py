"""Crops to learn prompts from: colours, scale, crop, mirror, in this order.

Source: FMA-WSSS (Yang and Gong, WACV 2024), as its published code computes them: OpenCV's colours on 8 bits, then
Pillow's bicubic filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss_pipeline.data.transforms import CLIP_STATISTICS, PixelStatistics, normalise, resize
from wsss_pipeline.prompts.config import CropConfig


@dataclass(frozen=True)
class PromptAugmentation:
    """Draws from torch's own random numbers, so whoever seeds them decides what comes out.

    Attributes:
        config: settings, see ``CropConfig``.
        statistics: mean and standard deviation of CLIP's pixels.
    """

    config: CropConfig
    statistics: PixelStatistics = CLIP_STATISTICS

    @property
    def crop(self) -> int:
        """Side of the square, pixels."""
        return self.config.crop

    def __call__(self, image: Tensor, mask: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training sample.

        Args:
            image: uint8 (3, H, W) RGB.
            mask: uint8 (H, W).
            confidence: uint8 (H, W).

        Returns:
            float32 (3, S, S) with CLIP's statistics, uint8 (S, S) and uint8 (S, S), S the crop.
        """
        config = self.config
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        if config.colours:
            pixels = varied_colours(pixels)
        height, width = mask.shape
        long = int(torch.randint(config.long_min, config.long_max + 1, ()).item())
        scale = max(long / max(height, width), config.crop / min(height, width))
        width, height = (max(config.crop, round(side * scale)) for side in (width, height))
        planes: list[NDArray[Any]] = [
            resize(pixels, width, height),
            *(
                np.asarray(Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.NEAREST))
                for plane in (mask, confidence)
            ),
        ]
        top, left = (int(torch.randint(side - config.crop + 1, ()).item()) for side in (height, width))
        planes = [plane[top : top + config.crop, left : left + config.crop] for plane in planes]
        if config.flip and torch.rand(()).item() < 0.5:
            planes = [plane[:, ::-1] for plane in planes]
        labels, certainty = (torch.from_numpy(plane.copy()) for plane in planes[1:])
        return normalise(planes[0], self.statistics), labels, certainty


def varied_colours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) RGB with brightness, contrast, saturation and hue changed, each with probability 0.5.

    In random order. Values are rounded, saturated, and reflected at 0, in hue as well: full-range HSV, no circle.
    """
    pixels: Any = image  # OpenCV doesn't say that its results are uint8 again
    for change in torch.randperm(4).tolist():
        if torch.rand(()).item() >= 0.5:
            continue
        share = torch.rand(()).item()
        if change == 0:
            pixels = cv2.convertScaleAbs(pixels, alpha=1.0, beta=50 * share - 25)
        elif change == 1:
            pixels = cv2.convertScaleAbs(pixels, alpha=0.6 + 0.8 * share)
        else:
            hue, saturation, value = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL))
            if change == 2:
                saturation = cv2.convertScaleAbs(saturation, alpha=0.5 + share)
            else:
                hue = cv2.convertScaleAbs(hue, beta=50 * share - 25)
            pixels = cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL)
    found: NDArray[np.uint8] = pixels
    return found
