"""Softmax-GradCAM on cases that can be computed by hand, or another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss_pipeline.cam.gradcam import probability_gradients, softmax_gradcam
from wsss_pipeline.cam.scores import min_max, normalise_cams, upscale_cams
from wsss_pipeline.clip.trunk import Features

GOLDEN = Path(__file__).parent.parent / "golden"


def example(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, 1+6, 8), a pooled embedding (B, 5) that depends on them, text rows (4, 5)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, 7, 8, generator=generator, requires_grad=True)
    projection = torch.randn(8, 5, generator=generator)
    pooled = (tokens[:, 1:].tanh().mean(dim=1) + 0.1 * tokens[:, 0]) @ projection
    return tokens, pooled, F.normalize(torch.randn(4, 5, generator=generator), dim=1)


class AutogradPass:
    """Stands in for the pass of one image through the last block, with gradients by autograd."""

    def __init__(self, tokens: torch.Tensor, pooled: torch.Tensor, image: int) -> None:
        self._all, self._image = tokens, image
        self.tokens, self.pooled = tokens[image], pooled[image]

    def mean_token_gradients(self, rows: torch.Tensor) -> torch.Tensor:
        found = [torch.autograd.grad(self.pooled, self._all, row, retain_graph=True)[0] for row in rows]
        return torch.stack([gradient[self._image, 1:].mean(dim=0) for gradient in found])


def maps_of(
    tokens: torch.Tensor, pooled: torch.Tensor, texts: list[torch.Tensor], counts: list[int]
) -> list[torch.Tensor]:
    passes: list[Any] = [AutogradPass(tokens, pooled, image) for image in range(len(tokens))]
    features = Features((2, 3), torch.zeros(len(tokens), 6, 6), {}, passes)
    return [maps.detach() for maps in softmax_gradcam(features, texts, counts, 10.0)]


def by_finite_differences(
    tokens: torch.Tensor, texts: torch.Tensor, target: int, scale: float
) -> torch.Tensor:
    """The raw CAM with each channel's weight from the change of the probability, in float64."""
    projection = torch.randn(8, 5, generator=generator_after_tokens()).double()

    def probability(moved: torch.Tensor) -> torch.Tensor:
        pooled = (moved[1:].tanh().mean(dim=0) + 0.1 * moved[0]) @ projection
        return torch.softmax(scale * F.normalize(pooled, dim=0) @ texts.double().T, dim=0)[target]

    base, step = tokens.double(), 1e-6
    gradient = torch.zeros(7, 8, dtype=torch.float64)
    for place in range(7):
        for channel in range(8):
            moved = base.clone()
            moved[place, channel] += step
            gradient[place, channel] = (probability(moved) - probability(base)) / step
    return (base[1:] @ gradient[1:].mean(dim=0)).view(2, 3)


