"""The one arg max and the one rounding of confidence; what ``auto`` refines with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss_pipeline.config import ConfidenceName, CrfConfig, MaskConfig, ParConfig, RefinerName
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import ConfigError, MaskError
from wsss_pipeline.refine import DenseCrf, Par, Unrefined, label, label_confidences, load_refiner


def confidence_of(largest: np.ndarray) -> np.ndarray:
    """Confidence of pixels (H, W) whose largest posterior is given, of a class beside the background."""
    posterior = torch.from_numpy(np.stack([np.full_like(largest, -1.0), largest]))
    mask, confidence = label(posterior, [7], largest.shape)
    assert (mask == 7)[confidence != 255].all()
    assert mask.dtype == confidence.dtype == torch.uint8
    return confidence.numpy()


def test_confidence_is_exact_at_every_half_percent() -> None:
    exact = (np.arange(201) / 200).astype(np.float32)
    below, above = (np.nextafter(exact, np.float32(end)) for end in (-1, 2))
    steps = np.arange(201)
    found = confidence_of(np.stack([exact, below, above]))
    assert found.tolist() == [steps.tolist(), np.maximum(steps - 1, 0).tolist(), steps.tolist()]


def test_confidence_stays_in_range_for_rounding_noise() -> None:
    noise = np.array([[-1e-7, 0.0], [1.0000001, 1.5]], np.float32)
    assert confidence_of(noise).tolist() == [[0, 0], [200, 200]]


def test_confidence_and_threshold_agree_on_float32_095() -> None:
    confidence = confidence_of(np.array([[0.95, np.nextafter(np.float32(0.95), 0)]], np.float32))
    assert PseudoMask(np.ones((1, 2), np.uint8), confidence).with_ignore(0.95).tolist() == [[1, 255]]


def test_a_posterior_that_is_no_number_is_refused_as_a_pseudo_mask() -> None:
    posterior = torch.tensor([[[0.5, float("nan"), 0.1]], [[0.5, 0.2, float("nan")]]])
    mask, confidence = label(posterior, [1], (1, 3))
    assert confidence.tolist() == [[100, 255, 255]]
    with pytest.raises(MaskError, match="NaN"):
        PseudoMask(mask.numpy(), confidence.numpy())


def test_the_mask_holds_the_values_of_the_classes_and_ties_go_to_the_first() -> None:
    posterior = torch.tensor([[0.2, 0.4, 0.1, 0.2], [0.6, 0.4, 0.45, 0.1], [0.2, 0.2, 0.45, 0.7]])[:, None]
    mask, confidence = label(posterior, [20, 3], (1, 4))
    assert mask.tolist() == [[20, 0, 20, 3]]
    assert confidence.tolist() == [[120, 80, 90, 140]]


def test_background_alone_is_the_whole_mask() -> None:
    mask, confidence = label(torch.ones(1, 2, 3), [], (2, 3))
    assert not mask.any()
    assert (confidence == 200).all()


def test_the_posterior_and_not_the_mask_is_scaled_to_the_images_size() -> None:
    posterior = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=0)
    scaled = F.interpolate(posterior[None], (9, 14), mode="bilinear", align_corners=False)[0]
    for found, expected in zip(
        label(posterior, [2, 9], (9, 14)), label(scaled, [2, 9], (9, 14)), strict=True
    ):
        assert found.shape == (9, 14)
        assert torch.equal(found, expected)


def test_scores_that_nothing_refines_are_divided_by_their_sum() -> None:
    scores = torch.tensor([[[0.2, 0.5]], [[0.6, 0.5]], [[0.0, 1.0]]]).half()
    (posterior,) = Unrefined()([np.zeros((1, 2, 3), np.uint8)], [scores])
    expected = torch.tensor([[[0.25, 0.25]], [[0.75, 0.25]], [[0.0, 0.5]]])
    assert torch.allclose(posterior, expected, atol=1e-3)
    assert posterior.dtype == torch.float32


@pytest.mark.parametrize(
    ("refine", "backend", "default", "kind"),
    [
        ("auto", "auto", "crf", DenseCrf),
        ("auto", "auto", "none", Unrefined),
        ("auto", "none", "crf", Unrefined),
        ("crf", "lattice", "none", DenseCrf),
        ("none", "lattice", "crf", Unrefined),
    ],
)
def test_the_refiner_is_the_one_named_or_the_methods_own(
    refine: RefinerName, backend: str, default: RefinerName, kind: type
) -> None:
    config = MaskConfig(refine=refine, crf=CrfConfig(backend=backend))
    assert type(load_refiner(config, default)) is kind


def test_a_crf_that_is_switched_off_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="--refine crf and --crf none contradict each other"):
        load_refiner(MaskConfig(refine="crf", crf=CrfConfig(backend="none")), "crf")


SCORES = torch.tensor([[[0.1, 0.9, 0.5]], [[0.3, 0.1, 0.5]], [[0.1, 0.0, 0.0]]])
IMAGE = np.array([[[10, 10, 10], [11, 10, 10], [200, 0, 0]]], np.uint8)


def test_the_margin_is_that_over_the_best_other_label() -> None:
    (found,) = label_confidences("margin", [IMAGE], [SCORES])
    assert found is not None
    expected = [[0.3, 0.9, 0.5], [0.7, 0.1, 0.5], [0.3, 0.05, 0.25]]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_the_product_is_of_the_scores_and_their_mean_around_by_pars_own_constants() -> None:
    (found,) = label_confidences("product", [IMAGE], [SCORES.half()])
    assert found is not None
    (around,) = Par(ParConfig())([IMAGE], [SCORES])
    shares = SCORES / SCORES.sum(dim=0)
    expected = (shares.clamp(min=1e-5) * around) ** 1.4
    torch.testing.assert_close(found, expected / expected.sum(dim=0), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(1, 3))


def test_labels_that_no_score_speaks_for_have_a_confidence_that_is_a_number() -> None:
    scores = torch.zeros(2, 5, 5)
    scores[0], scores[:, 2, 2] = 1, torch.tensor([0.0, 1.0])
    kinds: tuple[ConfidenceName, ...] = ("margin", "product")
    for kind in kinds:
        (found,) = label_confidences(kind, [np.zeros((5, 5, 3), np.uint8)], [scores])
        assert found is not None
        assert torch.isfinite(found).all()
        assert found.min() >= 0
        assert found.max() <= 1


def test_a_confidence_is_that_of_the_label_whatever_the_posterior_is() -> None:
    posterior = torch.tensor([[[0.9, 0.2, float("nan")]], [[0.1, 0.8, 0.5]]])
    own = torch.tensor([[[0.25, 0.7, 0.5]], [[0.75, 0.3, 0.5]]])
    mask, confidence = label(posterior, [4], (1, 3), confidences=own)
    assert mask.tolist()[0][:2] == [0, 4]
    assert confidence.tolist() == [[50, 60, 255]]
    assert label_confidences("posterior", [IMAGE], [SCORES]) == [None]


def test_confidences_are_scaled_to_the_images_size() -> None:
    own = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=0)
    scaled = F.interpolate(own[None], (6, 8), mode="bilinear", align_corners=False)[0]
    posterior = torch.stack([torch.zeros(6, 8), torch.ones(6, 8)])
    found, expected = (label(posterior, [1], (6, 8), confidences=which)[1] for which in (own, scaled))
    assert torch.equal(found, expected)
