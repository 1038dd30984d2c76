"""Losses and their gradients against the published code's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModelWithProjection

from tests.clip.test_last_block import HEADS, WIDTH, vision
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.clip.last_block import LastBlock
from wsss_pipeline.clip.trunk import Features, Trunk
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


def test_the_gradient_of_maps_is_that_of_autograd_of_the_second_order() -> None:
    """In float64, through the layers of transformers; an absent row leads, so that the epsilon counts."""
    torch.manual_seed(3)
    model = vision("quick_gelu")
    layer, block = model.vision_model.encoder.layers[-1], model.vision_model.post_layernorm
    last = LastBlock(layer, block, model.visual_projection, torch.float64)
    hidden, rows = torch.randn(1 + 12, WIDTH).double(), torch.randn(6, 20).double().requires_grad_()
    mask, scale = torch.randint(0, 3, (1, 9, 12)), 10.0
    competing = [0, 1, 3, 5]

    features = Features((3, 4), torch.zeros(0), {}, [last.forward(hidden)])
    maps = softmax_gradcam(features, [rows[competing]], [2], scale, everything=rows, epsilon=0.1)
    loss = activation_loss(maps, [[1, 2]], mask)
    (found,) = torch.autograd.grad(loss, rows)

    tokens = layer.layer_norm1(hidden).detach().requires_grad_()
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    query, key, value = (f(tokens).unflatten(-1, (HEADS, -1)).transpose(0, 1) for f in projections)
    attention = torch.softmax(query @ key.transpose(1, 2) / (WIDTH // HEADS) ** 0.5, dim=-1)
    stream = hidden + layer.self_attn.out_proj((attention @ value).transpose(0, 1).flatten(1))
    stream = stream + layer.mlp(layer.layer_norm2(stream))
    pooled = model.visual_projection(block(stream)[1:]).mean(dim=0)
    logits = scale * F.normalize(rows, dim=1) @ F.normalize(pooled, dim=0)
    exponentials = (logits - logits.max()).exp()
    probabilities = exponentials / (exponentials[competing].sum() + 0.1)
    assert int(logits.argmax()) not in competing
    weights = [
        torch.autograd.grad(probabilities[own], tokens, create_graph=True)[0][1:].mean(dim=0)
        for own in (0, 1)
    ]
    expected_maps = (torch.stack(weights) @ tokens.detach()[1:].T).view(2, 3, 4)
    expected_loss = activation_loss([expected_maps], [[1, 2]], mask)
    (expected,) = torch.autograd.grad(expected_loss, rows)

    torch.testing.assert_close(maps[0], expected_maps, rtol=1e-10, atol=1e-14)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
