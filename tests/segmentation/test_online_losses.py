"""Losses of networks on frozen CLIP: against numbers of the published code, by hand, and over two processes.

The files under tests/golden hold what the published code of WeCLIP, WeCLIP+ and ExCEL computes on CPU in float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.forks import ForkServer
from wsss_pipeline.segmentation.losses import (
    affinity_labels,
    affinity_loss,
    cross_pseudo_loss,
    dice_loss,
    override_labels,
    segmentation_loss,
)
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.train_config import LossConfig, NetworkConfig, OnlineConfig, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden"
GRID, RADIUS = (5, 6), 2


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(value) for key, value in file.items()}


def balanced(logits: Tensor, labels: Tensor) -> float:
    labels = labels.long()
    return segmentation_loss({"logits": logits}, labels, torch.ones(labels.shape), balanced=True).item()


@pytest.mark.parametrize(
    ("start", "loss"), [("self_affinity_from", "affinity"), ("override_from", "segmentation")]
)
def test_the_network_helps_from_the_very_update_that_is_named(start: str, loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, 3, 4, 4, generator=generator)
    features = SimpleNamespace(features=SimpleNamespace(grid=(4, 4)))
    outputs = {
        "logits": logits,
        "similarity": torch.randn(1, 16, 16, generator=generator),
        "encoded": features,
    }
    target, confidence = (
        torch.zeros(1, 4, 4, dtype=torch.int64),
        torch.full((1, 4, 4), 200, dtype=torch.uint8),
    )

    def value(first: int, update: int) -> float:
        online = OnlineConfig.model_validate({start: first})
        network = NetworkConfig(name="frozen-clip", encoder="demo")
        config = TrainConfig(network=network, loss=LossConfig(affinity=1.0))
        config = config.model_copy(update={"online": online})
        return weighted_losses(outputs, target, confidence, config, update, lambda sums: sums)[loss].item()

    alone, helped = value(0, 1), value(1, 1)
    assert alone != helped
    assert [value(2, update) for update in (1, 2, 3)] == [alone, helped, helped]
    assert value(0, 10**6) == alone, "0 is never"


def test_balanced_cross_entropy_is_the_published_one() -> None:
    for method in ("weclip", "excel"):
        stored = golden(f"{method}/functions")
        logits, labels = stored["loss_logits"].float(), stored["loss_label"]
        assert balanced(logits, labels) == pytest.approx(stored["loss_seg"].item(), rel=1e-5)


def test_a_batch_without_background_or_foreground_has_the_other_half_alone() -> None:
    stored = golden("excel/functions")
    logits, labels = stored["loss_logits"].float(), stored["loss_label"]
    no_background = torch.where(labels == 0, 3, labels)
    assert balanced(logits, no_background) == pytest.approx(stored["loss_seg_nobg"].item(), rel=1e-5)
    no_foreground = torch.where(labels == 255, 255, 0)
    assert balanced(logits, no_foreground) == pytest.approx(stored["loss_seg_nofg"].item(), rel=1e-5)
    published = golden("weclip/functions")
    assert published["loss_seg_nobg"].isnan()
    logits, labels = published["loss_logits"].float(), published["loss_label"]
    no_background = torch.where(labels == 0, 3, labels).long()
    expected = F.cross_entropy(logits, no_background, ignore_index=255).item() / 2
    assert balanced(logits, no_background) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "step", ["weclip/step_early", "weclip/step_late", "excel/step_early", "excel/step_lvc", "excel/step_self"]
)
def test_losses_and_pairs_of_a_published_training_step(step: str) -> None:
    stored = golden(step)
    logits = F.interpolate(stored["logits"], size=(96, 96), mode="bilinear", align_corners=False)
    assert balanced(logits, stored["pseudo"]) == pytest.approx(stored["loss_seg"].item(), rel=1e-4)
    pairs = affinity_labels(stored["prediction" if step == "excel/step_self" else "pseudo"], (6, 6), 8)
    assert int((pairs == 1).sum()) + 1 == stored["positives"]
    assert int((pairs == 0).sum()) + 1 == stored["negatives"]


@pytest.mark.parametrize("step", ["early", "late"])
def test_pairs_of_a_published_step_of_weclip_plus(step: str) -> None:
    stored = golden(f"weclip/plus_step_{step}")
    pairs = affinity_labels(stored["pseudo_cam"], (6, 6), 8)
    assert int((pairs == 1).sum()) + 1 == stored["positives"]
    assert int((pairs == 0).sum()) + 1 == stored["negatives"]


def test_affinity_labels_are_the_published_ones() -> None:
    stored = golden("excel/functions")
    assert torch.equal(affinity_labels(stored["affl_pseudo"], (7, 8), 3), stored["affl_label"])
    assert torch.equal(affinity_labels(stored["affl_pseudo"].long(), (7, 8), 8), stored["affl_label_nomask"])
    near = affinity_labels(torch.zeros(1, 320, 320, dtype=torch.uint8), (20, 20), 8)[0] == 1
    packed = np.packbits(near.numpy().astype(np.uint8))
    assert np.array_equal(packed, stored["radius8_20x20"].numpy())


def test_affinity_loss_is_the_published_one() -> None:
    stored = golden("excel/functions")
    affinity, labels = stored["affl_pred"], stored["affl_label"]
    assert affinity_loss(affinity, labels).item() == pytest.approx(stored["affl_loss"].item(), rel=1e-5)
    assert int((labels == 1).sum()) + 1 == stored["affl_pos"]
    assert int((labels == 0).sum()) + 1 == stored["affl_neg"]
    no_negatives = affinity_labels(torch.zeros(1, 112, 135, dtype=torch.uint8), (7, 8), 3)
    expected = stored["affl_loss_onelabel"].item()
    assert affinity_loss(affinity[:1], no_negatives).item() == pytest.approx(expected, rel=1e-5)


def test_pairs_without_a_label_or_too_far_apart_are_ignored() -> None:
    """Three patches in a row, and the pixel of each is its upper left one."""
    mask = torch.full((2, 2, 6), 9)
    mask[0, 0, ::2], mask[1, 0, ::2] = torch.tensor([4, 4, 0]), torch.tensor([0, 255, 0])
    first, second = affinity_labels(mask, (1, 3), 1).tolist()
    assert first == [[1, 1, 255], [1, 1, 0], [255, 0, 1]]
    assert second == [[1, 255, 255], [255, 255, 255], [255, 255, 1]]


def test_dice_is_the_published_one() -> None:
    stored = golden("weclip/plus_functions")
    logits, labels = stored["dice_logits"].float(), stored["dice_label"]
    loss = dice_loss(logits, labels, count_ignored=True)
    assert loss.item() == pytest.approx(stored["dice"].item(), rel=1e-5)
    few = torch.where(labels > 3, 255, labels)
    loss = dice_loss(logits, few, count_ignored=True)
    assert loss.item() == pytest.approx(stored["dice_few_classes"].item(), rel=1e-5)


def test_dice_leaves_out_what_is_predicted_where_there_is_no_label() -> None:
    logits = torch.randn(1, 3, 4, 6, requires_grad=True)
    target = torch.randint(0, 3, (1, 4, 6))
    target[..., 3:] = 255
    loss = dice_loss(logits, target)
    assert loss.item() == pytest.approx(dice_loss(logits[..., :3], target[..., :3]).item())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[..., 3:].any()
    assert gradient[..., :3].any()


def test_dice_of_two_classes_by_hand() -> None:
    logits = torch.tensor([0.8, 0.6]).logit()
    logits = torch.stack([logits, torch.zeros(2)])[None, :, None]
    background, other = 2 * 0.8 / (1.4 + 1), 2 * 0.4 / (0.6 + 1)
    loss = dice_loss(logits, torch.tensor([[[0, 1]]]))
    assert loss.item() == pytest.approx(1 - (background + other) / 2)


def test_branches_learn_from_each_other() -> None:
    one, other = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    valid = torch.rand(2, 4, 4) > 0.3
    loss = cross_pseudo_loss(one, other, valid)
    expected = 0.0
    for learner, teacher in ((one, other), (other, one)):
        label = teacher.argmax(dim=1)
        entropy = F.cross_entropy(learner, label, reduction="none")
        expected += (entropy[valid & (label == 0)].mean() + entropy[valid & (label > 0)].mean()).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for gradient in torch.autograd.grad(loss, (one, other)):
        assert torch.equal(gradient.any(dim=1), valid)


@pytest.mark.parametrize("predicted", [[0], [1, 2]])
def test_a_branch_that_predicts_no_foreground_or_no_background_gives_a_number(predicted: list[int]) -> None:
    one, other = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    other[:, predicted] += 20
    everywhere = torch.ones(2, 4, 4, dtype=torch.bool)
    loss = cross_pseudo_loss(one, other, everywhere)
    loss.backward()
    assert loss.isfinite()
    assert one.grad is not None
    assert one.grad.isfinite().all()
    assert one.grad.any()


def test_the_network_overrides_labels_where_it_is_sure() -> None:
    logits = torch.tensor([0.8, 0.75, 0.74, 0.9]).log()
    logits = torch.stack([torch.tensor([0.2, 0.25, 0.26, 0.1]).log(), logits])[None, :, None]
    for dtype in (torch.uint8, torch.int64):
        mask = torch.tensor([[[0, 0, 0, 255]]], dtype=dtype)
        labels = override_labels(mask, logits, 0.76)
        assert labels.tolist() == [[[1, 0, 0, 255]]]
        assert labels.dtype == dtype
        assert override_labels(mask, logits, 0.745).tolist() == [[[1, 1, 0, 255]]]


def batch() -> dict[str, Tensor]:
    """Three pictures; the labels of the last are few, so that a mean of means isn't the mean."""
    source = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 4, 10, 12, generator=source, dtype=torch.float64) for _ in range(2))
    mask = torch.randint(0, 3, (3, 10, 12), generator=source)
    mask[2, 2:] = 255
    return {"one": one, "other": other, "mask": mask}


