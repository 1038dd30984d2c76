"""From raw class activation maps to per-pixel scores of background and classes (CLIP-ES, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Part of the method, not a guard against zero: raw maps can be as weak as 1e-12, and the published code
# keeps such a map weak by it.
EPSILON = 1e-7


def min_max(maps: Tensor) -> Tensor:
    """Each map of (K, h, w) shifted to minimum 0 and divided by its maximum plus ``EPSILON``."""
    shifted = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return shifted / (EPSILON + shifted.amax(dim=(-2, -1), keepdim=True))


def normalise_cams(raw: Tensor) -> Tensor:
    """Raw maps (K, h, w) to [0, 1]: twice ReLU and min-max, as the published code does.

    A map without a positive cell stays 0; a very weak one stays below 1 (see ``EPSILON``).
    """
    return min_max(F.relu(min_max(F.relu(raw))))


def upscale_cams(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """CAMs (K, h, w) of any range to float32 (K, H, W) in [0, 1] at ``size`` (H, W).

    Normalised at low resolution and not again after it, as in the published code; bilinear. What speaks against a
    class counts as 0, though only after scaling, as in FMA-WSSS; a map without a positive cell is 0.
    """
    shifted = cams - cams.amin(dim=(-2, -1), keepdim=True).clamp_min(0)
    normalised = shifted / (EPSILON + shifted.amax(dim=(-2, -1), keepdim=True).clamp_min(0))
    return F.interpolate(normalised[None], size=size, mode="bilinear", align_corners=False)[0].clamp_min_(0)


def assemble(cams: Tensor, background_power: float = 1.0) -> Tensor:
    """Scores (1+K, H, W) of background and classes out of CAMs (K, H, W) in [0, 1].

    The background's score is (1 - m)^p, with m the largest class score of the pixel and p ``background_power``.
    """
    background = 1 - cams.amax(dim=0, keepdim=True)
    if background_power != 1:
        background = background**background_power
    return torch.cat([background, cams])
