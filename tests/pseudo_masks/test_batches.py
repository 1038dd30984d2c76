"""The GPU's way from pictures to masks, run on the CPU, against the CPU's own way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from wsss_pipeline.stages.labelling import DeviceBatches

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.stages import mask_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=5, scenes={"train": 9})
    (folder / "JPEGImages" / "train_00003.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def generate(root: Path, tmp_path: Path) -> Callable[..., MaskCache]:
    def run(name: str, *further: object) -> MaskCache:
        result = wsss(
            *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
            *("--device", "cpu", "--precision", "fp32", "--offline", "--cache", tmp_path / name, *further),
        )
        assert "1 images failed" in result.stderr
        return MaskCache.open(mask_set(result))

    return run


@pytest.mark.parametrize("further", [(), ("--crf", "none"), ("--max-pixels", "9000", "--store-cams")])
def test_batches_on_a_device_give_the_masks_of_threads(
    generate: Callable[..., MaskCache], monkeypatch: pytest.MonkeyPatch, further: tuple[str, ...]
) -> None:
    expected = generate("threads", *further)
    monkeypatch.setattr(mask_run, "way_of_labelling", lambda crf, device: DeviceBatches)
    found = generate("batches", "--batch-size", 3, *further)
    assert set(found) == set(expected)
    assert len(found) == 8
    for image_id in expected:
        ours, theirs = found[image_id], expected[image_id]
        assert (ours.mask == theirs.mask).mean() > 0.999
        assert abs(ours.confidence.astype(int) - theirs.confidence.astype(int)).mean() < 0.05
        assert (ours.cams is None) == (theirs.cams is None)
