"""ExCEL on photographs, against what the published code gave, from texts to masks.

These golden files are too large for this repository. The folder that has them is named by WSSS_GOLDEN; without it
these tests are skipped, and test_excel_reference.py does the same with smaller pictures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.attributes import enriched, kmeans
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

FOLDER = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
GOLDEN, CLIP = FOLDER / "excel", FOLDER / "clip_es" / "model"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="WSSS_GOLDEN names no folder of golden photographs"
)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(values) for key, values in file.items()}


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    return golden("text")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    clip = load_clip(locate_clip(ClipConfig(weights=str(CLIP)), offline=True), torch.device("cpu"))
    return TextEncoder(clip.text, clip.tokenizer)


def test_masks_are_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: dict[str, Tensor]
) -> None:
    """With the bank that the published code was given in place of our sentences' centres."""
    monkeypatch.setattr("wsss_pipeline.methods.excel.attribute_bank", lambda *_: text["voc_bank"].T)
    labels = json.loads((GOLDEN / "labels.json").read_text())
    result = wsss(
        *("generate-masks", "--images", GOLDEN / "images", "--labels", GOLDEN / "labels.json"),
        *("--preset", "excel/voc12", "--clip", CLIP, "--cache", tmp_path / "cache"),
        *("--workers", 0, "--precision", "fp32"),
    )
    assert result.exit_code == 0
    with MaskCache.open(mask_set(result)) as cache:
        assert set(cache) == set(labels)
        for name in cache:
            expected = golden(f"{name}_voc")["mask"].numpy()
            assert (cache[name].mask == expected).mean() >= 0.999


def test_cams_and_mask_among_the_classes_of_coco(
    monkeypatch: pytest.MonkeyPatch, text: dict[str, Tensor]
) -> None:
    """With 80 classes, 23 background words, 224 centres and the threshold of COCO."""
    expected = golden("motorcycle_coco")
    monkeypatch.setattr("wsss_pipeline.methods.excel.attribute_bank", lambda *_: text["coco_bank"].T)
    class_set = load_class_set("coco14")
    labels = [class_set.names[place] for place in expected["label_ids"].tolist()]
    image = read_image(GOLDEN / "images" / "motorcycle.png")

    def made(*overrides: str) -> tuple[MaskGenerator, Tensor]:
        overrides = (f"clip.weights={CLIP}", "clip.precision=fp32", *overrides)
        config: Any = load_mask_config("excel/coco14", overrides=overrides)
        assert config.excel.threshold == 0.88
        generator = MaskGenerator(class_set, config=config, device="cpu", offline=True)
        pixels = generator.prepare(image, labels).prepared.pixels
        present = [place + 1 for place in expected["label_ids"].tolist()]
        (cams,) = generator.method.scores(pixels[None], [present])
        return generator, cams

    _, raw = made("excel.affinity=false")
    assert largest(raw.flatten(1).T, expected["cam_raw"]) < 1e-4
    generator, refined = made()
    assert largest(refined, expected["cam_refined"]) < 1e-4 * float(expected["cam_refined"].max())
    assert (generator(image, labels).mask == expected["mask"].numpy()).mean() >= 0.999


@pytest.mark.parametrize(("classes", "prefix"), [("voc12", "voc"), ("coco14", "coco")])
def test_class_texts_and_what_a_bank_makes_of_them(
    encoder: TextEncoder, text: dict[str, Tensor], classes: str, prefix: str
) -> None:
    class_set = load_class_set(classes)
    rows = class_embeddings(class_set, class_set.templates, encoder.encode)
    assert largest(torch.cat([rows.foreground, rows.background]), text[f"{prefix}_text"]) < 1e-5
    rich = enriched(rows.foreground, text[f"{prefix}_bank"].T)
    assert largest(torch.cat([rich, rows.background]), text[f"{prefix}_enriched"]) < 1e-5


def test_sentences_and_their_centres(encoder: TextEncoder, text: dict[str, Tensor]) -> None:
    by_class = json.loads((GOLDEN / "attributes.json").read_text())
    sentences = [sentence.lower() for own in by_class.values() for sentence in own]
    rows = encoder.encode(sentences)
    assert largest(rows, text["sentence_rows"]) < 1e-5
    centres = kmeans(text["sentence_rows"], text["kmeans_bank"].shape[1])
    inertia = torch.cdist(rows, centres).amin(dim=1).square().sum()
    assert inertia <= 1.02 * text["kmeans_inertia"]
    own = text["voc_text"]
    rich = torch.cat([enriched(own[:20], text["kmeans_bank"].T), own[20:]])
    assert largest(rich, text["voc_enriched_kmeans"]) < 1e-5
