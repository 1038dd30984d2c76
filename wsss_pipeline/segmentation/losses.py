"""Losses of stage two: cross entropy on pseudo masks, guided by their confidence; those of networks on frozen CLIP.

Where a batch is spread over several processes, each calls a loss with its own pictures and gets its part: the parts
add up to the loss of the whole batch, and so do their gradients. ``total`` is all that the processes exchange.

Where there is no label a target is 255, and 65,535 with more than 255 outputs, see ``ignore_value``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.masks import CERTAIN, IGNORE, half_percent_threshold, ignore_value
from wsss_pipeline.segmentation.network import tiles
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
        ignore = ignore_value(logits.shape[1])
        if labels.shape[-2:] != size:
            # exact: plain nearest lies half a cell beside the logits. interpolate takes no integers wider than uint8
            planes = (labels[:, None].to(torch.uint8 if ignore == IGNORE else torch.float32), shares[:, None])
            labels, shares = (F.interpolate(x, size=size, mode="nearest-exact")[:, 0] for x in planes)
            labels = labels.long()
        labelled = labels != ignore
        entropy = F.cross_entropy(_at_least_single(logits), labels, ignore_index=ignore, reduction="none")
        parts = [labels == 0, (labels != 0) & labelled] if balanced else [labelled]
        sums = torch.stack([(shares * entropy * part).sum() for part in parts])
        counts = total(torch.stack([(shares * part).sum() for part in parts]).detach())
        losses.append((sums / torch.where(counts > 0, counts, torch.ones_like(counts))).mean())
    return torch.stack(losses).sum()


def affinity_labels(mask: Tensor, grid: tuple[int, int], radius: int, ignore: int = IGNORE) -> Tensor:
    """Whether two patches show the same class, uint8 (B, hw, hw): 1 the same, 0 another, 255 not to be learnt from.

    255 is where one of the two has no label, and where they lie further apart than ``radius``. A patch and itself are
    a pair as well (WeCLIP and ExCEL, as published in code).

    Args:
        mask: int64 or uint8 (B, H, W), pseudo labels, ``ignore`` where there is none. The patch at (y, x) has the
            label of pixel (floor(y H / h), floor(x W / w)).
        grid: numbers (h, w) of patches; they are counted row by row.
        radius: largest distance of two patches, the larger of those along rows and columns; published: 8.
        ignore: value of a pixel without a label.
    """
    (height, width), (h, w) = mask.shape[-2:], grid
    rows, columns = (torch.arange(side, device=mask.device) for side in grid)
    patches = mask[:, rows[:, None] * height // h, columns * width // w].flatten(1)
    labels = (patches[:, :, None] == patches[:, None, :]).view(torch.uint8)
    far_rows, far_columns = ((place[:, None] - place).abs() > radius for place in (rows, columns))
    far = (far_rows[:, None, :, None] | far_columns[None, :, None, :]).view(h * w, h * w)
    unlabelled = patches == ignore
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
    counted = (
        probability if count_ignored else probability * (target != ignore_value(logits.shape[1]))[:, None]
    )
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
        labels = teacher.detach().argmax(dim=1).masked_fill(~valid, ignore_value(teacher.shape[1]))
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
    is_sure = (probability > threshold) & (mask != ignore_value(logits.shape[1]))
    return torch.where(is_sure, label.to(mask.dtype), mask)


@dataclass(frozen=True)
class QueryLoss:
    """How queries learn, from a model's configuration.

    Attributes:
        class_weight, mask_weight, dice_weight: weights of the three losses, and in the matching.
        no_object_weight: weight of a query that no segment was given to, in the loss of the classes.
        points: number of points that the published loss draws in a mask; here what the ones in Dice's fraction are
            measured by.
        uncertain_weight: share of a mask's loss that its most uncertain cells make up.
        uncertain_share: share of the cells that are those.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float
    no_object_weight: float
    points: int
    uncertain_weight: float
    uncertain_share: float


