"""Taps and attention of the trunk against transformers' own hidden states and attentions."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from wsss_pipeline.clip.trunk import Features, Trunk

DEPTH, PATCH, GRID = 4, 8, (3, 3)  # the grid of the model's own position table


@pytest.fixture(scope="module")
def vision() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        projection_dim=20,
        image_size=PATCH * GRID[0],
        patch_size=PATCH,
        attn_implementation="eager",
    )
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    # the trunk rounds its position table to half precision
    table = model.vision_model.embeddings.position_embedding.weight
    table.copy_(table.half())
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    sides = [PATCH * side for side in GRID]
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))


def encode(vision: CLIPVisionModelWithProjection, images: torch.Tensor, **options: object) -> Features:
    with torch.no_grad():
        return Trunk(vision).encode(images, **options)  # type: ignore[arg-type]


def test_taps_are_the_librarys_hidden_states(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor
) -> None:
    states = vision(images, output_hidden_states=True).hidden_states  # the first is the first block's input
    features = encode(vision, images, taps=(0, 1, 2, 3, -1, -2))
    assert set(features.taps) == {0, 1, 2, 3, -1, -2}
    for tap, tokens in features.taps.items():
        torch.testing.assert_close(tokens, states[1:][tap], rtol=1e-4, atol=1e-5)
    assert encode(vision, images, taps=[1]).taps.keys() == {1}


@pytest.mark.parametrize("taps", [(4,), (-5,)])
def test_a_block_that_is_not_there_cannot_be_tapped(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor, taps: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="the blocks 0 to 3"):
        encode(vision, images, taps=taps)


@pytest.mark.parametrize("last_layers", [1, 2, 4, 99])
def test_attention_is_that_of_the_last_layers_over_heads_mean(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor, last_layers: int
) -> None:
    attentions = vision(images, output_attentions=True).attentions
    expected = torch.stack([maps[:, :, 1:, 1:].mean(dim=1) for maps in attentions[-last_layers:]])
    layers = encode(vision, images, attention="layers", last_layers=last_layers)
    torch.testing.assert_close(layers.attention, expected, rtol=1e-4, atol=1e-6)
    mean = encode(vision, images, last_layers=last_layers)
    torch.testing.assert_close(mean.attention, expected.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_patches_are_the_librarys_own_projected(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor
) -> None:
    model = vision.vision_model
    tokens = model.post_layernorm(vision(images, output_hidden_states=True).hidden_states[-1])
    features = encode(vision, images)
    assert features.grid == GRID
    torch.testing.assert_close(
        features.patches, vision.visual_projection(tokens[:, 1:]), rtol=1e-4, atol=1e-5
    )
    for image, last in enumerate(features.last):
        torch.testing.assert_close(last.pooled, features.patches[image].mean(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last_layers", [1, 3])
def test_a_tap_of_the_last_block_changes_nothing_in_the_calibrated_stream(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor, last_layers: int
) -> None:
    trunk = Trunk(vision)
    without = trunk.encode(images, (), "layers", last_layers, 2)
    tapped = trunk.encode(images, (-1,), "layers", last_layers, 2)
    plain = trunk.encode(images, (-1,), "layers", last_layers, 0)
    assert without.calibrated is not None
    torch.testing.assert_close(without.calibrated, tapped.calibrated)
    torch.testing.assert_close(without.attention, tapped.attention)
    torch.testing.assert_close(tapped.taps[-1], plain.taps[-1])


def test_images_of_a_batch_do_not_touch_each_other(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor
) -> None:
    together = encode(vision, images, taps=[2])
    for image in range(len(images)):
        alone = encode(vision, images[image : image + 1], taps=[2])
        torch.testing.assert_close(alone.taps[2][0], together.taps[2][image])
        torch.testing.assert_close(alone.attention[0], together.attention[image])
        torch.testing.assert_close(alone.patches[0], together.patches[image])


def test_sides_must_be_multiples_of_the_patch(vision: CLIPVisionModelWithProjection) -> None:
    with pytest.raises(ValueError, match="24 x 20 isn't a multiple of the patch size 8"):
        encode(vision, torch.zeros(1, 3, 24, 20))


def test_the_gradient_of_the_maps_reaches_the_text_rows(
    vision: CLIPVisionModelWithProjection, images: torch.Tensor
) -> None:
    """What learned prompts need: the closed form is linear in the rows' gradients."""
    from wsss_pipeline.cam.gradcam import softmax_gradcam

    features = encode(vision, images[:1])
    rows = torch.nn.functional.normalize(
        torch.randn(3, 20, generator=torch.Generator().manual_seed(3)), dim=1
    )

    def total(texts: torch.Tensor) -> torch.Tensor:
        return softmax_gradcam(features, [texts], [2], 5.0)[0].square().sum()

    rows.requires_grad_()
    (found,) = torch.autograd.grad(total(rows), rows)
    step = 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        change = total(rows + step) - total(rows - step)
    assert float(found.flatten() @ step.flatten()) * 2 == pytest.approx(float(change), rel=2e-2)
