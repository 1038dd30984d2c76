"""Random scale, crop, flip and colour, jointly for image, mask, confidence: torchvision's way or OpenCV's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from wsss_pipeline.data.masks import IGNORE, WIDE_IGNORE
from wsss_pipeline.data.transforms import fitted_size
from wsss_pipeline.segmentation.train_config import AugmentationConfig


@dataclass(frozen=True)
class Augmentation:
    """Draws from torch's own random numbers, so whoever seeds them decides what comes out.

    Attributes:
        config: settings, see ``AugmentationConfig``.
        mean: RGB, for values in [0, 1], what the network's input is normalised with.
        std: the same.
    """

    config: AugmentationConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop(self) -> int:
        """Side of the square, pixels."""
        return self.config.crop

    def __call__(self, image: Tensor, mask: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training sample.

        Args:
            image: uint8 (3, H, W) RGB.
            mask: uint8 (H, W), 255 where there is no label; or int32, 65,535 there.
            confidence: uint8 (H, W).

        Returns:
            float32 (3, S, S) normalised, the mask (S, S) and uint8 (S, S), S the crop; beyond the image's edge the
            mean colour, no label and 0.
        """
        config = self.config
        height, width = image.shape[-2:]
        factor = config.scale_min + (config.scale_max - config.scale_min) * torch.rand(()).item()
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        # the confidence as well: it belongs to the label that its pixel has. Exact, since plain nearest lies
        # up to half a pixel beside the image
        nearest = v2.InterpolationMode.NEAREST_EXACT
        image = F.resize(tv_tensors.Image(image), size, antialias=True)
        planes = [F.resize(x[None], size, interpolation=nearest) for x in (mask, confidence)]
        if config.photometric:
            image = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(image)
        pixels = F.normalize(F.to_dtype(image, torch.float32, scale=True), list(self.mean), list(self.std))
        # negative where the image is smaller and lies somewhere inside the crop
        top, left = (
            int(torch.randint(min(0, side - config.crop), max(0, side - config.crop) + 1, ()).item())
            for side in size
        )
        beyond = (-left, left + config.crop - size[1], -top, top + config.crop - size[0])  # negative: cut off
        planes = [
            pad(plane.as_subclass(Tensor), beyond, value=fill)
            for plane, fill in ((pixels, 0), (planes[0], _ignored(mask)), (planes[1], 0))
        ]
        if config.flip and torch.rand(()).item() < 0.5:
            planes = [plane.flip(-1) for plane in planes]
        return planes[0], planes[1][0], planes[2][0]


def _ignored(mask: Tensor) -> int:
    return IGNORE if mask.dtype == torch.uint8 else WIDE_IGNORE


CROPS = 10  # that are drawn for their classes, before one is taken as it comes


@dataclass(frozen=True)
class OpenCvAugmentation:
    """As WeakCLIP was trained, in mmsegmentation 0.19: scale, crop, flip, then colour, all on 8 bits.

    Draws from torch's own random numbers, so whoever seeds them decides what comes out.

    Attributes:
        config: settings, see ``AugmentationConfig``.
        mean: RGB, for values in [0, 1], what the network's input is normalised with.
        std: the same.
    """

    config: AugmentationConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop(self) -> int:
        """Side of the square, pixels."""
        return self.config.crop

    def __call__(self, image: Tensor, mask: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Augmentation``; below and on the right of a smaller image lies what is beyond its edge."""
        config = self.config
        scale = uniform(config.scale_min, config.scale_max)
        height, width = fitted_size(image.shape[-2:], scale, config.short_side, config.long_side)
        pixels: Any = cv2.resize(
            np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            (width, height),
            interpolation=cv2.INTER_LINEAR,
        )
        planes = [
            cv2.resize(x.contiguous().numpy(), (width, height), interpolation=cv2.INTER_NEAREST)
            for x in (mask, confidence)
        ]
        for _ in range(1 + CROPS):
            top, left = (integer(0, max(0, side - config.crop) + 1) for side in (height, width))
            place = slice(top, top + config.crop), slice(left, left + config.crop)
            if self._is_mixed(planes[0][place]):
                break
        pixels, *planes = (plane[place] for plane in (pixels, *planes))
        if config.flip and uniform(0, 1) < 0.5:
            pixels, *planes = (plane[:, ::-1] for plane in (pixels, *planes))
        if config.photometric:
            pixels = distorted(np.ascontiguousarray(pixels))
        # by 255 before: rounded as published, which decides over a level that the boundary loss sees
        mean, std = ((255 * np.array(row)).astype(np.float32) for row in (self.mean, self.std))
        normalised = (pixels.astype(np.float32) - mean) / std
        beyond = (0, config.crop - normalised.shape[1], 0, config.crop - normalised.shape[0])
        filled = [
            pad(torch.from_numpy(np.ascontiguousarray(plane)), beyond, value=fill)
            for plane, fill in (
                (normalised.transpose(2, 0, 1), 0),
                (planes[0], _ignored(mask)),
                (planes[1], 0),
            )
        ]
        return filled[0], filled[1], filled[2]

    def _is_mixed(self, mask: NDArray[Any]) -> bool:
        """Whether a crop has several classes, none of which covers too much of what is labelled."""
        if not self.config.largest_share:
            return True
        counts = np.bincount(mask[mask != (IGNORE if mask.dtype == np.uint8 else WIDE_IGNORE)])
        return bool((counts > 0).sum() > 1 and counts.max() < self.config.largest_share * counts.sum())


def distorted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation and hue of an image, uint8 (H, W, 3) RGB, each changed every second time.

    Contrast comes before the two others every second time, else after them (as published). After each step levels are
    cut off to whole ones in 0..255; the hue's circle has 180.
    """
    pixels: Any = image
    if integer(0, 2):
        pixels = _levels(pixels, offset=uniform(-32, 32))
    is_early = integer(0, 2)
    if is_early and integer(0, 2):
        pixels = _levels(pixels, factor=uniform(0.5, 1.5))
    for channel in (1, 0):
        if integer(0, 2):
            colours = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
            if channel:
                colours[..., 1] = _levels(colours[..., 1], factor=uniform(0.5, 1.5))
            else:
                colours[..., 0] = (colours[..., 0].astype(np.int64) + integer(-18, 18)) % 180
            pixels = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)
    if not is_early and integer(0, 2):
        pixels = _levels(pixels, factor=uniform(0.5, 1.5))
    levels: NDArray[np.uint8] = pixels
    return levels


def _levels(levels: NDArray[np.uint8], factor: float = 1.0, offset: float = 0.0) -> NDArray[np.uint8]:
    changed = levels.astype(np.float32) * np.float32(factor) + np.float32(offset)
    return changed.clip(0, 255).astype(np.uint8)


def uniform(low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * torch.rand(()).item()


def integer(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high - 1``."""
    return int(torch.randint(low, high, ()).item())
