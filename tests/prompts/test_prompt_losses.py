"""Losses and their gradients against the published code's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.data.transforms import CLIP_STATISTICS, normalise
from wsss_pipeline.prompts.config import PromptConfig
from wsss_pipeline.prompts.losses import activation_loss, contrastive_loss
from wsss_pipeline.prompts.trainer import PromptObjective

GOLDEN = Path(__file__).parent.parent / "golden"
LOGIT_SCALE = float(torch.tensor(4.60546875).exp())


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "fma" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_contrastive_loss_and_gradient() -> None:
    expected = golden("contrastive")
    logits, present = expected["S"].requires_grad_(), expected["y"].bool()
    loss = contrastive_loss(logits, present)
    loss.backward()
    assert abs(float(loss.detach()) - float(expected["loss"])) < 2e-5
    assert logits.grad is not None
    assert relative(logits.grad, expected["grad"]) < 5e-5


def test_contrastive_loss_where_the_published_form_fails() -> None:
    expected = golden("contrastive")
    assert expected["overflow_loss"].isnan()
    loss = contrastive_loss(10 * expected["S"], expected["y"].bool())
    assert loss.isfinite()
    assert float(loss) > float(expected["loss"])
    nothing = expected["S"].requires_grad_()
    none_valid = contrastive_loss(nothing, torch.zeros_like(expected["y"], dtype=torch.bool))
    none_valid.backward()
    assert float(none_valid.detach()) == float(expected["none_valid_loss"]) == 0
    assert nothing.grad is not None
    assert not nothing.grad.any()


def test_activation_loss_and_gradient() -> None:
    """With a class without pixels, a negative map, ignored pixels."""
    expected = golden("activation")
    cams = expected["cam"].requires_grad_()
    present = [(torch.nonzero(row)[:, 0] + 1).tolist() for row in expected["y"]]
    split = torch.split(cams, [len(values) for values in present])
    loss = activation_loss(split, present, expected["labels"])
    loss.backward()
    wanted = float(expected["fg"] + expected["bg"])
    assert abs(float(loss.detach()) - wanted) < 1e-5 * wanted
    assert cams.grad is not None
    assert relative(cams.grad, expected["grad_fg"] + expected["grad_bg"]) < 5e-5


def test_a_map_that_is_negative_all_over_its_class_is_drawn_to_0() -> None:
    cams = -torch.ones(1, 2, 2)
    assert float(activation_loss([cams], [[3]], torch.full((1, 2, 2), 3))) == 1
    assert float(activation_loss([cams[:0]], [[]], torch.zeros(1, 2, 2))) == 0


@pytest.mark.parametrize("objective", ["contrastive", "cam"])
def test_losses_of_crops_and_their_gradients_in_the_text_rows(objective: str) -> None:
    """With cam of the second order, in the published code: its maps are gradients themselves."""
    expected = golden("visual_train")
    vision = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    trunk = Trunk(vision.requires_grad_(False).eval(), rounded_positions=False)
    stored = golden("visual_cams")["text_rows"].requires_grad_()
    config = PromptConfig.model_validate({"objective": objective})
    images = torch.stack([normalise(crop.numpy(), CLIP_STATISTICS) for crop in expected["crops"]])
    rows = torch.nn.functional.normalize(stored, dim=1)
    found = PromptObjective(config, trunk, LOGIT_SCALE, 20)
    loss, pairs = found(images, expected["labels"], expected["y"].bool(), rows)
    loss.backward()  # type: ignore[no-untyped-call]
    assert pairs == len(expected["cam_raw"])
    names = ["contrastive"] if objective == "contrastive" else ["activation_fg", "activation_bg"]
    wanted = sum(float(expected[name]) for name in names)
    assert abs(float(loss.detach()) - wanted) < (2e-5 if objective == "contrastive" else 1e-5 * wanted)
    assert stored.grad is not None
    assert relative(stored.grad, expected[f"{names[0].partition('_')[0]}_grad"]) < 5e-5
