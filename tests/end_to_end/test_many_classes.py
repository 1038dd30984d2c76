"""More than 254 classes: masks of 16 bits from the cache to the files that other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.masks import WIDE_IGNORE, Mask
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.train_config import NetworkConfig

COUNT = 300
NAMES = [f"c{number}" for number in range(1, 1 + COUNT)]
# one at each side of a byte's end, and none
LABELS = {"a": ["c260", "c3"], "b": ["c255"], "c": []}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for image_id in LABELS:
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(pixels).save(root / "images" / f"{image_id}.png")
    (root / "labels.json").write_text(json.dumps(LABELS))
    return root


@pytest.fixture(scope="module")
def cache(world: Path, clip: Path) -> MaskCache:
    result = wsss(
        *("generate-masks", "--images", world / "images", "--labels", world / "labels.json", "--clip", clip),
        *("--classes", ",".join(NAMES), "--cache", world / "cache", "--workers", 0),
        *("--refine", "none"),
    )
    assert result.exit_code == 0, result.output
    return MaskCache.open(mask_set(result))


@pytest.fixture(scope="module")
def run(world: Path, cache: MaskCache) -> Path:
    out = world / "run"
    result = wsss(
        *("train-seg", "--cache", cache.path, "--images", world / "images", "--out", out, "--workers", 0),
        *(
            "--network",
            "segformer",
            "--encoder",
            "tiny",
            "--weights",
            "none",
            "--crop",
            64,
            "--device",
            "cpu",
        ),
        *("--batch-size", 3, "--iterations", 2, "--min-confidence", 0),
    )
    assert result.exit_code == 0, result.output
    return out


def index_file(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    with Image.open(path) as image:
        assert image.mode == "I;16"
        return np.array(image)


def test_the_cache_holds_16_bits(cache: MaskCache) -> None:
    assert {cache[image_id].mask.dtype for image_id in cache} == {np.dtype(np.uint16)}
    assert set(np.unique(cache["a"].mask)) <= {0, 3, 260}
    assert 260 in cache["a"].mask
    assert 255 in cache["b"].mask, "a class as any other"
    assert not cache["c"].mask.any()
    assert wsss("cache", "verify", cache.path).exit_code == 0


def test_scores_are_those_of_the_rule(world: Path, cache: MaskCache, tmp_path: Path) -> None:
    def save(mask: Mask, image_id: str) -> None:
        (tmp_path / "truth").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "truth" / f"{image_id}.png")

    truth = {image_id: cache[image_id].mask.copy() for image_id in cache}
    truth["b"][:2] = WIDE_IGNORE
    truth["a"][truth["a"] == 3] = 299
    for image_id, mask in truth.items():
        save(mask, image_id)
    result = wsss(
        *("evaluate", "--gt", tmp_path / "truth", "--cache", cache.path, "--json", tmp_path / "scores.json"),
        *("--images", world / "images", "--report", tmp_path / "report.html"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "scores.json").read_text())["per_class_iou"]
    present = {name: iou for name, iou in found.items() if iou is not None}
    assert present == {"background": 1.0, "c255": 1.0, "c260": 1.0, "c299": 0.0}
    save(np.full(truth["a"].shape, 255, np.uint8), "a")
    result = wsss("evaluate", "--gt", tmp_path / "truth", "--cache", cache.path)
    assert "255 in 8 bits is class 255 or no label" in result.stderr, "nobody can tell"


def test_exports_hold_the_values(cache: MaskCache, tmp_path: Path) -> None:
    result = wsss("export-masks", "--cache", cache.path, "--out", tmp_path / "png", "--min-confidence", 0.99)
    assert result.exit_code == 0, result.output
    for image_id in cache:
        record = cache[image_id]
        expected = np.where(record.confidence >= 198, record.mask, WIDE_IGNORE)
        assert np.array_equal(index_file(tmp_path / "png" / f"{image_id}.png"), expected)
    assert (index_file(tmp_path / "png" / "a.png") == WIDE_IGNORE).any()
    wsss("export-masks", "--cache", cache.path, "--out", tmp_path / "npz", "--format", "npz")
    assert np.array_equal(np.load(tmp_path / "npz/a.npz")["mask"], cache["a"].mask)
    wsss("export-masks", "--cache", cache.path, "--out", tmp_path / "coco", "--format", "coco")
    document = json.loads((tmp_path / "coco/annotations.json").read_text())
    areas = {entry["category_id"]: entry["area"] for entry in document["annotations"]}
    assert {value: areas[value] for value in (255, 260)} == {
        255: (cache["b"].mask == 255).sum(),
        260: (cache["a"].mask == 260).sum(),
    }
    refused = wsss("export-masks", "--cache", cache.path, "--out", tmp_path / "voc", "--format", "voc")
    assert refused.exit_code == 2
    assert "a palette has 256 colours" in refused.stderr


def test_a_network_learns_them_and_predicts(world: Path, cache: MaskCache, run: Path, tmp_path: Path) -> None:
    images = world / "images"
    loaded = load_network(run)
    assert loaded.class_names == tuple(NAMES)
    *_, bias = (values for values in loaded.network.parameters() if values.shape == (1 + COUNT,))
    bias.data[[255, 260]] += 10
    save_network(loaded.network, run / "last", NetworkConfig.model_validate(loaded.config["network"]), NAMES)
    result = wsss("predict", "--checkpoint", run, "--images", images, "--out", tmp_path, "--overlays")
    assert result.exit_code == 0, result.output
    segmenter = Segmenter.load(run, "cpu")
    for image_id in LABELS:
        found = index_file(tmp_path / "masks" / f"{image_id}.png")
        assert set(np.unique(found)) <= {255, 260}
        assert np.array_equal(found, segmenter(images / f"{image_id}.png").mask)
    scores = [
        json.loads(wsss("evaluate", *source, "--gt", tmp_path / "masks", "--json", "-").stdout)["miou"]
        for source in (
            ("--checkpoint", run, "--images", images),
            ("--predictions", tmp_path / "masks", "--classes", ",".join(NAMES)),
        )
    ]
    assert scores == [1.0, 1.0]
    again = wsss("relabel", "--checkpoint", run, "--images", images, "--cache", tmp_path / "next")
    assert again.exit_code == 0, again.output
    assert MaskCache.open(mask_set(again))["a"].mask.dtype == np.uint16


def test_they_have_colours_of_their_own(world: Path, cache: MaskCache, tmp_path: Path) -> None:
    sheet = tmp_path / "preview.png"
    result = wsss("preview", "--cache", cache.path, "--images", world / "images", "--out", sheet)
    assert result.exit_code == 0, result.output
    assert sheet.stat().st_size > 10_000
