"""The losses of WeakCLIP beside the published code's own numbers, and their way into training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.online_golden import largest
from tests.weakclip_golden import GOLDEN, own_names, own_value, published_network
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine.dense_crf_torch import infer_batch
from wsss_pipeline.segmentation import weakclip_losses
from wsss_pipeline.segmentation.network import IMAGE_MEAN, IMAGE_STD
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.train_config import (
    LossConfig,
    OptimisationConfig,
    TrainConfig,
    load_train_config,
)
from wsss_pipeline.segmentation.trainer import learning_rate
from wsss_pipeline.segmentation.weakclip_losses import (
    BOUNDARY_CRF,
    Pictures,
    boundary_loss,
    crf_pictures,
    crf_posterior,
    grid_probabilities,
    score_loss,
    seeding_loss,
    without_absent,
)

LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden data of WeakCLIP"
)
both = pytest.mark.parametrize(
    "folder",
    [GOLDEN / "weakclip", pytest.param(LARGE / "weakclip", marks=needs_large)],
    ids=["small", "large"],
)


def weights_of(config: LossConfig) -> TrainConfig:
    return load_train_config("weakclip/voc12").model_copy(update={"loss": config})


def seen(normalised: Tensor, classes: int, **changes: Any) -> Pictures:
    count = len(normalised)
    plain = {
        "present": torch.zeros(count, classes, dtype=torch.bool),
        "counted": torch.ones(count, dtype=torch.bool),
    }
    return Pictures(normalised, IMAGE_MEAN, IMAGE_STD, **{**plain, **changes})


def published_pixels(images: Any) -> Tensor:
    """uint8 (B, H, W, 3) as published, in their rounding, on which levels that the CRF sees hang."""
    mean, std = (
        torch.tensor([255 * value for value in row])[:, None, None] for row in (IMAGE_MEAN, IMAGE_STD)
    )
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std


@both
def test_seeding_and_boundary_loss_are_the_published_ones(folder: Path) -> None:
    """Of pictures with all labels, background alone, no label, and no background; gradients and posterior too."""
    golden = np.load(folder / "losses.npz")
    is_small = "logits_low" in golden
    leaf = torch.from_numpy(golden["logits_low" if is_small else "logits"]).float().requires_grad_()
    logits = F.interpolate(leaf, (64, 64), mode="bilinear") if is_small else leaf
    mask, step = torch.from_numpy(golden["mask64"]).long(), 4 if is_small else 2
    probability = grid_probabilities(logits, 64)
    posterior = crf_posterior(torch.from_numpy(golden["crf_image"]), probability.detach())
    assert largest(posterior[..., ::step, ::step], torch.from_numpy(golden["crf_posterior"])) < 1e-5
    counted, pictures = torch.ones(4, dtype=torch.bool), torch.tensor(4.0)
    found = {
        "boundary": boundary_loss(probability, posterior, counted, pictures),
        "seeding": seeding_loss(probability, mask, torch.ones(mask.shape), pictures),
    }
    every = 1 if is_small else 2
    for column, (name, loss) in enumerate(found.items()):
        assert float(loss.detach()) == pytest.approx(float(golden[name]), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert largest(gradient[..., ::every, ::every], torch.from_numpy(golden[f"grad_{name}"])) < 1e-8
        for number in range(4):
            own, one = slice(number, number + 1), torch.tensor(1.0)
            alone = (
                boundary_loss(probability[own], posterior[own], counted[own], one)
                if name == "boundary"
                else seeding_loss(probability[own], mask[own], torch.ones(1, 64, 64), one)
            )
            assert float(alone.detach()) == pytest.approx(
                float(golden["per_image"][number, column]), abs=2e-6
            )


@both
def test_the_loss_of_the_score_map_is_the_published_one(folder: Path) -> None:
    golden = np.load(folder / "losses.npz")
    score = torch.from_numpy(golden["score"]).float().requires_grad_()
    mask = torch.from_numpy(golden["score_mask"]).long()
    loss = 0.4 * score_loss(score, mask, torch.ones(mask.shape), torch.tensor(2.0))
    assert (mask == 255).any()
    assert float(loss.detach()) == pytest.approx(float(golden["score_ce"]), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, score)
    assert largest(gradient, torch.from_numpy(golden["grad_score"])) < 1e-7


def test_the_crf_sees_the_published_picture() -> None:
    golden = np.load(GOLDEN / "weakclip" / "golden.npz")
    found = crf_pictures(seen(published_pixels(golden["image"]), 5), 64)
    assert np.array_equal(found, golden["train/crf_image"])


@pytest.fixture
def batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Outputs of a network, a target, and whole confidence."""
    random = torch.Generator().manual_seed(0)
    outputs = {
        "logits": 3 * torch.randn(3, 5, 16, 24, generator=random),
        "score": torch.randn(3, 5, 4, 6, generator=random),
    }
    target = torch.randint(0, 5, (3, 64, 96), generator=random)
    target[:, :8] = 255
    return outputs, target, torch.full_like(target, 200)


