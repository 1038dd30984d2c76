"""Losses of stage two: cross entropy on pseudo masks, guided by their confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def confidence_weights(confidence: Tensor, kind: Literal["hard", "soft"], min_confidence: float) -> Tensor:
    """Weight of each pixel in the loss, float32 (B, H, W).

    Args:
        confidence: float (B, H, W) in [0, 1].
        kind: ``hard``: 1 from ``min_confidence`` up, else 0 (CLIP-ES, section 3.5, where such pixels are set
            to the ignore label); ``soft``: the confidence from ``min_confidence`` up, else 0.
        min_confidence: in [0, 1]. Stored confidences are multiples of 0.005, so 1e-4 of slack lets a
            threshold such as 0.95 mean what it says in floating point.
    """
    counts = confidence >= min_confidence - 1e-4
    return counts.float() if kind == "hard" else confidence.float() * counts


def segmentation_loss(
    outputs: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    *,
    balanced: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Sum over the outputs of the weighted mean cross entropy; 0 with zero gradient where no pixel counts.

    Args:
        outputs: logits (B, 1+C, h, w), each of its own size; target and weights are brought to it by taking
            the nearest pixel.
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        weights: float (B, H, W), at least 0.
        balanced: background and foreground pixels each make up half of the mean, whatever their numbers
            (where one of the two doesn't occur, its half is 0).
        total: turns this process's sums of weights into those of all processes, for one mean over a batch
            that is spread over several.
    """
    return torch.stack([_one(logits, target, weights, balanced, total) for logits in outputs]).sum()


def _one(
    logits: Tensor, target: Tensor, weights: Tensor, balanced: bool, total: Callable[[Tensor], Tensor]
) -> Tensor:
    size = logits.shape[-2:]
    if target.shape[-2:] != size:
        # exact: plain nearest lies half a cell beside the logits. uint8, for interpolate takes no wider integers
        target = F.interpolate(target[:, None].to(torch.uint8), size=size, mode="nearest-exact")[:, 0].long()
        weights = F.interpolate(weights[:, None], size=size, mode="nearest-exact")[:, 0]
    weights = weights * (target != IGNORE)
    entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    masks = [target == 0, (target != 0) & (target != IGNORE)] if balanced else [target != IGNORE]
    sums = torch.stack([(weights * entropy * mask).sum() for mask in masks])
    counts = total(torch.stack([(weights * mask).sum() for mask in masks]).detach())
    means = sums / torch.where(counts > 0, counts, torch.ones_like(counts))
    return means.mean()
