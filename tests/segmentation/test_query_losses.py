"""What queries learn by: the published loss, without random points, and without pixels that have no label."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.segmentation.losses import Queries, QueryLoss, query_losses

PUBLISHED = QueryLoss(2.0, 5.0, 5.0, 0.1, 12544, 0.75, 0.25)
PLAIN = replace(PUBLISHED, uncertain_weight=0.0)


def queries(
    count: int = 2,
    number: int = 6,
    side: int = 16,
    scale: int = 1,
    loss: QueryLoss = PUBLISHED,
    seed: int = 0,
) -> Queries:
    """Random answers of two layers, of four classes with the background."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(2):
        classes = torch.randn(count, number, 5, generator=generator)
        masks = 3 * torch.randn(count, number, 4, 4, generator=generator)
        masks = F.interpolate(masks, size=(side, side), mode="bicubic")
        layers.append((classes.requires_grad_(), masks.requires_grad_()))
    return Queries(layers, (side * scale, side * scale), None, loss)


def labels(count: int = 2, side: int = 16, seed: int = 1) -> Tensor:
    """Quarters of pictures."""
    found = torch.randint(0, 4, (count, 2, 2), generator=torch.Generator().manual_seed(seed))
    return found.repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2)


def values(found: dict[str, Tensor]) -> list[float]:
    return [value.item() for value in found.values()]


@pytest.mark.parametrize("loss", [PUBLISHED, PLAIN])
def test_it_is_what_the_library_draws_on_average(loss: QueryLoss) -> None:
    """Of a million points; theirs are between the cells as well, so the masks are flat but for steps."""
    from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    torch.manual_seed(0)
    side, target = 128, labels(side=128)
    whole = queries(side=4)
    layers = [
        (classes.detach(), masks.detach().repeat_interleave(32, 2).repeat_interleave(32, 3))
        for classes, masks in whole.layers
    ]
    points = 200_000
    settings = Mask2FormerConfig(
        num_labels=4,
        train_num_points=points,
        importance_sample_ratio=loss.uncertain_weight,
    )
    theirs = Mask2FormerLoss(settings, {})
    classes = [torch.unique(one) for one in target]
    masks = [(one == present[:, None, None]).float() for one, present in zip(target, classes, strict=True)]
    expected = [0.0, 0.0, 0.0]
    for class_logits, mask_logits in layers:
        found = theirs(mask_logits, class_logits, masks, classes)
        for place, (name, weight) in enumerate(
            (("loss_cross_entropy", 2), ("loss_mask", 5), ("loss_dice", 5))
        ):
            expected[place] += weight * found[name].item()
    ours = query_losses(
        Queries(layers, (side, side), None, replace(loss, points=points)), target, torch.ones(2, side, side)
    )
    assert values(ours) == pytest.approx(expected, rel=0.02)
    assert values(ours)[0] == pytest.approx(expected[0], rel=1e-5), "no point is drawn for the classes"


def test_pixels_without_a_label_take_no_part() -> None:
    target, weights = labels(), torch.ones(2, 16, 16)
    target[:, 3:9, 5:] = 255
    answers = queries()
    found = query_losses(answers, target, weights)
    torch.stack(list(found.values())).sum().backward()
    for _, masks in answers.layers:
        assert masks.grad is not None
        assert not masks.grad[:, :, 3:9, 5:].any()
        assert masks.grad[:, :, 9:].any()
    # whatever is said there, and whatever stands there with a weight of 0
    other = Queries([(c, m.detach().clone()) for c, m in answers.layers], (16, 16), None, PUBLISHED)
    for _, masks in other.layers:
        masks[:, :, 3:9, 5:] = 100 * torch.randn(2, 6, 6, 11)
    hidden, few = labels(), torch.ones(2, 16, 16)
    few[:, 3:9, 5:] = 0
    hidden[:, 3:9, 5:] = 3
    assert values(query_losses(other, target, weights)) == pytest.approx(values(found))
    assert values(query_losses(other, hidden, few)) == pytest.approx(values(found))


