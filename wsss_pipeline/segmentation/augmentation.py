"""Random scale, crop, flip and colour, jointly for image, mask and confidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from wsss_pipeline.data.masks import IGNORE
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
            mask: uint8 (H, W), 255 where there is no label.
            confidence: uint8 (H, W).

        Returns:
            float32 (3, S, S) normalised, uint8 (S, S) and uint8 (S, S), S the crop; beyond the image's edge the
            mean colour, 255 and 0.
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
            for plane, fill in ((pixels, 0), (planes[0], IGNORE), (planes[1], 0))
        ]
        if config.flip and torch.rand(()).item() < 0.5:
            planes = [plane.flip(-1) for plane in planes]
        return planes[0], planes[1][0], planes[2][0]
