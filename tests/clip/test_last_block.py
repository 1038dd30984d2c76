"""The closed form of the last block's gradients against autograd through transformers' own layers, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from wsss_pipeline.clip.last_block import LastBlock

WIDTH, HEADS = 48, 4


def vision(activation: str) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        projection_dim=20,
        image_size=32,
        patch_size=8,
        hidden_act=activation,
    )
    model = CLIPVisionModelWithProjection(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)  # gains and biases of the norms as well
    return model


def by_autograd(
    model: CLIPVisionModelWithProjection, hidden: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = model.vision_model.encoder.layers[-1]
    tokens = layer.layer_norm1(hidden).detach().requires_grad_()
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    query, key, value = (f(tokens).unflatten(-1, (HEADS, -1)).transpose(0, 1) for f in projections)
    attention = torch.softmax(query @ key.transpose(1, 2) / (WIDTH // HEADS) ** 0.5, dim=-1)
    hidden = hidden + layer.self_attn.out_proj((attention @ value).transpose(0, 1).flatten(1))
    hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    pooled = model.visual_projection(model.vision_model.post_layernorm(hidden)[1:]).mean(dim=0)
    found = [
        torch.autograd.grad(pooled, tokens, row, retain_graph=True)[0][1:].mean(dim=0) for row in gradients
    ]
    return pooled.detach(), attention.detach(), torch.stack(found)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("patches", "classes"), [(16, 3), (35, 1), (1, 2)])
def test_gradients_equal_those_of_autograd(activation: str, patches: int, classes: int) -> None:
    model = vision(activation)
    hidden = torch.randn(1 + patches, WIDTH, dtype=torch.float64)
    gradients = torch.randn(classes, 20, dtype=torch.float64)
    pooled, attention, expected = by_autograd(model, hidden, gradients)
    block = LastBlock(
        model.vision_model.encoder.layers[-1],
        model.vision_model.post_layernorm,
        model.visual_projection,
        torch.float64,
    )
    state = block.forward(hidden)
    assert torch.allclose(state.pooled, pooled, atol=1e-13)
    assert torch.allclose(state.probabilities, attention, atol=1e-14)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(state.mean_token_gradients(gradients), expected, rtol=1e-11, atol=1e-14)