WEIGHTS = LossConfig(segmentation=0.0, seeding=1.0, boundary=1.0, score=0.4, grid=16, confidence="hard")


def objectives(
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
    pictures: Pictures,
    loss: LossConfig = WEIGHTS,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Tensor]:
    return weighted_losses(*batch, weights_of(loss), 1, total, pictures)


def images() -> Tensor:
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_parts_of_processes_add_up_to_the_whole(batch: tuple[dict[str, Tensor], Tensor, Tensor]) -> None:
    whole = objectives(batch, seen(images(), 5))
    parts: dict[str, Tensor] = dict.fromkeys(whole, torch.zeros(()))
    for own in (slice(0, 1), slice(1, 3)):
        outputs = {name: value[own] for name, value in batch[0].items()}
        found = objectives(
            (outputs, batch[1][own], batch[2][own]),
            seen(images()[own], 5),
            total=lambda _: torch.tensor([3.0]),
        )
        parts = {name: parts[name] + value for name, value in found.items()}
    assert list(whole) == ["seeding", "boundary", "score"]
    for name, value in whole.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=1e-5)


def test_a_copy_in_the_place_of_a_picture_changes_nothing(
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
) -> None:
    outputs, target, confidence = batch
    two = objectives(
        ({name: value[:2] for name, value in outputs.items()}, target[:2], confidence[:2]),
        seen(images()[:2], 5),
    )
    target[2] = 255
    counted = torch.tensor([True, True, False])
    three = objectives((outputs, target, confidence), seen(images(), 5, counted=counted))
    assert {name: float(value) for name, value in three.items()} == pytest.approx(
        {name: float(value) for name, value in two.items()}, rel=1e-5
    )


def test_where_nothing_counts_losses_are_0_without_gradient(
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
) -> None:
    outputs = {name: value.requires_grad_() for name, value in batch[0].items()}
    target = torch.full_like(batch[1], 255)
    counted = torch.zeros(3, dtype=torch.bool)
    losses = objectives((outputs, target, batch[2]), seen(images(), 5, counted=counted))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert float(total.detach()) == 0
    assert not any(value.grad.any() for value in outputs.values() if value.grad is not None)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_uncertain_pixels_count_as_those_without_label_or_less(
    batch: tuple[dict[str, Tensor], Tensor, Tensor], kind: str
) -> None:
    outputs, target, confidence = batch
    confidence[:, 8:32] = 80
    confidence[:, 32:] = 160
    loss = WEIGHTS.model_copy(update={"min_confidence": 0.5, "confidence": kind})
    found = objectives(batch, seen(images(), 5), loss)
    ignored = target.clone()
    ignored[:, 8:32] = 255
    expected = objectives((outputs, ignored, confidence), seen(images(), 5))
    assert float(found["seeding"]) == pytest.approx(float(expected["seeding"]), rel=1e-5)  # a weighted mean
    factor = 0.8 if kind == "soft" else 1.0  # over all pixels
    assert float(found["score"]) == pytest.approx(factor * float(expected["score"]), rel=1e-5)


def test_classes_that_the_labels_deny_are_learnt_from_neither_mask_nor_crf(
    batch: tuple[dict[str, Tensor], Tensor, Tensor],
) -> None:
    present = torch.zeros(3, 5, dtype=torch.bool)
    present[0, 2] = present[1, 1] = True
    labels = without_absent(batch[1], present)
    assert [sorted(one.unique().tolist()) for one in labels] == [
        [0, 2, 255],
        [0, 1, 255],
        [0, 1, 2, 3, 4, 255],
    ]
    loss = WEIGHTS.model_copy(update={"restrict_to_labels": True})
    found = objectives(batch, seen(images(), 5, present=present), loss)
    by_hand = objectives((batch[0], labels, batch[2]), seen(images(), 5))
    assert float(found["seeding"]) == pytest.approx(float(by_hand["seeding"]))
    assert float(found["boundary"]) != pytest.approx(float(by_hand["boundary"]), rel=1e-3)
    posterior = crf_posterior(
        crf_pictures(seen(images(), 5), 16), grid_probabilities(batch[0]["logits"], 16), present
    )
    assert (posterior[0, [1, 3, 4]] < 1.01e-4).all()
    assert (posterior[2].amax(dim=(1, 2)) > 0.1).all()


def test_each_weight_weighs_its_loss(batch: tuple[dict[str, Tensor], Tensor, Tensor]) -> None:
    before = objectives(batch, seen(images(), 5))
    for name in before:
        doubled = WEIGHTS.model_copy(update={name: 2 * getattr(WEIGHTS, name)})
        after = objectives(batch, seen(images(), 5), doubled)
        assert {key: float(after[key] / value) for key, value in before.items()} == pytest.approx(
            {key: 2.0 if key == name else 1.0 for key in before}
        )
        without = WEIGHTS.model_copy(update={name: 0.0})
        assert list(objectives(batch, seen(images(), 5), without)) == [key for key in before if key != name]


