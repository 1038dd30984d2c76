"""The confidence-guided loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from wsss_pipeline.data.masks import WIDE_IGNORE
from wsss_pipeline.segmentation.losses import (
    confidence_weights,
    dice_loss,
    override_labels,
    segmentation_loss,
)


def test_hard_weights_are_all_or_nothing_and_soft_ones_the_confidence() -> None:
    confidence = torch.tensor([[[190, 189, 200, 0]]], dtype=torch.uint8)
    assert confidence_weights(confidence, "hard", 0.95).tolist() == [[[1, 0, 1, 0]]]
    soft = confidence_weights(confidence, "soft", 0.95)
    assert soft.flatten().tolist() == pytest.approx([0.95, 0, 1, 0])
    assert confidence_weights(confidence, "hard", 0.951).tolist() == [[[0, 0, 1, 0]]]
    assert confidence_weights(confidence, "hard", 0.0).tolist() == [[[1, 1, 1, 1]]]


def logits_for(*probabilities: float) -> torch.Tensor:
    """(1, 2, 1, N): background has the given probability at each pixel."""
    values = torch.tensor(probabilities)
    return torch.stack([values.log(), (1 - values).log()])[None, :, None]


def test_the_mean_is_weighted() -> None:
    logits = logits_for(0.5, 0.25, 0.9)
    target = torch.tensor([[[0, 1, 255]]])
    weights = torch.tensor([[[1.0, 0.5, 1.0]]])
    expected = (math.log(2) + 0.5 * -math.log(0.75)) / 1.5
    assert segmentation_loss({"logits": logits}, target, weights).item() == pytest.approx(expected)
    twice = segmentation_loss({"logits": logits, "logits_max": logits}, target, weights)
    assert twice.item() == pytest.approx(2 * expected)


def test_outputs_that_are_no_logits_take_no_part() -> None:
    logits, target, weights = torch.randn(1, 2, 3, 3), torch.randint(0, 2, (1, 3, 3)), torch.ones(1, 3, 3)
    alone = segmentation_loss({"logits": logits}, target, weights)
    others = {"affinity": torch.rand(1, 9, 9), "logits": logits}
    assert segmentation_loss(others, target, weights) == alone


def test_balanced_gives_background_and_foreground_a_half_each() -> None:
    logits = logits_for(0.5, 0.5, 0.5, 0.25)
    target = torch.tensor([[[0, 0, 0, 1]]])
    weights = torch.ones(1, 1, 4)
    expected = (math.log(2) - math.log(0.75)) / 2
    assert segmentation_loss({"logits": logits}, target, weights, balanced=True).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_nothing_to_learn_from_is_no_loss_and_no_gradient(balanced: bool) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.full((2, 4, 4), 255)
    loss = segmentation_loss({"logits": logits}, target, torch.ones(2, 4, 4), balanced=balanced)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_pixels_without_weight_have_no_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    segmentation_loss({"logits": logits}, torch.ones(1, 2, 2, dtype=torch.long), weights).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=1)[0].gt(0).tolist() == [[True, False], [False, True]]


def test_labels_follow_a_smaller_output_by_nearest_pixel() -> None:
    target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [255, 255, 1, 1], [255, 255, 1, 1]]])
    right = torch.zeros(1, 2, 2, 2)
    right[0, 0, :, 0], right[0, 1, :, 1] = 20, 20
    assert segmentation_loss({"logits": right}, target, torch.ones(1, 4, 4)).item() < 1e-6


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """What several processes do: each its own pixels, divided by the pixels of all."""
    logits, target = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
    target[0, :4] = 255
    weights = torch.rand(4, 5, 5)
    whole = segmentation_loss({"logits": logits}, target, weights)
    counts = (weights * (target != 255)).sum()[None]
    parts = sum(
        segmentation_loss({"logits": logits[part]}, target[part], weights[part], total=lambda sums: counts)
        for part in (slice(0, 1), slice(1, 4))
    )
    assert torch.allclose(torch.as_tensor(parts), whole)


def test_target_and_weights_are_taken_from_the_middle_of_a_cell() -> None:
    """At a third of the size, the pixel in the middle of each 3 x 3 cell counts, not its corner."""
    target = torch.zeros((1, 6, 6), dtype=torch.int64)
    target[0, 1::3, 1::3] = 1
    weights = torch.zeros((1, 6, 6))
    weights[0, 1::3, 1::3] = 0.5
    sure = torch.stack([torch.full((1, 2, 2), -20.0), torch.full((1, 2, 2), 20.0)], dim=1)
    assert segmentation_loss({"logits": sure}, target, weights) < 1e-6
    assert segmentation_loss({"logits": -sure}, target, weights) == pytest.approx(40)
    corners = torch.zeros_like(weights)
    corners[0, ::3, ::3] = 1
    assert segmentation_loss({"logits": -sure}, target, corners) == 0


def test_an_output_of_another_shape_of_the_same_height_is_brought_to_its_size() -> None:
    target = torch.tensor([[[0, 1], [0, 1]]])
    logits = torch.zeros((1, 2, 2, 4))
    logits[0, 1, :, 2:] = 20.0
    logits[0, 0, :, :2] = 20.0
    assert segmentation_loss({"logits": logits}, target, torch.ones((1, 2, 2))) < 1e-6


def test_a_single_pixel_of_small_weight_has_its_whole_mean() -> None:
    target, weights = torch.full((1, 2, 2), 255), torch.full((1, 2, 2), 0.25)
    target[0, 0, 0] = 1
    logits = torch.zeros((1, 2, 2, 2))
    assert segmentation_loss({"logits": logits}, target, weights) == pytest.approx(
        torch.log(torch.tensor(2.0)).item()
    )


@pytest.mark.parametrize("size", [(6, 8), (3, 4)], ids=["of the target's size", "coarser"])
def test_with_more_than_254_classes_the_value_without_a_label_is_65535(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 301, *size, generator=generator)
    target = torch.randint(0, 301, (2, 6, 8), generator=generator)
    target[0, :2], target[1, :4] = 255, WIDE_IGNORE
    weights = torch.ones(2, 6, 8)
    # of two pixels the one behind the middle
    coarse = target if size == (6, 8) else target[:, 1::2, 1::2]
    counted = coarse != WIDE_IGNORE
    expected = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[counted], coarse[counted])
    assert torch.allclose(segmentation_loss({"logits": logits}, target, weights), expected)
    if size == (6, 8):
        whole = dice_loss(logits, target)
        logits[1, :, :4] = torch.randn(301, 4, 8, generator=generator)
        assert torch.equal(dice_loss(logits, target), whole), "no label, no part"
        sure = override_labels(target, 100 * logits, 0.5)
        assert torch.equal(sure == WIDE_IGNORE, target == WIDE_IGNORE)
