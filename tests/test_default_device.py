"""The hot path makes no tensor on torch's default device, which on a machine with a GPU isn't where its inputs lie.

Each function is called with inputs on the CPU while the default device is ``meta``, that holds no numbers: a tensor
that is made there by oversight can't be computed with, or shows in the result. And what several images or classes get
together is what each gets alone, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from wsss_pipeline.cam.affinity import (
    boxes_by_labelling,
    boxes_by_reachability,
    gated_attention,
    refine_cams,
    sinkhorn_scaling,
)
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.patch_text import patch_text_cams
from wsss_pipeline.cam.scores import assemble, normalise_cams, upscale_cams
from wsss_pipeline.clip.last_block import LastBlock
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.config import CrfConfig, ParConfig
from wsss_pipeline.refine import label, label_confidences
from wsss_pipeline.refine.dense_crf_torch import infer_batch
from wsss_pipeline.refine.par import propagate, propagate_in_torch
from wsss_pipeline.refine.region_vote import vote
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.segmentation.losses import (
    affinity_labels,
    affinity_loss,
    cross_pseudo_loss,
    dice_loss,
    override_labels,
    segmentation_loss,
)
from wsss_pipeline.segmentation.weakclip_losses import (
    Pictures,
    boundary_loss,
    crf_pictures,
    grid_probabilities,
    score_loss,
    seeding_loss,
    without_absent,
)

GOLDEN = Path(__file__).parent / "golden"
GRID, CELLS = (4, 5), 20


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def vision() -> Any:
    model = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def features_of(trunk: Trunk, **wanted: Any) -> Features:
    return trunk.encode(drawn(2, 3, 64, 80) - 0.5, **wanted)


def tensors(found: Any) -> Iterable[Tensor]:
    """All that a result holds."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors(value)
    elif is_dataclass(found):
        for field in fields(found):
            yield from tensors(getattr(found, field.name))


LOGITS, MASK = 3 * drawn(2, 4, 16, 20), (4 * drawn(2, 16, 20)).long()
SCORES, PIXELS = drawn(3, 16, 20), (255 * drawn(16, 20, 3)).to(torch.uint8)
ATTENTION = drawn(3, CELLS, CELLS)
REGIONS = Regions.of_masks((drawn(5, 16, 20) > 0.6).numpy())
PICTURES = Pictures(
    drawn(2, 3, 32, 40), (0.5,) * 3, (0.2,) * 3, drawn(2, 4) > 0.5, torch.ones(2, dtype=torch.bool)
)
SHARES = grid_probabilities(LOGITS, 8)
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "refine_cams": lambda: refine_cams(drawn(2, *GRID), ATTENTION[0], 0.4, prior=drawn(2, *GRID)),
    "boxes_by_reachability": lambda: boxes_by_reachability(drawn(2, *GRID) > 0.6),
    "gated_attention": lambda: gated_attention(ATTENTION, drawn(CELLS, CELLS)),
    "sinkhorn_scaling": lambda: sinkhorn_scaling(ATTENTION[0], 3),
    "patch_text_cams": lambda: patch_text_cams(drawn(2, 1 + CELLS, 8), drawn(6, 8)),
    "upscale_cams, assemble": lambda: assemble(upscale_cams(normalise_cams(drawn(2, *GRID)), (16, 20)), 0.7),
    "propagate": lambda: propagate(drawn(1, 3, 16, 20), SCORES[None], ParConfig()),
    "propagate_in_torch": lambda: propagate_in_torch(drawn(1, 3, 16, 20), SCORES[None], ParConfig()),
    "infer_batch": lambda: infer_batch([PIXELS], [-SCORES.log()], CrfConfig()),
    "vote": lambda: vote(SCORES, REGIONS, 0.7),
    "label": lambda: label(SCORES.softmax(0), [2, 5], (32, 40)),
    "label_confidences": lambda: label_confidences("product", [PIXELS.numpy()], [SCORES]),
    "segmentation_loss": lambda: segmentation_loss(
        {"logits": LOGITS}, MASK, torch.ones(MASK.shape, device="cpu")
    ),
    "affinity_loss": lambda: affinity_loss(drawn(2, CELLS, CELLS), affinity_labels(MASK, GRID, 2)),
    "dice_loss": lambda: dice_loss(LOGITS, MASK),
    "cross_pseudo_loss": lambda: cross_pseudo_loss(LOGITS, LOGITS.flip(1), MASK > 0),
    "override_labels": lambda: override_labels(MASK, LOGITS, 0.5),
    "seeding_loss": lambda: seeding_loss(SHARES, MASK, MASK.float(), MASK.sum()),
    "boundary_loss": lambda: boundary_loss(SHARES, SHARES.flip(0), PICTURES.counted, MASK.sum()),
    "score_loss": lambda: score_loss(LOGITS, MASK, MASK.float(), MASK.sum()),
    "without_absent": lambda: without_absent(MASK, PICTURES.present),
    "crf_pictures": lambda: crf_pictures(PICTURES, 8),
}