def affinity_of(logits: Tensor) -> Tensor:
    patches = F.adaptive_avg_pool2d(logits, GRID).flatten(2)
    return (patches.transpose(1, 2) @ patches).sigmoid()


Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "balanced": lambda one, other, mask, **total: segmentation_loss(
        {"logits": one}, mask, torch.ones(mask.shape), balanced=True, **total
    ),
    "affinity": lambda one, other, mask, **total: affinity_loss(
        affinity_of(one), affinity_labels(mask, GRID, RADIUS), **total
    ),
    "dice": lambda one, other, mask, **total: dice_loss(one, mask, **total),
    "dice_published": lambda one, other, mask, **total: dice_loss(one, mask, count_ignored=True, **total),
    "cross": lambda one, other, mask, **total: cross_pseudo_loss(one, other, mask != 255, **total),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    small = {key: value[1:, ..., :5, :6] for key, value in batch().items()}
    loss = partial(LOSSES[name], other=small["other"], mask=small["mask"])
    assert torch.autograd.gradcheck(loss, small["one"].clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [0, 2, 255])
def test_batches_of_one_label_or_none_give_numbers(name: str, label: int) -> None:
    one, other, mask = batch().values()
    leaf = one.float().requires_grad_()
    loss = LOSSES[name](leaf, other.float(), torch.full_like(mask, label))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert bool(gradient.any()) == (label != 255)
    if label == 255:
        assert loss.item() == pytest.approx(float(name.startswith("dice")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_are_those_of_single(dtype: torch.dtype) -> None:
    """The sum over all pairs is beyond the largest half."""
    logits, mask = torch.randn(4, 5, 64, 64).to(dtype), torch.randint(0, 5, (4, 64, 64))
    assert dice_loss(logits, mask).item() == pytest.approx(dice_loss(logits.float(), mask).item(), rel=1e-6)
    affinity, labels = torch.zeros(4, 400, 400, dtype=dtype), affinity_labels(mask // 5, (20, 20), 20)
    assert affinity_loss(affinity, labels).item() == pytest.approx(0.5, rel=1e-5)


def value_and_gradient(name: str, pictures: slice, **total: Any) -> tuple[float, Tensor]:
    part = {key: value[pictures] for key, value in batch().items()}
    leaf = part.pop("one").clone().requires_grad_()
    loss = LOSSES[name](leaf, **part, **total)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def one_of_two(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")

    def total(sums: Tensor) -> Tensor:
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    pictures = slice(0, 1) if rank == 0 else slice(1, 3)
    torch.save(
        {name: value_and_gradient(name, pictures, total=total) for name in LOSSES}, folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_parts_of_two_processes_add_up_to_the_loss_of_one_and_so_do_their_gradients(
    tmp_path: Path, forks: ForkServer
) -> None:
    codes, _, stderr = forks.run_two(tmp_path, module="tests.segmentation.test_online_losses")
    assert codes == [0, 0], stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in LOSSES:
        value, gradient = value_and_gradient(name, slice(None))
        assert first[name][0] + second[name][0] == pytest.approx(value, rel=1e-6), name
        parts = torch.cat([first[name][1], second[name][1]])
        assert torch.allclose(parts, gradient, rtol=1e-6, atol=1e-12), name


if __name__ == "__main__":
    one_of_two(int(os.environ["RANK"]), Path(sys.argv[1]))
