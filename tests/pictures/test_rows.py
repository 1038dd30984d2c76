"""Rows: an image beside its masks, with what can't be read marked; the sheet they are drawn on; mask files."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import MaskError
from wsss_pipeline.pictures import overlays
from wsss_pipeline.pictures.contact_sheet import draw_sheet, draw_text, font_and_text
from wsss_pipeline.pictures.overlays import LONGEST_JPEG, encoded, index_png, mask_over_image
from wsss_pipeline.pictures.rows import GROUND_TRUTH, PSEUDO_MASK, make_row

BOX = (80, 60)
NAMES = tuple("abcdef")


class Masks:
    """A ``MaskSource`` of given records; one that is an error is raised."""

    class_names = NAMES
    identity = description = "masks"

    def __init__(self, **records: PseudoMask | MaskError) -> None:
        self.records = records

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.records

    def __getitem__(self, image_id: str) -> PseudoMask:
        record = self.records[image_id]
        if isinstance(record, MaskError):
            raise record
        return record


def record(labels: tuple[str, ...] = ("b", "f"), cams: bool = False) -> PseudoMask:
    """A quarter of it is class b."""
    mask = np.zeros((40, 40), np.uint8)
    mask[:20, :20] = 2
    confidence = np.full((40, 40), 190, np.uint8)
    confidence[:10] = 189
    maps = np.full((len(labels), 40, 40), 0.5, np.float16) if cams else None
    return PseudoMask(mask, confidence, labels, maps)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def texts(cell: object) -> list[str]:
    return [label.text for label in cell.caption]  # type: ignore[attr-defined]


def test_a_pseudo_mask_comes_with_confidence_and_cams_another_mask_alone(image: Path) -> None:
    masks = Masks(one=record(cams=True))
    row = make_row("one", image, {PSEUDO_MASK: masks, GROUND_TRUTH: masks}, BOX, "a note")
    titles = ["Image", "Pseudo mask", "Confidence", "Class activation", "Class activation", "Ground truth"]
    assert [cell.title for cell in row.cells] == titles
    assert row.note == "a note; b, f"
    assert all(cell.pixels is not None and cell.pixels.shape == (60, 60, 3) for cell in row.cells)
    whole, mask, confidence, cam, _, truth = row.cells
    assert texts(whole) == ["40x40"]
    assert texts(mask) == texts(truth) == ["b 25 %", "f 0 %"]
    assert [label.colour for label in mask.caption] == [tuple(voc_palette()[2]), tuple(voc_palette()[6])]
    assert texts(confidence) == ["mean 0.95, 75 % from 0.95 up"]
    assert texts(cam) == ["b", "maximum 0.50"]


def test_classes_are_named_without_labels_and_the_background_alone_is_said(image: Path) -> None:
    empty = PseudoMask(np.zeros((40, 40), np.uint8), np.full((40, 40), 200, np.uint8))
    for shown, expected in ((record(()), ["b 25 %"]), (empty, ["background only"])):
        row = make_row("one", image, {PSEUDO_MASK: Masks(one=shown)}, BOX)
        assert texts(row.cells[1]) == expected
        assert row.note == "no labels"


def test_four_cams_are_shown_and_it_is_said(image: Path) -> None:
    row = make_row("one", image, {PSEUDO_MASK: Masks(one=record(NAMES[:5], cams=True))}, BOX)
    assert [cell.title for cell in row.cells].count("Class activation") == 4
    assert row.note == "a, b, c, d, e (activation of the first 4 only)"
    row = make_row("one", image, {PSEUDO_MASK: Masks(one=record(NAMES[:4], cams=True))}, BOX)
    assert row.note == "a, b, c, d"


def test_what_cannot_be_read_is_marked_and_logged_the_rest_is_drawn(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = Masks(one=record())
    with caplog.at_level(logging.WARNING):
        absent = make_row("one", None, {PSEUDO_MASK: masks}, BOX)
        damaged = make_row("one", image, {PSEUDO_MASK: Masks(one=MaskError("damaged")), "Other": masks}, BOX)
        elsewhere = make_row("one", image, {PSEUDO_MASK: Masks()}, BOX)
    assert absent.cells[0].pixels is None
    assert "no image with this id" in absent.cells[0].problem
    assert absent.cells[1].pixels is not None
    assert (damaged.cells[1].problem, damaged.cells[2].title) == ("damaged", "Other")
    assert [cell.title for cell in elsewhere.cells] == ["Image"]
    assert [line.message for line in caplog.records] == [f"one: {absent.cells[0].problem}", "one: damaged"]
    Image.new("RGB", (10, 20)).save(tmp_path / "other.png")
    other = make_row("one", tmp_path / "other.png", {PSEUDO_MASK: masks}, BOX)
    assert "the image is 10x20, its mask 40x40" in other.cells[1].problem


def test_a_sheet_has_a_column_for_each_cell_of_the_longest_row(image: Path) -> None:
    short = make_row("one", image, {PSEUDO_MASK: Masks(one=MaskError("damaged " * 30))}, BOX)
    long = make_row("one", image, {PSEUDO_MASK: Masks(one=record(NAMES[:2], cams=True))}, BOX)
    one, both = draw_sheet("title", [short]), draw_sheet("title", [short, long])
    assert both.width - one.width == 3 * (240 + 12)
    assert both.height > one.height


def test_text_is_drawn_in_any_script_or_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert font_and_text("a/cat 1", 13)[1] == "a/cat 1"
    assert font_and_text("a\nb\x1b", 13)[1] == "a\\nb\\x1b"
    monkeypatch.setattr("wsss_pipeline.pictures.contact_sheet.SYSTEM_FONTS", ())
    assert font_and_text("a 猫", 13)[1] == "a \\u732b"


@pytest.mark.parametrize("text", ["", "short", "wide " * 100, "unbroken" * 100])
@pytest.mark.parametrize("keep_end", [False, True])
def test_text_never_leaves_its_width(text: str, keep_end: bool) -> None:
    sheet = Image.new("RGB", (400, 40), "white")
    end = draw_text(ImageDraw.Draw(sheet), (10, 5), text, 15, 200, keep_end=keep_end)
    assert 10 <= end <= 210
    assert end > 190 or len(text) < 6
    assert (np.asarray(sheet)[:, 212:] == 255).all()


@pytest.mark.parametrize("with_palette", [True, False])
def test_mask_files_hold_class_indices(with_palette: bool) -> None:
    mask = record().mask
    with Image.open(io.BytesIO(index_png(mask, with_palette=with_palette))) as file:
        assert (file.format, file.mode) == ("PNG", "P" if with_palette else "L")
        assert np.array_equal(np.array(file), mask)
        if with_palette:
            assert file.getpalette() == voc_palette().reshape(-1).tolist()


def test_an_overlay_is_the_same_however_many_rows_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    image = chance.integers(0, 256, (23, 17, 3), dtype=np.uint8)
    mask = chance.integers(0, 3, (23, 17), dtype=np.uint8)
    expected = mask_over_image(image, mask)
    for pixels in (1, 40):
        monkeypatch.setattr(overlays, "_PIXELS_AT_A_TIME", pixels)
        assert np.array_equal(mask_over_image(image, mask), expected)


@pytest.mark.parametrize("size", [(120_000, 1), (1, 120_000)])
def test_a_picture_too_long_for_a_jpeg_is_scaled_down(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    with Image.open(io.BytesIO(encoded(picture, "JPEG"))) as read:
        assert sorted(read.size) == [1, LONGEST_JPEG]
    assert picture.size == size