@dataclass(frozen=True)
class Queries:
    """What a mask classification network made of a batch.

    Attributes:
        layers: of each layer that predicts, logits of the classes (N, Q, 1+C+1), the last one of no object, and of
            the masks (N, Q, h, w).
        size: rows and columns of the padded images.
        side: side of the tiles that they were cut into, N in all; None where N images were seen whole.
        loss: how they learn.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    size: tuple[int, int]
    side: int | None
    loss: QueryLoss


@dataclass(frozen=True)
class _Segments:
    """What an image's queries are to find: one segment for each class that counts somewhere, background included.

    Attributes:
        classes: int64 (M,), 0..C.
        masks: float32 (M, hw), share of a cell's weight that is the segment's, in [0, 1].
        weight: float32 (hw,), of the cells, the mean of their pixels'; 0 where none has a label.
        shares: float32 (M,), mean weight of a segment's pixels.
        covered: float32 (), mean weight of all pixels.
    """

    classes: Tensor
    masks: Tensor
    weight: Tensor
    shares: Tensor
    covered: Tensor


def _segments(target: Tensor, weights: Tensor, size: tuple[int, int], ignore: int) -> _Segments:
    """Segments of an image's labels (H, W), ``ignore`` where there is none, on a grid of h x w cells."""
    counted = weights * (target != ignore)
    classes = torch.unique(target[counted > 0])
    planes = counted * (target == classes[:, None, None])
    cells = (
        F.adaptive_avg_pool2d(planes, size).flatten(1)
        if len(classes)
        else planes.new_zeros(0, size[0] * size[1])
    )
    weight = cells.sum(dim=0)
    shares = planes.sum(dim=(1, 2)) / (planes > 0).sum(dim=(1, 2))
    return _Segments(classes, cells / torch.where(weight > 0, weight, 1.0), weight, shares, counted.mean())


