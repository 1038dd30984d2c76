"""Ground truth as other tools write it: read right, or refused with the cause."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.errors import ImageError, MaskError

NAMES = ("ball", "kite")
INDICES = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
LABELMAP = "# label:color_rgb:parts:actions\nkite:51,221,255::\nbackground:10,10,10::\nball:250,50,83::\n"
COLORS = np.array([[10] * 3, [250, 50, 83], [51, 221, 255], [255, 204, 51]], np.uint8)


def folder(tmp_path: Path, *masks: np.ndarray | Image.Image, labelmap: str = "", beside: bool = True) -> Path:
    """``SegmentationClass/0.png`` and so on, with ``labelmap.txt`` beside or in it."""
    path = tmp_path / "SegmentationClass"
    path.mkdir()
    for number, mask in enumerate(masks):
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(path / f"{number}.png")
    if labelmap:
        ((tmp_path if beside else path) / "labelmap.txt").write_text(labelmap)
    return path


def palette(indices: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(np.asarray(colors, np.uint8).tobytes())
    return image


def values(path: Path, names: tuple[str, ...] = NAMES, **options: object) -> list[list[int]]:
    masks = MaskFolder(path, names, "ground truth", **options)
    assert masks["0"].mask.dtype == np.uint8
    return masks["0"].mask.tolist()


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_cvats_labelmap(tmp_path: Path, mode: str, beside: bool) -> None:
    """Its order isn't the class set's, its background isn't black, and what it calls ignored is left out."""
    places = np.array([[0, 1, 2], [2, 3, 0]], np.uint8)
    image = palette(places, COLORS) if mode == "P" else Image.fromarray(COLORS[places]).convert(mode)
    path = folder(tmp_path, image, labelmap=f"{LABELMAP}Ignored:255,204,51::\n", beside=beside)
    assert values(path) == INDICES.tolist()


def test_colours_of_the_class_set(tmp_path: Path) -> None:
    red_and_blue = np.array([[[0, 0, 0], [200, 0, 0], [0, 0, 200]]], np.uint8)
    path = folder(tmp_path, red_and_blue)
    colors = {(0, 0, 0): 0, (200, 0, 0): 2, (0, 0, 200): 1}
    assert values(path, colors=colors) == [[0, 2, 1]]
    (path / "labelmap.txt").write_text("ball:200,0,0::\nkite:0,0,200::\n")
    assert values(path, colors=colors) == [[0, 1, 2]], "the file that came with the masks knows better"


def test_labels_and_colours_that_are_no_class_end_the_run(tmp_path: Path) -> None:
    path = folder(tmp_path, COLORS[[[0, 1, 3]]], labelmap=f"{LABELMAP}tree:255,204,51::\n")
    with pytest.raises(
        MaskError, match=r"0.png: the colour 255,204,51 is 'tree', which is no class .*; add it"
    ):
        values(path)
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    with pytest.raises(
        MaskError, match=r"0.png: the colour 255,204,51 is no class's \(0,0,0; 51,221,255; 10,10"
    ):
        values(path)
    (tmp_path / "labelmap.txt").write_text("kite\n")
    with pytest.raises(MaskError, match=r"labelmap.txt line 1: 'kite' isn't 'name:r,g,b:parts:actions'"):
        values(path)
    (tmp_path / "labelmap.txt").write_text("ball:::\n")
    with pytest.raises(
        MaskError, match=r"none of the masks can be read; the first: .*put CVAT's labelmap.txt"
    ):
        values(path)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(INDICES),
        Image.fromarray(INDICES.astype(np.uint16)),
        Image.fromarray(np.repeat(INDICES[..., None], 3, axis=2)),
        palette(INDICES, voc_palette()),
        palette(INDICES, np.random.default_rng(0).integers(0, 255, (256, 3))),
    ],
    ids=["grey", "16 bits", "three equal channels", "VOC's palette", "another palette"],
)
def test_indices_in_all_their_forms(tmp_path: Path, image: Image.Image) -> None:
    assert values(folder(tmp_path, image)) == INDICES.tolist()


