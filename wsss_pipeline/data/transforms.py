"""From a decoded image to CLIP's input.

Source: the published code of CLIP-ES (arXiv 2212.09506): height and width separately to the next multiple
of the patch size, Pillow's bicubic filter on uint8, then CLIP's mean and standard deviation. No crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class PixelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, RGB, for values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", released code.
CLIP_STATISTICS = PixelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# of the images that segmentation networks are pre-trained on
IMAGENET_STATISTICS = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ClipInputSize(NamedTuple):
    """Size of CLIP's input, multiples of the patch size, and by how much the image was scaled down.

    Attributes:
        width, height: pixels.
        scale: factor of each side that brings the image to ``max_pixels``; 1.0 where it fits as it is.
    """

    width: int
    height: int
    scale: float


@dataclass(frozen=True)
class Prepared:
    """An image as CLIP gets it.

    Attributes:
        pixels: float32 (3, h, w), normalised.
        scale: factor of each side at which the refiner sees the image; 1.0 where it fits as it is.
        seen: what the refiner sees in place of the image, of the image's shape times ``scale``: uint8, or float32 in
            0..255 where the refiner takes that; None for the image itself.
    """

    pixels: Tensor
    scale: float = 1.0
    seen: NDArray[Any] | None = None


def prepare_image(
    image: NDArray[np.uint8], patch: int, max_pixels: int, statistics: PixelStatistics = CLIP_STATISTICS
) -> Prepared:
    """An image, uint8 (H, W, 3) RGB, at ``clip_input_size`` and with the pixel statistics given."""
    size = clip_input_size(image.shape[1], image.shape[0], patch, max_pixels)
    return Prepared(normalise(resize(image, size.width, size.height), statistics), size.scale)


def clip_input_size(width: int, height: int, patch: int, max_pixels: int) -> ClipInputSize:
    """The size to which an image goes before CLIP sees it.

    An image of up to ``max_pixels`` pixels goes up to the next multiples of ``patch``. A larger one goes
    to the grid of patches of at most ``max_pixels`` that keeps its aspect best. Either way each side has
    at least one patch, and an image of only one row or column of patches has no more of them than fit
    into ``max_pixels``.
    """
    most = max(1, max_pixels // patch**2)
    if width * height <= max_pixels:
        scale = 1.0
        columns, rows = math.ceil(width / patch), math.ceil(height / patch)
    else:
        scale = math.sqrt(max_pixels / (width * height))
        columns, rows = _grid(width * scale / patch, height * scale / patch, most)
    if rows == 1:
        columns = min(columns, most)
    if columns == 1:
        rows = min(rows, most)
    return ClipInputSize(columns * patch, rows * patch, scale)


def _grid(columns: float, rows: float, most: int) -> tuple[int, int]:
    """Whole columns and rows nearest in aspect to the given ones, with at most ``most`` cells."""
    lowest = max(1, math.floor(columns)), max(1, math.floor(rows))
    candidates = [
        (c, r)
        for c in (lowest[0], lowest[0] + 1)
        for r in (lowest[1], lowest[1] + 1)
        if c * r <= most or (c, r) == lowest
    ]
    # Equal aspects: the larger grid.
    return min(candidates, key=lambda grid: (abs(math.log(grid[0] / grid[1] * rows / columns)), -grid[0]))


def resize(
    image: NDArray[np.uint8],
    width: int,
    height: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) to uint8 (height, width, 3), by default bicubic, with Pillow's rounding."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), resample))


def normalise(image: NDArray[np.uint8], statistics: PixelStatistics) -> Tensor:
    """uint8 (H, W, 3) RGB to float32 (3, H, W), normalised with a mean and standard deviation.

    Each value is looked up in a table of the 256 possible ones, which gives the same bits as computing
    ``(value / 255 - mean) / std`` in float32 at every pixel.
    """
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    tensor = np.empty((3, *image.shape[:2]), dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(*statistics, strict=True)):
        table = (values - np.float32(mean)) / np.float32(std)
        np.take(table, image[..., channel], out=tensor[channel], mode="clip")
    return torch.from_numpy(tensor)


def fitted_size(size: Sequence[int], scale: float, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image in a frame, its aspect kept to rounding (mmcv; WeakCLIP).

    It is as large as the frame allows at ``scale``: neither is its shorter side longer than that of the frame, nor
    its longer one.

    Args:
        size: height and width of the image.
        scale: factor on the sides of the frame, which are cut off to whole pixels.
        short_side: shorter side of the frame at scale 1, pixels.
        long_side: longer side, pixels.
    """
    low, high = sorted(size)
    factor = min(int(long_side * scale) / high, int(short_side * scale) / low)
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width