def _matched(classes: Tensor, masks: Tensor, segments: _Segments, loss: QueryLoss) -> tuple[Tensor, Tensor]:
    """Numbers of queries and of the segments that they are given, by the least cost of all (Hungarian matching).

    Args:
        classes: logits (Q, 1+C+1).
        masks: logits (Q, hw).
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    weight = segments.weight / segments.weight.sum()
    true, probability = segments.masks * weight, masks.sigmoid()
    entropy = F.softplus(-masks) @ true.T + F.softplus(masks) @ (weight - true).T
    overlap, union = probability @ true.T, (probability @ weight)[:, None] + true.sum(dim=1)
    dice = 1 - (2 * loss.points * overlap + 1) / (loss.points * union + 1)
    cost = loss.mask_weight * entropy + loss.dice_weight * dice
    cost = cost - loss.class_weight * classes.softmax(dim=-1)[:, segments.classes]
    pairs = linear_sum_assignment(cost.nan_to_num(1e30, 1e30, 1e30).cpu().numpy())
    query, segment = (torch.as_tensor(numbers, device=masks.device) for numbers in pairs)
    return query, segment


def _of_masks(masks: Tensor, true: Tensor, weight: Tensor, loss: QueryLoss) -> tuple[Tensor, Tensor]:
    """Cross entropy and Dice loss of each mask (M,).

    The published loss draws points at random, most of them where the mask is uncertain. These are its values as
    expected over that draw: of a mask's points, ``uncertain_weight`` fall into the cells with the smallest logits, a
    share of ``uncertain_share``, the others anywhere.

    Args:
        masks: logits (M, hw).
        true: (M, hw) in [0, 1].
        weight: (hw,), of the cells; those with 0 take no part.
    """
    counted = weight > 0
    distance = masks.detach().abs().masked_fill(~counted, torch.inf)
    order = distance.argsort(dim=1, stable=True).argsort(dim=1)
    uncertain = weight * ((order < loss.uncertain_share * counted.sum()) & counted)
    drawn = uncertain.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    share = loss.uncertain_weight * uncertain / drawn + (1 - loss.uncertain_weight) * weight / weight.sum()
    entropy = (share * F.binary_cross_entropy_with_logits(masks, true, reduction="none")).sum(dim=1)
    probability = masks.sigmoid()
    overlap, union = (share * probability * true).sum(dim=1), (share * (probability + true)).sum(dim=1)
    return entropy, 1 - (2 * loss.points * overlap + 1) / (loss.points * union + 1)


def query_losses(
    queries: Queries, target: Tensor, weights: Tensor, *, total: Total = _of_one_process
) -> dict[str, Tensor]:
    """Losses of a mask classification network, summed over its layers: ``class``, ``mask`` and ``dice``.

    Segments and queries are matched anew for each layer. What is published (Cheng et al., "Mask2Former", CVPR 2022,
    section 3.2 and appendix A) is kept, with pixel weights w and without random points:

    - a cell of the masks' grid weighs as much as its pixels on average, and what is true of it is the weighted share
      of the segment: the cross entropy is that of all pixels, each times its w. Pixels without a label have w 0, and
      no part in masks, Dice or matching;
    - a segment, with its query, weighs s, the mean w of its pixels: ``mask`` and ``dice`` are sums of s times a
      segment's loss over the sum of s;
    - ``class`` is the weighted mean over all queries of the cross entropy: s for a query with a segment,
      ``no_object_weight`` times the mean w of the image for one without. An image in which nothing counts has
      no part in it, and all three are 0 with zero gradient where the whole batch is such.

    Args:
        queries: what the network made of the batch.
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        weights: float (B, H, W), at least 0.
        total: see :func:`segmentation_loss`.
    """
    below, right = (size - side for size, side in zip(queries.size, target.shape[-2:], strict=True))
    # padding weighs nothing, whatever its label
    labels, weights = (F.pad(plane[:, None], (0, right, 0, below)) for plane in (target, weights))
    if queries.side is not None:
        labels, weights = tiles(labels, queries.side), tiles(weights, queries.side)
    height, width = queries.layers[0][1].shape[-2:]
    ignore = ignore_value(queries.layers[0][0].shape[-1] - 1)
    planes = zip(labels[:, 0], weights[:, 0], strict=True)
    images = [_segments(*pair, (height, width), ignore) for pair in planes]
    loss, sums, counts = queries.loss, [], []
    for layer in queries.layers:
        classes, masks = _at_least_single(layer[0]), _at_least_single(layer[1]).flatten(2)
        # zero, but all that distributed training waits for has a gradient
        nothing = masks.new_zeros(3) + 0 * masks[:, :0].sum()
        of_classes, of_masks = [nothing[:2]], [nothing]
        for class_logits, mask_logits, image in zip(classes, masks, images, strict=True):
            answer = torch.full_like(class_logits[:, 0], class_logits.shape[1] - 1, dtype=torch.long)
            weight = image.covered * torch.full_like(class_logits[:, 0], loss.no_object_weight)
            if len(image.classes):
                with torch.no_grad():
                    query, segment = _matched(class_logits, mask_logits, image, loss)
                share = image.shares[segment]
                answer[query], weight[query] = image.classes[segment], share
                found = _of_masks(mask_logits[query], image.masks[segment], image.weight, loss)
                of_masks.append(torch.stack([*found, torch.ones_like(share)]) @ share)
            entropy = F.cross_entropy(class_logits, answer, reduction="none")
            of_classes.append(torch.stack([entropy @ weight, weight.sum()]))
        class_sum, class_count = torch.stack(of_classes).sum(dim=0)
        mask_sum, dice_sum, mask_count = torch.stack(of_masks).sum(dim=0)
        sums.append(torch.stack([class_sum, mask_sum, dice_sum]))
        counts.append(torch.stack([class_count, mask_count, mask_count]).detach())
    count = total(torch.stack(counts))
    means = (torch.stack(sums) / torch.where(count > 0, count, 1.0)).sum(dim=0)
    return {
        "class": loss.class_weight * means[0],
        "mask": loss.mask_weight * means[1],
        "dice": loss.dice_weight * means[2],
    }
