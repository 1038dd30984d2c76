"""What a network learns by: the losses that the settings name, weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from wsss_pipeline.data.masks import IGNORE
from wsss_pipeline.segmentation.losses import (
    affinity_labels,
    affinity_loss,
    confidence_weights,
    cross_pseudo_loss,
    dice_loss,
    override_labels,
    query_losses,
    segmentation_loss,
)
from wsss_pipeline.segmentation.train_config import TrainConfig


def weighted_losses(
    outputs: Mapping[str, Any],
    target: Tensor,
    confidence: Tensor,
    config: TrainConfig,
    update: int,
    total: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """This process's part of each loss, by name; their sum is what is learnt by.

    Args:
        outputs: what the network made of a batch, see ``SegmentationNetwork.training_outputs``.
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        confidence: uint8 (B, H, W), half percents.
        config: settings.
        update: number of the update, from 1.
        total: see ``losses``.
    """
    chosen, online = config.loss, config.online
    weights = confidence_weights(confidence, chosen.confidence, chosen.min_confidence)
    if "queries" in outputs:
        return query_losses(outputs["queries"], target, weights, total=total)
    counted = target.masked_fill(weights == 0, IGNORE)
    labels = target
    if 0 < online.override_from <= update:
        labels = override_labels(target, outputs["logits"], online.override_above)
    found = {
        "segmentation": segmentation_loss(outputs, labels, weights, balanced=chosen.balanced, total=total)
    }
    if "auxiliary" in outputs:
        loss = segmentation_loss(
            {"logits": outputs["auxiliary"]}, labels, weights, balanced=chosen.balanced, total=total
        )
        found["auxiliary"] = outputs["auxiliary_weight"] * loss
    if chosen.affinity:
        pairs = counted
        if 0 < online.self_affinity_from <= update:
            pairs = outputs["logits"].argmax(dim=1).masked_fill(target == IGNORE, IGNORE)
        same = affinity_labels(pairs, outputs["encoded"].features.grid, chosen.affinity_radius)
        loss = affinity_loss(outputs["similarity"].sigmoid(), same, total=total)
        found["affinity"] = chosen.affinity * loss
    if chosen.dice:
        loss = dice_loss(outputs["logits"], labels.masked_fill(weights == 0, IGNORE), total=total)
        found["dice"] = chosen.dice * loss
    if chosen.cross:
        branches = outputs["clip_logits"], outputs["dino_logits"]
        found["cross"] = chosen.cross * cross_pseudo_loss(*branches, target != IGNORE, total=total)
    return found
