"""ExCEL against the published code's own numbers, stage by stage, and through the engine.

The files under tests/golden/excel hold what the published code computes on CPU in float32 for two small pictures
with a seeded vision tower, texts and bank. Tolerances are those that its accuracy allows; one picture's input is in
half precision.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from wsss_pipeline.cam.affinity import refine_cams
from wsss_pipeline.cam.patch_text import patch_text_cams
from wsss_pipeline.clip.attributes import enriched
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image
from wsss_pipeline.methods import excel, load_mask_config
from wsss_pipeline.methods.excel import Excel
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("motorcycle", "astronaut")
BLOCKS, LAYERS = 5, 6


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / "excel" / f"{name}.npz") as file:
        return {key: torch.from_numpy(value) for key, value in file.items()}


@pytest.fixture(scope="module")
def vision() -> Any:
    model = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    stored = golden("text")
    own = stored["voc_text"]
    return torch.cat([enriched(own[:20], stored["voc_bank"].T), own[20:]])


def features(vision: Any, pixels: torch.Tensor) -> Features:
    return Trunk(vision, rounded_positions=False).encode(pixels[None].float(), (), "layers", LAYERS, BLOCKS)


def largest(found: torch.Tensor, expected: torch.Tensor, relative: bool = False) -> float:
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    return difference / float(expected.abs().max()) if relative else difference


def test_enriched_texts_within_1e_5(texts: torch.Tensor) -> None:
    assert largest(texts, golden("text")["voc_enriched"]) < 1e-5


@pytest.mark.parametrize(("name", "tolerance"), [("motorcycle", 1e-4), ("astronaut", 1.1e-3)])
def test_patch_features_maps_and_affinity(
    vision: Any, texts: torch.Tensor, name: str, tolerance: float
) -> None:
    expected = golden(f"{name}_voc")
    found = features(vision, expected["input"])
    assert found.calibrated is not None
    normalised = torch.nn.functional.normalize(found.calibrated, dim=1)[0]
    assert largest(normalised, expected["patch_features"], relative=True) < tolerance
    maps = patch_text_cams(found.calibrated, texts)[0]
    assert largest(maps[:20].T, expected["cam_raw"]) < tolerance
    chosen = maps[expected["label_ids"].tolist()].view(-1, *found.grid)
    summed = torch.tensor([1.0, *[float(vision.config.num_attention_heads)] * BLOCKS])
    attention = torch.einsum("l,lij->ij", summed / LAYERS, found.attention[:, 0])
    refined = refine_cams(chosen, attention, 0.79, 2, 3)
    assert largest(refined, expected["cam_refined"], relative=True) < tolerance


def test_attention_and_calibration_of_each_block(vision: Any) -> None:
    """Of the picture whose blocks are stored: heads' means, times the heads in calibrated blocks."""
    expected = golden("motorcycle_voc")
    heads = vision.config.num_attention_heads
    found = features(vision, expected["input"]).attention[:, 0]
    for number, attention in enumerate(found):
        block = 12 - LAYERS + number
        factor = heads if block >= 12 - BLOCKS else 1
        assert largest(factor * attention, expected["attention_rows"][block, 1:, 1:], relative=True) < 1e-4


@pytest.mark.parametrize("blocks", [0, 4, 6])
def test_another_number_of_calibrated_blocks_is_told_apart(
    vision: Any, texts: torch.Tensor, blocks: int
) -> None:
    expected = golden("motorcycle_voc")
    found = Trunk(vision, rounded_positions=False).encode(
        expected["input"][None].float(), (), "layers", LAYERS, blocks
    )
    assert found.calibrated is not None
    assert largest(patch_text_cams(found.calibrated, texts)[0, :20].T, expected["cam_raw"]) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_the_whole_way_are_the_published_ones(
    vision: Any, texts: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the picture to the mask, with the published texts in the place of a text tower's."""
    expected = golden(f"{name}_voc")
    labels = json.loads((GOLDEN / "excel" / "labels.json").read_text())[name]
    rows = ClassEmbeddings(texts[:20], texts[20:])
    monkeypatch.setattr(excel, "class_embeddings", lambda *_: rows)
    overrides = ["excel.side=96", "excel.attributes=none", "clip.weights=demo"]  # another takes its place
    config = load_mask_config("excel/voc12", overrides=overrides)
    class_set = load_class_set("voc12")
    generator = MaskGenerator(class_set, config=config, device="cpu", offline=True)
    clip = Clip(vision, SimpleNamespace(), None, 100.0)
    monkeypatch.setattr(excel, "TextEncoder", lambda *_: SimpleNamespace(encode=None))
    generator.__dict__["method"] = Excel(config, clip, class_set, "fp32")
    image = read_image(GOLDEN / "excel" / "images" / f"{name}.png")
    prepared = generator.prepare(image, labels)
    if expected["input"].dtype == torch.float32:
        assert largest(prepared.prepared.pixels, expected["input"]) < 1e-5
    found = generator(image, labels)
    same = (torch.from_numpy(found.mask) == expected["mask"]).double().mean()
    assert same >= 0.999
    assert len(set(found.mask.ravel().tolist())) > 1
