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


def affinity_labels(mask: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Whether two patches show the same class, uint8 (B, hw, hw): 1 the same, 0 another, 255 not to be learnt from.

    255 is where one of the two has no label, and where they lie further apart than ``radius``. A patch and itself are
    a pair as well (WeCLIP and ExCEL, as published in code).

    Args:
        mask: int64 or uint8 (B, H, W), pseudo labels, 255 where there is none. The patch at (y, x) has the label of
            pixel (floor(y H / h), floor(x W / w)).
        grid: numbers (h, w) of patches; they are counted row by row.
        radius: largest distance of two patches, the larger of those along rows and columns; published: 8.
    """
    (height, width), (h, w) = mask.shape[-2:], grid
    rows, columns = (torch.arange(side, device=mask.device) for side in grid)
    patches = mask[:, rows[:, None] * height // h, columns * width // w].flatten(1)
    labels = (patches[:, :, None] == patches[:, None, :]).view(torch.uint8)
    far_rows, far_columns = ((place[:, None] - place).abs() > radius for place in (rows, columns))
    far = (far_rows[:, None, :, None] | far_columns[None, :, None, :]).view(h * w, h * w)
    unlabelled = patches == IGNORE
    for ignored in (far, unlabelled[:, :, None], unlabelled[:, None, :]):
        labels.masked_fill_(ignored, IGNORE)
    return labels


def affinity_loss(affinity: Tensor, labels: Tensor, *, total: Total = _of_one_process) -> Tensor:
    """How far affinities are from 1 between patches of one class, and from 0 between those of two.

    Half of sum(1 - affinity) / (n + 1) over the n pairs of the batch that are labelled 1, plus half of
    sum(affinity) / (n + 1) over those labelled 0 (WeCLIP and ExCEL, as published in code). 0 with zero gradient where
    no pair counts.

    Args:
        affinity: float (B, hw, hw) in [0, 1].
        labels: uint8 (B, hw, hw), 1, 0 or 255, as :func:`affinity_labels` gives them.
        total: turns this process's numbers of pairs into those of all processes.
    """
    affinity = _at_least_single(affinity)
    same, different = labels == 1, labels == 0
    sums = torch.stack([((1 - affinity) * same).sum(), (affinity * different).sum()])
    counts = total(torch.stack([same.sum(), different.sum()]).to(sums.dtype))
    return (sums / (counts + 1)).mean()


def dice_loss(
    logits: Tensor, target: Tensor, *, count_ignored: bool = False, total: Total = _of_one_process
) -> Tensor:
    """One minus the mean over classes of the Dice coefficient 2I / (U + 1e-7), in [0, 1] (WeCLIP+, in its code).

    I is the sum, over batch and pixels, of a class's probability where it is the label; U the sum of its probability
    everywhere plus its number of pixels. A class that is no pixel's label has coefficient 0 and no gradient, so the
    loss doesn't reach 0 where one is absent, and is 1 where no pixel has a label.

    Args:
        logits: float (B, 1+C, H, W).
        target: int64 or uint8 (B, H, W), 0..C, 255 where there is no label.
        count_ignored: U takes in the probabilities of pixels without a label, as published, which pushes down there
            every class that occurs elsewhere. Otherwise such pixels have no gradient.
        total: turns this process's sums into those of all processes; its gradient isn't needed.
    """
    probability = _at_least_single(logits).softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=target.device)
    is_label = target[:, None] == classes[:, None, None]
    counted = probability if count_ignored else probability * (target != IGNORE)[:, None]
    space = (0, 2, 3)
    own = torch.stack([(probability * is_label).sum(space), counted.sum(space) + is_label.sum(space)])
    sums = total(torch.cat([own.detach().flatten(), own.new_ones(1)]))
    # the value is of all processes, the gradient of this one's pixels: the others see to theirs
    intersection, union = sums[:-1].view_as(own) + (own - own.detach())
    loss: Tensor = 1 - (2 * intersection / (union + 1e-7)).mean()
    return loss - loss.detach() * (1 - 1 / sums[-1])  # an equal share of the value, the whole gradient


def cross_pseudo_loss(one: Tensor, other: Tensor, valid: Tensor, *, total: Total = _of_one_process) -> Tensor:
    """Cross pseudo supervision: each of two branches learns from the arg max of the other (WeCLIP+, in its code).

    Sum of the two balanced cross entropies. Where a branch predicts no background, or nothing else, the half of what
    it doesn't predict is 0; the published loss is NaN.

    Args:
        one: logits (B, 1+C, H, W).
        other: logits of the same shape.
        valid: bool (B, H, W), False at pixels to leave out.
        total: as in :func:`segmentation_loss`.
    """
    weights = torch.ones_like(valid, dtype=torch.float32)
    losses = []
    for learner, teacher in ((one, other), (other, one)):
        labels = teacher.detach().argmax(dim=1).masked_fill(~valid, IGNORE)
        losses.append(segmentation_loss({"logits": learner}, labels, weights, balanced=True, total=total))
    return losses[0] + losses[1]


def override_labels(mask: Tensor, logits: Tensor, threshold: float) -> Tensor:
    """Pseudo labels, replaced by the network's own where it is sure (WeCLIP+, in its code), of the mask's dtype.

    Pixels without a label stay so: the published masks have none, but here padding is one.

    Args:
        mask: int64 or uint8 (B, H, W), 255 where there is no label.
        logits: float (B, 1+C, H, W).
        threshold: probability in [0, 1] above which the most probable class replaces the label; published: 0.75.
    """
    probability, label = _at_least_single(logits.detach()).softmax(dim=1).max(dim=1)
    is_sure = (probability > threshold) & (mask != IGNORE)
    return torch.where(is_sure, label.to(mask.dtype), mask)
