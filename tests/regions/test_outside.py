"""Regions that others made, superpixels, and what a name stands for."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from wsss_pipeline.errors import ConfigError, ImageError, MissingDependencyError, RegionError, ResourceError
from wsss_pipeline.regions import outside
from wsss_pipeline.regions.outside import JsonRegions, LabelImages, uncompressed
from wsss_pipeline.regions.regions import PART, WHOLE, Regions, run_lengths
from wsss_pipeline.regions.sources import open_regions
from wsss_pipeline.regions.superpixels import Slic, SlicConfig, regions_of_labels

SIZE = (9, 7)
PIXELS = np.zeros((*SIZE, 3), np.uint8)
MASKS = np.random.default_rng(0).random((3, *SIZE)) < 0.5
COUNTS = [run_lengths(mask).tolist() for mask in MASKS]


def annotation(number: int, **further: Any) -> dict[str, Any]:
    return {"segmentation": {"size": list(SIZE), "counts": COUNTS[number]}, "bbox": [0, 0, 1, 1], **further}


def put(folder: Path, name: str, content: object) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_files_of_sa_1b_are_read(tmp_path: Path) -> None:
    scores = {"predicted_iou": 0.75, "stability_score": 0.5, "point_coords": [[2.5, 3.5]], "level": PART}
    put(
        tmp_path,
        "a/b.json",
        {"image": {"image_id": 1}, "annotations": [annotation(0), annotation(1, **scores)]},
    )
    put(tmp_path, "list.json", [annotation(2)])  # as SAM's own script writes them
    put(tmp_path, "none.json", {"annotations": []})
    regions = open_regions(str(tmp_path))
    found = regions("a/b", PIXELS)
    assert (found.masks() == MASKS[:2]).all()
    assert found.levels.tolist() == [WHOLE, PART]
    assert found.iou.tolist() == [1, 0.75]
    assert found.stability.tolist() == [1, 0.5]
    assert np.isnan(found.points[0]).all()
    assert found.points[1].tolist() == [2.5, 3.5]
    assert (regions("list", PIXELS).masks() == MASKS[2:]).all()
    assert len(regions("none", PIXELS)) == 0


@given(arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_compressed_runs_are_those_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    text = coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    assert uncompressed(text).tolist() == run_lengths(mask).tolist()


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rle = coco.encode(np.asfortranarray(MASKS[0], np.uint8))
    put(tmp_path, "a.json", {"annotations": [{"segmentation": {**rle, "counts": rle["counts"].decode()}}]})
    assert (JsonRegions(tmp_path)("a", PIXELS).masks()[0] == MASKS[0]).all()


def test_a_region_may_begin_with_the_first_pixel_or_be_of_no_pixel(tmp_path: Path) -> None:
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 0, 0], masks[1] = True, True
    counts = [run_lengths(mask).tolist() for mask in masks]
    put(tmp_path, "a.json", [{"segmentation": {"size": SIZE, "counts": runs}} for runs in counts])
    assert (JsonRegions(tmp_path)("a", PIXELS).masks() == masks).all()


def segmentation(**values: object) -> dict[str, Any]:
    return {"annotations": [{"segmentation": {"size": list(SIZE), "counts": COUNTS[0], **values}}]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], None),
        ({}, "annotations"),
        (3, ""),
        (segmentation(counts=[1, 2]), "fill 9 x 7"),
        (segmentation(counts=[]), "don't fit"),
        (segmentation(counts=[64]), "don't fit"),
        (segmentation(counts=[64, -1]), "counts"),
        (segmentation(counts=[2**70]), "counts"),
        (segmentation(counts=[1.5]), "counts"),
        (segmentation(counts=""), "don't fit"),
        (segmentation(counts="o"), "cut off"),
        (segmentation(counts="ooooooooooo0"), "cut off"),
        (segmentation(counts="\u00e9"), "strange characters"),
        (segmentation(counts="~\x01"), "strange characters"),
        (segmentation(size=[7, 9]), "9 x 7 pixels, the image has 7 x 9"),
        (segmentation(size=[2**40, 2**40]), "the image has 7 x 9"),
        ({"annotations": [{"segmentation": [[0, 0, 1, 1, 2, 0]]}]}, "segmentation"),  # polygons
        ({"annotations": [annotation(0, level=3)]}, "level"),
        ({"annotations": [annotation(0, predicted_iou="nan")]}, "predicted_iou"),
        ({"annotations": [annotation(0)] * (2**14 + 1)}, "an image may have"),
        ({"annotations": [annotation(0, point_coords=[[0, 0]] * (2**16 + 1))]}, "point_coords"),
    ],
)
def test_foreign_json_brings_regions_or_a_line(tmp_path: Path, content: object, why: str | None) -> None:
    put(tmp_path, "a.json", content)
    if why is None:
        assert len(JsonRegions(tmp_path)("a", PIXELS)) == 0
        return
    with pytest.raises(RegionError, match=r"a\.json") as caught:
        JsonRegions(tmp_path)("a", PIXELS)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files_that_are_no_json_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_text(" " * 3000)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "gone.json").symlink_to("nowhere")
    monkeypatch.setattr(outside, "MAX_JSON_BYTES", 2**20)
    regions = JsonRegions(tmp_path)
    monkeypatch.setattr(outside, "MAX_JSON_BYTES", 2000)
    for image_id in ("deep", "large", "pipe", "gone"):
        with pytest.raises(RegionError, match=image_id):
            regions(image_id, PIXELS)


def test_ids_are_no_paths(tmp_path: Path) -> None:
    put(tmp_path, "outside.json", [annotation(0)])
    put(tmp_path, "in/a.json", [annotation(0)])
    regions = JsonRegions(tmp_path / "in")
    for image_id in ("../outside", str(tmp_path / "outside"), "a/../a", "b\n"):
        with pytest.raises(RegionError, match="has no regions"):
            regions(image_id, PIXELS)


def test_a_folder_is_known_by_names_and_content(tmp_path: Path) -> None:
    put(tmp_path, "a.json", [annotation(0)])
    first = JsonRegions(tmp_path).identity
    os.utime(tmp_path / "a.json", (0, 0))
    assert JsonRegions(tmp_path).identity == first
    put(tmp_path, "a.json", [annotation(1)])
    second = JsonRegions(tmp_path).identity
    put(tmp_path, "b.json", [annotation(1, level=1)])
    third = JsonRegions(tmp_path).identity
    put(tmp_path, "b.json", [annotation(1, level=2)])  # of the same size
    assert len({str(first), str(second), str(third), str(JsonRegions(tmp_path).identity)}) == 4


def test_of_a_large_folder_a_part_is_read_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_LOOKED_INTO", 3)
    for number in range(7):
        put(tmp_path, f"{number}.json", [annotation(0, level=1)])
    before, noticed = JsonRegions(tmp_path).identity, []
    for number in range(7):
        put(tmp_path, f"{number}.json", [annotation(0, level=2)])
        noticed.append(JsonRegions(tmp_path).identity != before)
        put(tmp_path, f"{number}.json", [annotation(0, level=1)])
    assert noticed == [True, False, False, True, False, False, True]
    put(tmp_path, "4.json", [annotation(0, level=1, stability_score=1)])  # another size is seen in any file
    assert JsonRegions(tmp_path).identity != before


def test_a_folder_is_not_taken_for_another_where_files_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a.json", [annotation(0)])

    def too_many(file: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(outside, "file_digest", too_many)
    with pytest.raises(ResourceError, match="Too many open files"):
        JsonRegions(tmp_path)


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-2, 4)))
def test_each_value_is_a_region(labels: np.ndarray) -> None:
    regions = regions_of_labels(labels)
    regions.check("a")
    expected = Regions.of_masks(np.stack([labels == value for value in np.unique(labels)]))
    for name in ("counts", "lengths", "levels", "iou", "stability", "points"):
        np.testing.assert_array_equal(getattr(regions, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette"])
def test_label_images_are_read(tmp_path: Path, kind: str) -> None:
    labels = np.arange(63).reshape(SIZE) // 9 * (1000 if kind == "16 bits" else 1)
    image = Image.fromarray(labels.astype(np.uint16 if kind == "16 bits" else np.uint8))
    if kind == "palette":
        image.putpalette([7] * 768)  # all of one colour
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "b.png")
    found = open_regions(str(tmp_path))("a/b", PIXELS)
    assert (found.masks() == np.stack([labels == value for value in np.unique(labels)])).all()
    assert (found.levels == WHOLE).all()


def test_label_images_that_are_none_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, values in {
        "colour.png": rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8),
        "photo.jpg": np.zeros(SIZE, np.uint8),
        "small.png": np.zeros((3, 3), np.uint8),
        "noise.png": rng.permutation(2**15).reshape(128, 256).astype(np.uint16),
    }.items():
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    regions = LabelImages(tmp_path)
    for image_id, why in {
        "colour": "one number a pixel",
        "photo": "one number a pixel",
        "small": "3 x 3 pixels, the image 7 x 9",
        "bad": "can't be read",
        "gone": "has no regions",
        "../small": "has no regions",
    }.items():
        with pytest.raises(RegionError, match=why):
            regions(image_id, PIXELS)
    with pytest.raises(RegionError, match="32768 values"):
        regions("noise", np.zeros((128, 256, 3), np.uint8))


def test_superpixels_cover_the_image_and_follow_their_settings() -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    pixels += rng.integers(0, 9, pixels.shape).astype(np.uint8)
    source = open_regions("slic")
    found = source("a", pixels)
    assert (found.masks().sum(axis=0) == 1).all()
    assert (found.levels == WHOLE).all()
    assert 100 < len(found) < 500
    again = Slic(SlicConfig())("b", pixels)
    np.testing.assert_array_equal(found.counts, again.counts)
    assert source.identity == Slic(SlicConfig()).identity
    for config in (SlicConfig(segments=20), SlicConfig(compactness=0.1), SlicConfig(sigma=3.0)):
        other = open_regions("slic", config)
        assert other.identity != source.identity
        assert not np.array_equal(other("a", pixels).counts, found.counts)


def test_a_pixel_is_a_superpixel() -> None:
    assert len(open_regions("slic")("a", np.zeros((1, 1, 3), np.uint8))) == 1


def test_more_superpixels_than_an_image_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_pipeline.regions.regions.MAX_REGIONS", 10)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    with pytest.raises(RegionError, match=r"a/b: .*an image may have 10"):
        open_regions("slic", SlicConfig(segments=40, compactness=100.0))("a/b", pixels)


def test_without_scikit_image_its_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .wsss-pipeline\[regions\]"):
        open_regions("slic")


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        open_regions(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no region set, no JSON files and no label images"):
        open_regions(str(tmp_path))
    put(tmp_path, "a.json", [])
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="both JSON files and images"):
        open_regions(str(tmp_path))
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "a.bmp")
    with pytest.raises(ImageError, match="same image id"):
        open_regions(str(tmp_path))
