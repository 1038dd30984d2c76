"""Stage one against the published code's own numbers, stage by stage.

The golden files under tests/golden hold what the published CLIP-ES code computes on CPU in float32 for
five small images with a seeded vision tower. Tolerances are those that the method's conditioning allows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from wsss_pipeline.cam.affinity import box_masks, refine_cams, sinkhorn_scaling
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import normalise_cams, upscale_cams
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import prepare_image

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(json.loads((GOLDEN / "labels.json").read_text()))
LOGIT_SCALE = float(torch.tensor(4.60546875).exp())


@dataclass(frozen=True)
class Case:
    """One image through our code beside what the published code computed."""

    expected: dict[str, np.ndarray]
    logits: torch.Tensor
    pooled: torch.Tensor
    raw: torch.Tensor
    cams: torch.Tensor
    attention: torch.Tensor
    refined: torch.Tensor


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected" / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    vision = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    return Trunk(vision.requires_grad_(False).eval())


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, trunk: Trunk) -> Case:
    expected, text = golden(request.param), golden("text")
    rows = torch.from_numpy(np.concatenate([text["fg"][expected["label_ids"]], text["bg"]]))
    image = read_image(GOLDEN / "images" / f"{request.param}.png")
    features = trunk.encode(prepare_image(image, trunk.patch_size, 1_048_576).pixels[None])
    (raw,) = softmax_gradcam(features, [rows], [len(expected["label_ids"])], LOGIT_SCALE)
    cams = normalise_cams(raw)
    attention = features.attention[0]
    pooled = features.last[0].pooled
    logits = LOGIT_SCALE * (pooled / pooled.norm()) @ rows.T
    return Case(expected, logits, pooled, raw, cams, attention, refine_cams(cams, attention, threshold=0.4))


def largest_difference(actual: torch.Tensor, expected: np.ndarray, relative: bool = False) -> float:
    assert tuple(actual.shape) == expected.shape
    difference = float((actual.double() - torch.from_numpy(expected).double()).abs().max())
    return difference / float(np.abs(expected).max() or 1) if relative else difference


def test_logits_within_2e_5(case: Case) -> None:
    assert largest_difference(case.logits, case.expected["logits"]) < 2e-5


def test_raw_cams_within_2e_5_of_their_largest(case: Case) -> None:
    assert largest_difference(case.raw, case.expected["cam_raw"], relative=True) < 2e-5


def test_cams_within_1e_5(case: Case) -> None:
    assert largest_difference(case.cams, case.expected["cam"]) < 1e-5


def test_box_masks_equal(case: Case) -> None:
    assert np.array_equal(box_masks(case.cams, 0.4).numpy(), case.expected["box_mask"])


def test_mean_attention_within_2e_6_relative(case: Case) -> None:
    attention = case.attention
    rows, columns = case.expected["aff_sample_idx"].T
    assert largest_difference(attention[rows, columns], case.expected["aff_sample"], relative=True) < 2e-6
    assert largest_difference(attention.diag(), case.expected["aff_diag"], relative=True) < 2e-6
    assert largest_difference(attention.sum(0), case.expected["aff_colsum"], relative=True) < 2e-6
    assert largest_difference(attention.sum(1), case.expected["aff_rowsum"], relative=True) < 2e-6


def test_symmetrised_sinkhorn_matrix_within_1e_5_relative(case: Case) -> None:
    r, c = sinkhorn_scaling(case.attention, 3)
    scaled = r[:, None] * case.attention * c
    symmetric = (scaled + scaled.T) / 2
    rows, columns = case.expected["sink_sample_idx"].T
    assert largest_difference(symmetric[rows, columns], case.expected["sink_sample"], relative=True) < 1e-5
    assert largest_difference(symmetric.diag(), case.expected["sink_diag"], relative=True) < 1e-5
    assert largest_difference(symmetric.sum(0), case.expected["sink_colsum"], relative=True) < 1e-5


def test_refined_cams_within_1e_5_of_their_largest(case: Case) -> None:
    assert largest_difference(case.refined, case.expected["refined_low"], relative=True) < 1e-5


def test_upscaled_refined_cams_within_1e_5(case: Case) -> None:
    expected = case.expected["refined_high"]
    assert largest_difference(upscale_cams(case.refined, expected.shape[1:]), expected) < 1e-5