def test_a_cell_is_worth_its_pixels() -> None:
    """The loss on a grid is that of all pixels, each with its weight, where each has its cell's logit."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, 4, (2, 64, 64), generator=generator)
    target[torch.rand(2, 64, 64, generator=generator) < 0.2] = 255
    weights = torch.rand(2, 64, 64, generator=generator)
    weights[:, :32] /= 20
    coarse = queries(scale=4, loss=PLAIN)
    fine = Queries(
        [(c, m.repeat_interleave(4, 2).repeat_interleave(4, 3)) for c, m in coarse.layers],
        (64, 64),
        None,
        PLAIN,
    )
    one, other = (query_losses(each, target, weights) for each in (coarse, fine))
    assert values(one) == pytest.approx(values(other), rel=1e-5)
    assert values(one) != pytest.approx(values(query_losses(coarse, target, torch.ones(2, 64, 64))), rel=1e-2)


def test_a_segment_weighs_as_much_as_its_pixels_on_average() -> None:
    """Worked out: one picture of two segments, each with one query that leaves no doubt which."""
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, :, 2:] = 1
    weights = torch.ones(1, 4, 4)
    weights[:, :, 2:] = 0.5
    masks = torch.full((1, 2, 4, 4), -2.0)
    masks[0, 0, :, :2] = 2.0
    masks[0, 1, :, 2:] = 4.0
    classes = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]])
    found = query_losses(Queries([(classes, masks)], (4, 4), None, PLAIN), target, weights)
    left, right = (8 / 12, 4 / 12)  # shares of the weight
    of_two, of_four, of_left = (torch.tensor(value).neg().exp().log1p().item() for value in (2.0, 4.0, 2.0))
    zero, one = of_two, left * of_left + right * of_four
    assert found["mask"].item() == pytest.approx(5 * (1 * zero + 0.5 * one) / 1.5, rel=1e-5)
    entropy = -torch.tensor([3.0, 0.0, 0.0]).log_softmax(0)[0].item()
    assert found["class"].item() == pytest.approx(2 * entropy, rel=1e-5)


@pytest.mark.parametrize("batch", ["nothing", "one of two"])
def test_where_nothing_counts_nothing_is_learnt(batch: str) -> None:
    target, weights = labels(), torch.ones(2, 16, 16)
    target[0] = 255
    if batch == "nothing":
        weights[1] = 0
    answers = queries()
    found = query_losses(answers, target, weights)
    torch.stack(list(found.values())).sum().backward()
    for classes, masks in answers.layers:
        assert classes.grad is not None
        assert masks.grad is not None
        assert classes.grad.isfinite().all()
        assert masks.grad.isfinite().all()
        assert not classes.grad[0].any()
        assert not masks.grad[0].any()
        assert bool(classes.grad[1].any()) == (batch != "nothing")
    if batch == "nothing":
        assert values(found) == [0, 0, 0]
    else:
        alone = Queries([(c[1:], m[1:]) for c, m in answers.layers], (16, 16), None, PUBLISHED)
        assert values(found) == pytest.approx(values(query_losses(alone, target[1:], weights[1:])))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    target, weights = labels(), torch.rand(2, 16, 16)
    target[0, :5] = 255
    whole = queries()
    sums: list[Tensor] = []

    def gathered(count: Tensor) -> Tensor:
        sums.append(count)
        return count

    parts = [
        Queries([(c[n : n + 1], m[n : n + 1]) for c, m in whole.layers], (16, 16), None, PUBLISHED)
        for n in range(2)
    ]
    for number, part in enumerate(parts):
        query_losses(part, target[number, None], weights[number, None], total=gathered)
    both = sums[0] + sums[1]
    found = [
        query_losses(part, target[n, None], weights[n, None], total=lambda count: both)
        for n, part in enumerate(parts)
    ]
    expected = query_losses(whole, target, weights)
    for name, value in expected.items():
        assert (found[0][name] + found[1][name]).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("side", [None, 32])
def test_padding_and_tiles_are_no_labels(side: int | None) -> None:
    """Masks of padded pictures, or of their tiles, each with queries of its own."""
    target = labels(side=64)[:, :50, :40]
    padded = torch.full((2, 64, 64), 255)
    padded[:, :50, :40] = target
    answers = replace(queries(count=2 if side is None else 8), size=(64, 64), side=side)
    one, other = (query_losses(answers, each, torch.ones(each.shape)) for each in (target, padded))
    assert values(one) == pytest.approx(values(other))
    if side:
        tiles = torch.cat(
            [padded[n, y : y + 32, x : x + 32][None] for n in (0, 1) for y in (0, 32) for x in (0, 32)]
        )
        cut = replace(answers, size=(32, 32), side=None)
        assert values(one) == pytest.approx(values(query_losses(cut, tiles, torch.ones(8, 32, 32))))


def test_more_segments_than_queries_and_broken_numbers() -> None:
    few = queries(number=2)
    assert all(torch.tensor(values(query_losses(few, labels(), torch.ones(2, 16, 16)))).isfinite())
    broken = queries()
    broken.layers[0][1].data[0] = torch.nan
    assert torch.tensor(values(query_losses(broken, labels(), torch.ones(2, 16, 16)))).isnan().any()
