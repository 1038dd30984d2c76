"""A trained network on one picture of any size: whole or in windows, at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.segmentation.networks import IMAGE_MEAN, IMAGE_STD, SegmentationNetwork


@dataclass(frozen=True)
class InferenceConfig:
    """How a picture goes through the network.

    ``scales``: of the picture's sides. ``flip``: the mirrored picture too. ``window``: side of the square windows,
    half overlapping; None takes the picture whole. ``combine``: ``mean`` of the probabilities, or ``max`` of
    the logits as DeepLabV2's published test does it.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    combine: Literal["mean", "max"] = "mean"

    @property
    def is_single(self) -> bool:
        """Whether the picture is looked at once, as it is."""
        return self.scales == (1.0,) and not self.flip


@torch.no_grad()
def predict_probabilities(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    config: InferenceConfig,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Probabilities float32 (1+C, H, W), background first, summing to 1.

    Args:
        network: in evaluation mode, on ``device``.
        image: uint8 (H, W, 3) RGB.
        config: see there.
    """
    pixels = to_network_input(image).to(device)
    found = [
        _upscaled(network, pixels, scale, mirrored, config.window)
        for scale in config.scales
        for mirrored in ((False, True) if config.flip else (False,))
    ]
    if config.combine == "max":
        combined = torch.stack(found).amax(dim=0).softmax(dim=0)
    else:
        combined = torch.stack([logits.softmax(dim=0) for logits in found]).mean(dim=0)
    return combined.cpu().numpy()


def to_network_input(image: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) RGB to float32 (1, 3, H, W), normalised with ImageNet's mean and standard deviation."""
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    return ((values - mean) / std)[None]


def _upscaled(
    network: SegmentationNetwork, pixels: Tensor, scale: float, mirrored: bool, window: int | None
) -> Tensor:
    """Logits (1+C, H, W) at the size of ``pixels`` (1, 3, H, W)."""
    height, width = pixels.shape[-2:]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    scaled = pixels
    if size != (height, width):
        scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
    if mirrored:
        scaled = scaled.flip(-1)
    logits = network(scaled) if window is None else _in_windows(network, scaled, window)
    if mirrored:
        logits = logits.flip(-1)
    if size != (height, width):
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return logits[0].float()


def _in_windows(network: SegmentationNetwork, pixels: Tensor, window: int) -> Tensor:
    """Mean of the logits of windows that overlap by half; a smaller picture is one window."""
    height, width = pixels.shape[-2:]
    total: Tensor | None = None
    count = pixels.new_zeros(1, 1, height, width)
    for top in _starts(height, window):
        for left in _starts(width, window):
            part = (..., slice(top, top + window), slice(left, left + window))
            logits = network(pixels[part])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[part] += logits
            count[part] += 1
    assert total is not None
    return total / count


def _starts(side: int, window: int) -> Sequence[int]:
    if side <= window:
        return [0]
    return sorted({*range(0, side - window, max(1, window // 2)), side - window})