def check(function: Callable[[], Any]) -> None:
    expected = list(tensors(function()))
    with torch.device("meta"):
        found = list(tensors(function()))
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        assert own.device.type == "cpu"
        assert torch.equal(own.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    check(FUNCTIONS[name])


@pytest.mark.parametrize("calibrated", [None, 2])
def test_clip_makes_nothing_on_the_default_device(vision: Any, calibrated: int | None) -> None:
    trunk = Trunk(vision)
    wanted = {"attention": "layers", "last_layers": 3, "taps": (2, -1), "middle": (1,)}

    def maps() -> Any:
        features = features_of(trunk, calibrated_blocks=calibrated, **wanted)
        if calibrated:
            return features, trunk.guided(features, drawn(2, CELLS, CELLS).softmax(2))
        projected = features.patches.shape[-1]
        texts = [drawn(3, projected), drawn(4, projected)]
        return (
            features.taps,
            features.middle,
            softmax_gradcam(features, texts, [1, 2], 10.0, everything=texts[1]),
        )

    check(maps)


def test_the_check_notices_a_tensor_of_the_default_device() -> None:
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        check(lambda: SCORES + torch.zeros(3, 16, 20))


def doubles(function: Callable[[Tensor], Tensor], several: Tensor) -> float:
    """Largest difference between what ``several`` get together and what each gets alone, in units of the largest."""
    together = function(several)
    alone = torch.cat([function(one[None]) for one in several])
    assert together.dtype == torch.float64
    return float((together - alone).abs().max() / together.abs().max())


BOXES = (boxes_by_labelling, boxes_by_reachability)
TOGETHER: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "classes in the affinity": (
        lambda cams: refine_cams(cams, ATTENTION[0].double(), 0.4),
        drawn(3, *GRID, dtype=torch.float64),
    ),
    "images' patches and texts": (
        lambda tokens: patch_text_cams(tokens, drawn(6, 8, dtype=torch.float64)),
        drawn(3, 1 + CELLS, 8, dtype=torch.float64),
    ),
    "maps brought to 0..1": (normalise_cams, drawn(3, *GRID, dtype=torch.float64) - 0.3),
    "boxes, in either form": (
        lambda cams: torch.cat(
            [form(cams > 0.6).double() for form in (boxes_by_labelling, boxes_by_reachability)], 1
        ),
        drawn(3, *GRID, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_several_get_together_is_what_each_gets_alone(name: str) -> None:
    assert doubles(*TOGETHER[name]) < 1e-14


def test_gradients_of_several_classes_at_once_are_those_of_each(vision: Any) -> None:
    model = deepcopy(vision).double()
    inner = model.vision_model
    block = LastBlock(inner.encoder.layers[-1], inner.post_layernorm, model.visual_projection, torch.float64)
    width, projected = int(model.config.hidden_size), int(model.config.projection_dim)
    last = block.forward(drawn(1 + CELLS, width, dtype=torch.float64) - 0.5)
    assert doubles(last.mean_token_gradients, drawn(3, projected, dtype=torch.float64) - 0.5) < 1e-12