def test_vocs_palette_and_grey_files_keep_their_indices_beside_a_labelmap(tmp_path: Path) -> None:
    path = folder(tmp_path, palette(INDICES, voc_palette()), INDICES, labelmap=LABELMAP)
    masks = MaskFolder(path, NAMES)
    assert masks["0"].mask.tolist() == masks["1"].mask.tolist() == INDICES.tolist()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.array([[0, 0, 255]], np.uint8), "hold 0 and 255 only: binary masks?"),
        (
            np.array([[0, 3, 255]], np.uint8),
            "0.png holds values 3, but with 2 classes .*the masks belong to another",
        ),
        (np.array([[0, 127, 255]], np.uint8), "holds values 127, .*indices stretched to 0..255 .*by 127.5"),
        (np.array([[0, 38, 75]], np.uint8), "grey levels of the VOC colours"),
        (np.array([[0, 1000, 26001]], np.uint16), "can be read; the first: .*values run from 0 to 26001"),
        (
            voc_palette()[INDICES],
            "can be read; the first: .*holds colours; .* or give a class set with a 'color'",
        ),
        (np.arange(250, dtype=np.uint8)[None], "look like grey levels or colours"),
    ],
)
def test_what_cant_be_what_it_says_is_found_at_once(tmp_path: Path, mask: np.ndarray, reason: str) -> None:
    path = folder(tmp_path, mask, mask)
    with pytest.raises(MaskError, match=reason) as caught:
        MaskFolder(path, NAMES, "ground truth")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_objects_in_any_mask_say_that_255_is_no_label(tmp_path: Path) -> None:
    """Only some are read at once; before all are called binary, the others are looked at."""
    without = np.array([[0, 0, 255]], np.uint8)
    masks = [without] * 65
    masks[1] = np.array([[0, 1, 255]], np.uint8)
    assert len(MaskFolder(folder(tmp_path, *masks), NAMES, "ground truth").files) == 65


def test_classes_counted_from_0_are_hinted_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path, np.array([[255, 255, 255, 0, 1]], np.uint8))
    MaskFolder(path, NAMES, "ground truth")
    assert "255 covers 60 % of the pixels" in caplog.text
    assert "the last class, 2, never occurs: are classes counted from 0 there" in caplog.text
    caplog.clear()
    Image.fromarray(np.array([[0, 0, 0, 255, 1]], np.uint8)).save(path / "0.png")
    MaskFolder(path, NAMES, "ground truth")
    assert not caplog.messages, "borders without a label, in masks without the last class"
    Image.fromarray(np.array([[255, 255, 255, 0, 1]], np.uint8)).save(path / "0.png")
    Image.fromarray(np.array([[255, 255, 255, 0, 2]], np.uint8)).save(path / "1.png")
    MaskFolder(path, NAMES, "ground truth")
    assert not caplog.messages


def test_one_mask_that_cant_be_read_is_left_for_later(tmp_path: Path) -> None:
    path = folder(tmp_path, INDICES)
    (path / "1.png").write_bytes(b"no image")
    masks = MaskFolder(path, NAMES)
    with pytest.raises(ImageError):
        masks["1"]


def test_sizes_that_fit_no_image_are_found(tmp_path: Path) -> None:
    masks = MaskFolder(
        folder(tmp_path, np.ones((4, 6), np.uint8), np.ones((4, 6), np.uint8)), NAMES, "ground truth"
    )
    images = {}
    for name, size in (("0", (4, 6)), ("1", (8, 12)), ("new", (1, 1))):
        images[name] = tmp_path / f"{name}.jpg"
        Image.new("RGB", size).save(images[name])
    with pytest.raises(MaskError, match=r"the mask of '0' is 6x4, its image 4x6: one of the two was rotated"):
        masks.check_sizes(images)
    Image.new("RGB", (6, 4)).save(images["1"])
    masks.check_sizes(images)
    masks.check_sizes({})


def test_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    path = folder(tmp_path, INDICES)
    decomposed = unicodedata.normalize("NFD", "übung")
    (path / "0.png").rename(path / f"{decomposed}.png")
    masks = MaskFolder(path, NAMES)
    assert "übung" in masks
    assert masks["übung"].mask.tolist() == INDICES.tolist()
    assert "u" not in masks
