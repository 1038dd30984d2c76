"""What a network learns by: the losses that the settings name, weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from wsss_pipeline.data.masks import ignore_value
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
from wsss_pipeline.segmentation.weakclip_losses import (
    Pictures,
    boundary_loss,
    crf_pictures,
    crf_posterior,
    grid_probabilities,
    score_loss,
    seeding_loss,
    without_absent,
)


def weighted_losses(
    outputs: Mapping[str, Any],
    target: Tensor,
    confidence: Tensor,
    config: TrainConfig,
    update: int,
    total: Callable[[Tensor], Tensor],
    pictures: Pictures | None = None,
) -> dict[str, Tensor]:
    """This process's part of each loss, by name; their sum is what is learnt by.

    Args:
        outputs: what the network made of a batch, see ``SegmentationNetwork.training_outputs``.
        target: int64 (B, H, W), 0..C, ``ignore_value`` of 1+C where there is no label.
        confidence: uint8 (B, H, W), half percents.
        config: settings.
        update: number of the update, from 1.
        total: see ``losses``.
        pictures: what the crops are; needed where the settings weigh seeding, boundary or score.
    """
    chosen, online = config.loss, config.online
    weights = confidence_weights(confidence, chosen.confidence, chosen.threshold)
    if "queries" in outputs:
        return query_losses(outputs["queries"], target, weights, total=total)
    if chosen.restrict_to_labels and pictures is not None:
        target = without_absent(target, pictures.present)
    ignore = ignore_value(outputs["logits"].shape[1])
    counted = target.masked_fill(weights == 0, ignore)
    labels = target
    if 0 < online.override_from <= update:
        labels = override_labels(target, outputs["logits"], online.override_above)
    found = {}
    if chosen.segmentation:
        loss = segmentation_loss(outputs, labels, weights, balanced=chosen.balanced, total=total)
        found["segmentation"] = chosen.segmentation * loss
    if "auxiliary" in outputs:
        loss = segmentation_loss(
            {"logits": outputs["auxiliary"]}, labels, weights, balanced=chosen.balanced, total=total
        )
        found["auxiliary"] = outputs["auxiliary_weight"] * loss
    if chosen.affinity:
        pairs = counted
        if 0 < online.self_affinity_from <= update:
            pairs = outputs["logits"].argmax(dim=1).masked_fill(target == ignore, ignore)
        same = affinity_labels(pairs, outputs["encoded"].features.grid, chosen.affinity_radius, ignore)
        loss = affinity_loss(outputs["similarity"].sigmoid(), same, total=total)
        found["affinity"] = chosen.affinity * loss
    if chosen.dice:
        loss = dice_loss(outputs["logits"], labels.masked_fill(weights == 0, ignore), total=total)
        found["dice"] = chosen.dice * loss
    if chosen.cross:
        branches = outputs["clip_logits"], outputs["dino_logits"]
        found["cross"] = chosen.cross * cross_pseudo_loss(*branches, target != ignore, total=total)
    if not (chosen.seeding or chosen.boundary or chosen.score):
        return found
    assert pictures is not None
    count = total(pictures.counted.sum()[None].float())[0].clamp(min=1)
    if chosen.seeding or chosen.boundary:
        probability = grid_probabilities(outputs["logits"], chosen.grid)
    if chosen.seeding:
        found["seeding"] = chosen.seeding * seeding_loss(probability, labels, weights, count)
    if chosen.boundary:
        present = pictures.present if chosen.restrict_to_labels else None
        posterior = crf_posterior(crf_pictures(pictures, chosen.grid), probability.detach(), present)
        loss = boundary_loss(probability, posterior, pictures.counted, count)
        found["boundary"] = chosen.boundary * loss
    if chosen.score:
        found["score"] = chosen.score * score_loss(outputs["score"], labels, weights, count)
    return found