def test_a_gpus_lattice_gives_the_loss_of_the_cpus(
    batch: tuple[dict[str, Tensor], Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures through one lattice, as on a GPU, here in torch on the CPU."""
    probability = grid_probabilities(batch[0]["logits"], 16)
    pictures = crf_pictures(seen(images(), 5), 16)
    own = crf_posterior(pictures, probability)
    energy = -probability.clamp(min=1e-4).log()
    found = torch.stack(infer_batch(list(pictures), list(energy), BOUNDARY_CRF)).clamp(min=1e-4)
    assert largest(own, found / found.sum(dim=1, keepdim=True)) < 1e-4
    other = CrfConfig(**{**BOUNDARY_CRF.model_dump(), "bilateral_sxy": 8.0})
    monkeypatch.setattr(weakclip_losses, "BOUNDARY_CRF", other)
    assert largest(own, crf_posterior(pictures, probability)) > 1e-3


def test_the_losses_of_a_step_are_the_published_ones() -> None:
    """Of the small network, with the recipe's weights."""
    golden = np.load(GOLDEN / "weakclip" / "golden.npz")
    images, mask = published_pixels(golden["image"]), torch.from_numpy(golden["train/mask"]).long()
    outputs = published_network().train().training_outputs(images)
    losses = weighted_losses(
        outputs,
        mask,
        torch.full_like(mask, 200),
        load_train_config("weakclip/voc12"),
        1,
        lambda sums: sums,
        seen(images, 5),
    )
    for name, stored in (("boundary", "boundary"), ("seeding", "seeding"), ("score", "score_ce")):
        assert float(losses[name].detach()) == pytest.approx(float(golden[f"train/loss_{stored}"]), abs=1e-5)


@both
def test_rates_are_the_published_ones(folder: Path) -> None:
    golden = np.load(folder / "lr_schedule.npz")
    for data in ("voc12", "coco14"):
        config = load_train_config(f"weakclip/{data}").optimisation
        slow = ("clip_image", "clip_text", "adapter")
        peaks = [0.0 if name in slow else config.lr for name in golden[f"{data}_groups"]]
        rates = [
            [learning_rate(peak, int(step), config) for peak in peaks]
            for step in golden[f"{data}_iterations"]
        ]
        assert np.abs(np.array(rates) - golden[f"{data}_lr"]).max() < 1e-15


def test_a_rate_may_fall_to_0_over_all_updates() -> None:
    config = OptimisationConfig(schedule="cosine-total", iterations=10)
    assert [learning_rate(2.0, step, config) for step in (0, 5)] == pytest.approx([2.0, 1.0])


@needs_large
def test_eight_updates_are_the_published_ones() -> None:
    """With the recipe's losses, groups and rates, and a lattice of our own in the loss."""
    folder = LARGE / "weakclip"
    golden, steps = np.load(folder / "train.npz"), np.load(folder / "steps.npz")
    changes = ["optimisation.iterations=8", "optimisation.warm_up=3"]
    config = load_train_config("weakclip/voc12", overrides=changes)
    network = published_network(LARGE).train()
    images = published_pixels(np.load(folder / "forward.npz")["even/image"])
    chosen = config.optimisation
    groups = network.parameter_groups(chosen.lr, chosen.weight_decay, chosen.head_lr_factor)
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=chosen.lr)
    mask = torch.from_numpy(golden["gt"]).long()
    pictures = seen(images, 21)
    for step in range(8):
        for peak, group in zip(peaks, optimizer.param_groups, strict=True):
            group["lr"] = learning_rate(peak, step, chosen)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([steps["lr_main"][step], steps["lr_clip"][step]], abs=1e-15)
        losses = weighted_losses(
            network.training_outputs(images),
            mask,
            torch.full_like(mask, 200),
            config,
            step + 1,
            lambda sums: sums,
            pictures,
        )
        for name, stored in (("boundary", "boundary"), ("seeding", "seeding"), ("score", "score_ce")):
            expected = float(steps[f"loss_{stored}"][step])
            assert float(losses[name].detach()) == pytest.approx(expected, abs=1e-4)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = network.state_dict()
    for key in steps.files:
        if key.startswith("after/"):
            name = key.removeprefix("after/")
            (own,) = own_names(name)
            value = own_value(name, torch.from_numpy(steps[key]))
            assert largest(state[own][: len(value)], value) < 1e-6, key
    network.eval()
    with torch.no_grad():
        found = network.decode(images)
    for name in ("score", "logits"):
        assert largest(found[name], torch.from_numpy(steps[name])) < 1e-4


def test_settings_that_contradict_each_other_are_refused() -> None:
    for overrides, message in (
        (["loss.segmentation=0"], "loss.segmentation is 0 and no other loss"),
        (["loss.score=1"], "loss.score needs --network weakclip, not deeplabv3plus"),
        (["optimisation.min_lr=0.001"], "min_lr is for the schedule cosine-total"),
        (["augmentation.short_side=3000"], "short_side is larger than long_side"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_train_config(overrides=overrides)
