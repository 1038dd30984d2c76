"""The whole command on photographs, against the masks of the published code.

These golden files hold a whole CLIP and are too large for this repository. The folder that has them is
named by WSSS_GOLDEN; without it these tests are skipped, and test_generate_masks.py does the same with smaller
pictures.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.text import TextEncoder

GOLDEN = Path(os.environ.get("WSSS_GOLDEN", "nowhere")) / "clip_es"

pytestmark = [
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="WSSS_GOLDEN names no folder of golden photographs"),
    pytest.mark.skipif(
        importlib.util.find_spec("pydensecrf") is None,
        reason="pydensecrf2 isn't installed; the goldens need it",
    ),
]


def golden(name: str) -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN / "expected" / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("crf_image", "key"), [("reference", "quirk"), ("bgr", "plain")])
def test_masks_differ_in_at_most_5_pixels(tmp_path: Path, crf_image: str, key: str) -> None:
    labels = {name: item["labels"] for name, item in json.loads((GOLDEN / "labels.json").read_text()).items()}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    result = wsss(
        *("generate-masks", "--images", GOLDEN / "images", "--labels", tmp_path / "labels.json"),
        *("--classes", "voc12", "--clip", GOLDEN / "model", "--cache", tmp_path / "cache", "--workers", 0),
        *("--precision", "fp32", "--crf", "pydensecrf", "--crf-image", crf_image, "--store-cams"),
    )
    assert result.exit_code == 0
    with MaskCache.open(mask_set(result)) as cache:
        assert set(cache) == set(labels)
        for name in cache:
            expected = golden(name)
            record = cache[name]
            assert (record.with_ignore(0.95) != expected[f"mask_{key}"]).sum() <= 5
            assert (record.mask != expected[f"label_{key}"]).sum() <= 5
            assert record.cams is not None
            assert np.abs(record.cams.astype(np.float32) - expected["refined_high"]).max() < 1e-3


@pytest.mark.parametrize(("name", "suffix"), [("voc12", ""), ("coco14", "_coco")])
def test_text_rows_within_1e_5(name: str, suffix: str) -> None:
    import torch

    from wsss_pipeline.clip.sources import locate_clip
    from wsss_pipeline.clip.text import class_embeddings
    from wsss_pipeline.clip.weights import load_clip
    from wsss_pipeline.config import ClipConfig
    from wsss_pipeline.data.classes import load_class_set

    clip = load_clip(
        locate_clip(ClipConfig(weights=str(GOLDEN / "model")), offline=True), torch.device("cpu")
    )
    classes = load_class_set(name)
    rows = class_embeddings(classes, classes.templates, TextEncoder(clip.text, clip.tokenizer).encode)
    expected = golden("text")
    assert np.abs(rows.foreground.numpy() - expected[f"fg{suffix}"]).max() < 1e-5
    assert np.abs(rows.background.numpy() - expected[f"bg{suffix}"]).max() < 1e-5
