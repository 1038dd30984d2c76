from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.cache.cache_samples import MASK_SET, make_digest, make_mask, write_images
from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, open_mask_set
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.errors import ConfigError, MissingDependencyError, OutputError
from wsss_pipeline.stages.export_masks import export_masks

IDS = ["a/b", "a/c/d", "e", "ü v"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return open_mask_set(tmp_path / "cache", MASK_SET)


@pytest.fixture
def cache(folder: Path) -> MaskCache:
    write_images(folder, IDS, cams=True)
    return MaskCache.open(folder)


@pytest.mark.parametrize(("form", "mode"), [("png", "L"), ("voc", "P")])
@pytest.mark.parametrize("min_confidence", [None, 0.6])
def test_pngs_hold_indices(
    cache: MaskCache, tmp_path: Path, form: str, mode: str, min_confidence: float | None
) -> None:
    report = export_masks(cache, tmp_path / "out", form, min_confidence)
    assert (report.written, report.unchanged, report.failed) == (4, 0, {})
    for image_id in IDS:
        expected = make_mask(image_id, cams=True)
        with Image.open(tmp_path / "out" / f"{image_id}.png") as image:
            assert image.mode == mode
            found = np.array(image)
            if mode == "P":
                assert image.getpalette() == voc_palette().ravel().tolist()
        wanted = expected.mask if min_confidence is None else expected.with_ignore(min_confidence)
        np.testing.assert_array_equal(found, wanted)
    assert (found == 255).any() == (min_confidence is not None)


def test_npz_holds_everything_without_pickle(cache: MaskCache, tmp_path: Path) -> None:
    export_masks(cache, tmp_path / "out", "npz")
    for image_id in IDS:
        expected = make_mask(image_id, cams=True)
        with np.load(tmp_path / "out" / f"{image_id}.npz", allow_pickle=False) as found:
            np.testing.assert_array_equal(found["mask"], expected.mask)
            np.testing.assert_array_equal(found["confidence"], expected.confidence)
            np.testing.assert_array_equal(found["cams"], expected.cams)
            assert tuple(found["labels"]) == expected.labels


def test_coco_decodes_to_the_masks(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools import mask as run_lengths

    mask_set = MaskSet(
        name="coco", determinants={"a": 1}, class_names=("cat", "dog"), category_ids={"cat": 17, "dog": 18}
    )
    folder = open_mask_set(tmp_path / "cache", mask_set)
    write_images(folder, IDS)
    report = export_masks(MaskCache.open(folder), tmp_path / "out", "coco", 0.5)
    assert (report.written, report.failed) == (4, {})
    document = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert document["categories"] == [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    assert document["info"]["fingerprint"] == mask_set.fingerprint
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    assert set(sizes.values()) == {(12, 16)}
    found = {image["file_name"]: np.zeros((12, 16), np.uint8) for image in document["images"]}
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for annotation in document["annotations"]:
        region = run_lengths.decode(annotation["segmentation"])
        assert region.sum() == annotation["area"]
        found[names[annotation["image_id"]]][region == 1] = {17: 1, 18: 2}[annotation["category_id"]]
    for image_id in IDS:
        expected = make_mask(image_id).with_ignore(0.5)
        expected[expected == 255] = 0
        np.testing.assert_array_equal(found[image_id], expected)


def test_coco_without_pycocotools_fails_before_any_work(
    cache: MaskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "wsss-pipeline\[export\]"'):
        export_masks(cache, tmp_path / "out", "coco")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["png", "voc", "npz", "coco"])
def test_equal_files_are_left_alone(cache: MaskCache, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    export_masks(cache, out, form)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    report = export_masks(cache, out, form)
    assert (report.written, report.unchanged) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before


@pytest.mark.parametrize("form", ["png", "voc", "npz", "coco"])
def test_other_files_are_replaced_on_demand_and_only_those_of_an_export(
    cache: MaskCache, tmp_path: Path, form: str
) -> None:
    out, suffix = tmp_path / "out", "npz" if form == "npz" else "png"
    export_masks(cache, out, form, 0.6)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    missing = out / ("annotations.json" if form == "coco" else f"e.{suffix}")
    if form != "coco":
        missing.unlink()
        del before[missing]
    with pytest.raises(OutputError, match="holds something else; replace it with --overwrite"):
        export_masks(cache, out, form)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before, "nothing was written"
    assert export_masks(cache, out, form, overwrite=True).written == 4
    foreign = missing
    foreign.write_bytes(b"a picture of somebody's")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="this program didn't write it"):
            export_masks(cache, out, form, 0.9, overwrite)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_nothing_is_written_through_links(cache: MaskCache, tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "file").write_text("precious")
    out.mkdir()
    (out / "a").symlink_to(victim)
    with pytest.raises(OutputError, match="links aren't followed"):
        export_masks(cache, out, "png", overwrite=True)
    (out / "a").unlink()
    (out / "e.png").symlink_to(victim / "file")
    with pytest.raises(OutputError, match="didn't write it"):
        export_masks(cache, out, "png", overwrite=True)
    assert [(path.name, path.read_text()) for path in victim.iterdir()] == [("file", "precious")]


@pytest.mark.parametrize("where", [".", "cache/{name}", "cache/{name}/deeper"])
def test_the_mask_set_is_only_read(cache: MaskCache, tmp_path: Path, where: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"--cache .* that is only read"):
        export_masks(cache, tmp_path / where.format(name=cache.path.name), "png", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_records_and_unsafe_ids_are_skipped_and_reported(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsss_pipeline.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    ids = ["good", "bad", "../escape", ".", "x" * 300, "/etc/passwd"]
    with MaskWriter(folder) as writer:
        for image_id in ids:
            writer.write(image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=0.0)
    (shard,) = folder.glob("shard-*.h5")
    with h5py.File(shard, "r+") as file:
        file["images/bad"].attrs["record_digest"] = "0" * 64
    with caplog.at_level(logging.INFO):
        report = export_masks(MaskCache.open(folder), tmp_path / "out", "png")
    assert "6/6 images" in capsys.readouterr().err.split("5 failed")[-2]
    assert report.written == 1
    assert set(report.failed) == set(ids) - {"good"}
    assert all("\n" not in reason for reason in report.failed.values())
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["good.png"]
    assert not (tmp_path / "escape.png").exists()
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 5


def test_progress_is_shown(
    cache: MaskCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("wsss_pipeline.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        export_masks(cache, tmp_path / "out", "png")
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{done}/4 images" for done in (1, 2, 3, 4)
    ]


def test_wrong_arguments_are_one_line(cache: MaskCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        export_masks(cache, tmp_path / "out", "png", min_confidence=95)
    with pytest.raises(ConfigError, match="choose one of png, voc, npz, coco"):
        export_masks(cache, tmp_path / "out", "jpeg")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no file in it where a folder should be"):
        export_masks(cache, tmp_path / "file" / "out", "png")


def test_reasons_and_folders(folder: Path, tmp_path: Path) -> None:
    ids = ["a/b/c", f"{'d' * 300}/e", "f" * 251, "f" * 252, "../g"]
    with MaskWriter(folder) as writer:
        for image_id in ids:
            writer.write(image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=0.0)
    cache = MaskCache.open(folder)
    report = export_masks(cache, tmp_path / "new" / "out", "png")
    assert set(report.failed) == {ids[1], ids[3], ids[4]}
    assert (
        report.failed[ids[3]]
        == f"mask set {cache.path}: image id '{'f' * 80}...' is too long for a file name"
    )
    assert report.failed[ids[4]].startswith(f"mask set {cache.path}: image id '../g' has")
    assert (tmp_path / "new" / "out" / "a" / "b" / "c.png").exists()
    assert (tmp_path / "new" / "out" / f"{ids[2]}.png").exists()
    coco = export_masks(cache, tmp_path / "other" / "out", "coco")
    assert set(coco.failed) == set(report.failed)
    document = json.loads((tmp_path / "other" / "out" / "annotations.json").read_text())
    assert [item["id"] for item in document["annotations"]] == list(
        range(1, len(document["annotations"]) + 1)
    )
    assert {item["iscrowd"] for item in document["annotations"]} == {0}
    assert all(len(item["bbox"]) == 4 for item in document["annotations"])
    assert document["info"]["fingerprint"] == MASK_SET.fingerprint