def generator_after_tokens() -> torch.Generator:
    """The generator of ``example`` with one image, after its tokens."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 7, 8, generator=generator)
    return generator


@pytest.mark.parametrize("target", [0, 1])
def test_equals_finite_differences(target: int) -> None:
    tokens, pooled, texts = example(1)
    (cams,) = maps_of(tokens, pooled, [texts], [2])
    expected = by_finite_differences(tokens[0].detach(), texts, target, 10.0)
    assert torch.allclose(cams[target].double(), expected, atol=1e-5)


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    tokens, pooled, texts = example(3, seed=1)
    together = maps_of(tokens, pooled, [texts, texts[1:], texts], [2, 1, 3])
    assert [len(cams) for cams in together] == [2, 1, 3]
    for image, (rows, count) in enumerate(((texts, 2), (texts[1:], 1), (texts, 3))):
        tokens, pooled, _ = example(3, seed=1)
        full = maps_of(tokens, pooled, [rows] * 3, [count] * 3)
        assert torch.allclose(together[image], full[image], atol=1e-7)


def test_an_image_without_classes_has_no_map() -> None:
    tokens, pooled, texts = example(2)
    none, some = maps_of(tokens, pooled, [texts, texts], [0, 2])
    assert none.shape == (0, 2, 3)
    assert some.shape == (2, 2, 3)


def test_background_words_change_the_maps() -> None:
    tokens, pooled, texts = example(1)
    (without,) = maps_of(tokens, pooled, [texts[:2]], [2])
    tokens, pooled, _ = example(1)
    (with_words,) = maps_of(tokens, pooled, [texts], [2])
    assert not torch.allclose(without, with_words, atol=1e-4)
    # two classes alone share one probability: what speaks for one speaks against the other
    assert torch.allclose(without[0], -without[1], atol=1e-6)


def test_a_weak_map_stays_weak_and_a_strong_one_peaks_just_below_1() -> None:
    weak = min_max(torch.tensor([[[0.0, 3e-8]]]))
    assert weak.max() == pytest.approx(3e-8 / 1.3e-7, rel=1e-4)
    strong = normalise_cams(torch.tensor([[[-5.0, 0.0], [1.0, 2.0]]]))
    assert int(strong.max() * 255) == 254
    assert torch.allclose(strong, torch.tensor([[[0.0, 0.0], [0.5, 1.0]]]), atol=1e-6)


def test_a_map_without_a_positive_cell_is_0() -> None:
    assert not normalise_cams(torch.tensor([[[-3.0, -1.0], [-2.0, -5.0]]])).any()


def test_gradients_with_an_epsilon_are_those_of_the_published_masked_softmax() -> None:
    """Rows of which each has its logit along the embedding and a direction of its own, which shows its gradient."""
    with np.load(GOLDEN / "fma" / "masked_softmax.npz") as file:
        stored = {key: torch.from_numpy(file[key]) for key in file.files}
    scale = 100.0
    for logits, allowed, weights, expected in zip(
        stored["logits"].double(), stored["allowed"], stored["weights"].double(), stored["grad"], strict=True
    ):
        count = len(logits)
        cosines = (logits / scale)[:, None]
        rows = torch.cat([cosines, (1 - cosines.square()).sqrt() * torch.eye(count)], dim=1)
        embedding = torch.eye(1 + count, dtype=torch.float64)[0]
        classes = int(allowed.sum())
        gradients = probability_gradients(embedding, rows[allowed], classes, scale, everything=rows)
        at_logits = weights[allowed] @ gradients[:, 1:] / (1 - cosines[:, 0].square()).sqrt() / scale
        assert (at_logits - expected).abs().max() < 2e-6


def test_an_absent_class_that_leads_makes_the_maps_weak() -> None:
    embedding = torch.eye(3)[0]
    rows = torch.tensor([[0.1, 1, 0], [0.1, 0, 1], [0.5, 0.5, 0.5]])
    alone = probability_gradients(embedding, rows[:2], 1, 100.0)
    led = probability_gradients(embedding, rows[:2], 1, 100.0, everything=rows)
    unled = probability_gradients(embedding, rows[:2], 1, 100.0, everything=rows[:2])
    assert led.abs().max() < 1e-6 * alone.abs().max()
    assert torch.allclose(unled, alone, rtol=1e-4)


def test_maps_of_either_sign_are_clamped_once_they_are_scaled() -> None:
    maps = torch.tensor([[[-1.0, 1.0]], [[-3.0, -1.0]], [[1.0, 3.0]]])
    scaled = upscale_cams(maps, (1, 4))
    # bilinear between -1 and 1 first: a quarter of the way beyond the centre is still negative
    assert torch.allclose(scaled[0], torch.tensor([[0.0, 0.0, 0.5, 1.0]]), atol=1e-6)
    assert not scaled[1].any()
    assert torch.allclose(scaled[2], torch.tensor([[0.0, 0.25, 0.75, 1.0]]), atol=1e-6)
