"""What prompts are learned by.

Source: FMA-WSSS (Yang and Gong, WACV 2024), section 3.2, as its published code computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.masks import IGNORE


def contrastive_loss(logits: Tensor, present: Tensor) -> Tensor:
    """Mean, over all images and their present classes, of how far the absent classes lead.

    For a present class i it is ``log(1 + sum_j exp(S_j - S_i))`` over the absent classes j; other present classes and
    the background take no part. An image with all classes present or none says nothing.

    Args:
        logits: float (B, C), CLIP's logits of images and classes.
        present: bool (B, C).

    Returns:
        float (), 0 where no image says anything.
    """
    says_something = present.any(dim=1) & ~present.all(dim=1)
    logits, present = logits[says_something], present[says_something]
    absent = logits.masked_fill(present, -torch.inf).logsumexp(dim=1, keepdim=True)
    # not exponentiated: at logits above 88 float32 would overflow
    losses = F.softplus(absent - logits)[present]
    return losses.sum() / max(1, len(losses))


def activation_loss(
    cams: Sequence[Tensor], present: Sequence[Sequence[int]], masks: Tensor, ignore: int = IGNORE
) -> Tensor:
    """How far CAMs are from even activation inside their class's mask and none outside.

    A map's target inside is its own largest value there, at least 0. Raw maps are small (1e-4 to 1e-2), and so is
    this.

    Args:
        cams: per image, float (K, h, w), raw maps of its classes.
        present: per image, mask values of these K classes.
        masks: uint8 or int64 (B, H, W); pixels of ``ignore`` take no part. The maps are scaled to (H, W), bilinearly.

    Returns:
        float (), a mean over all pixels of all maps; 0 without any.
    """
    errors, pixels = [masks.new_zeros((), dtype=torch.float32)], 0
    for maps, values, mask in zip(cams, present, masks, strict=True):
        if not values:
            continue
        scaled = F.interpolate(maps[None], size=mask.shape, mode="bilinear", align_corners=False)[0]
        inside = mask == torch.tensor(values, device=mask.device)[:, None, None]
        outside = ~inside & (mask != ignore)
        largest = (scaled.detach() * inside).amax(dim=(1, 2), keepdim=True).clamp_min(0)
        errors += [((largest - scaled).abs() * inside).sum(), (scaled.relu() * outside).sum()]
        pixels = pixels + (inside | outside).sum()
    return torch.stack(errors).sum() / torch.as_tensor(pixels).clamp_min(1)
