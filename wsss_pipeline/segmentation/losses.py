"""Losses of stage two: cross entropy on pseudo masks, guided by their confidence; those of networks on frozen CLIP.

Where a batch is spread over several processes, each calls a loss with its own pictures and gets its part: the parts
add up to the loss of the whole batch, and so do their gradients. ``total`` is all that the processes exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.masks import CERTAIN, IGNORE, half_percent_threshold
from wsss_pipeline.segmentation.train_config import Confidence

Total = Callable[[Tensor], Tensor]


def _of_one_process(sums: Tensor) -> Tensor:
    return sums


def _at_least_single(values: Tensor) -> Tensor:
    """Half precision is too coarse to sum in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def confidence_weights(confidence: Tensor, kind: Confidence, min_confidence: float) -> Tensor:
    """Weight of each pixel in the loss, float32 (B, H, W).

    Args:
        confidence: uint8 (B, H, W), half percents.
        kind: ``hard``: 1 from ``min_confidence`` up, else 0 (CLIP-ES, section 3.5, where such pixels are set
            to the ignore label); ``soft``: the confidence from ``min_confidence`` up, else 0.
        min_confidence: threshold in [0, 1].
    """
    counts = (confidence >= half_percent_threshold(min_confidence)).float()
    return counts if kind == "hard" else confidence.float() / CERTAIN * counts


def segmentation_loss(
    outputs: Mapping[str, Tensor],
    target: Tensor,
    weights: Tensor,
    *,
    balanced: bool = False,
    total: Total = _of_one_process,
) -> Tensor:
    """Sum over the logits of the weighted mean cross entropy; 0 with zero gradient where no pixel counts.

    Args:
        outputs: those whose name starts with ``logits``, at least one, are logits (B, 1+C, h, w), each of its own
            size; target and weights are brought to it by taking the nearest pixel. Others don't take part.
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        weights: float (B, H, W), at least 0.
        balanced: background and foreground pixels each make up half of the mean, whatever their numbers
            (where one of the two doesn't occur, its half is 0, as in ExCEL's code; WeCLIP's gives NaN).
        total: turns this process's sums of weights into those of all processes, for one mean over a batch
            that is spread over several.
    """
    losses = []
    for name, logits in outputs.items():
        if not name.startswith("logits"):
            continue
        labels, shares, size = target, weights, logits.shape[-2:]
        if labels.shape[-2:] != size:
            # exact: plain nearest lies half a cell beside the logits. uint8, for interpolate takes no wider integers
            planes = (labels[:, None].to(torch.uint8), shares[:, None])
            labels, shares = (F.interpolate(x, size=size, mode="nearest-exact")[:, 0] for x in planes)
            labels = labels.long()
        labelled = labels != IGNORE
        entropy = F.cross_entropy(_at_least_single(logits), labels, ignore_index=IGNORE, reduction="none")
        parts = [labels == 0, (labels != 0) & labelled] if balanced else [labelled]
        sums = torch.stack([(shares * entropy * part).sum() for part in parts])
        counts = total(torch.stack([(shares * part).sum() for part in parts]).detach())
        losses.append((sums / torch.where(counts > 0, counts, torch.ones_like(counts))).mean())
    return torch.stack(losses).sum()
