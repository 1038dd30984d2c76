"""From low-resolution CAMs to per-pixel scores of background and classes (CLIP-ES, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.cam.softmax_gradcam import min_max


def upscale_cams(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """CAMs (K, h, w) of any positive range to float32 (K, H, W) in [0, 1] at ``size`` (H, W).

    Normalised at low resolution and not again after it, as in the published code; bilinear.
    """
    return F.interpolate(min_max(cams)[None], size=size, mode="bilinear", align_corners=False)[0]


def assemble(cams: Tensor) -> Tensor:
    """Scores (1+K, H, W) of background and classes out of CAMs (K, H, W) in [0, 1].

    The background's score is one minus the largest class score of the pixel.
    """
    background = 1 - cams.amax(dim=0, keepdim=True)
    return torch.cat([background, cams])
