"""The page of an evaluation: its parts, and that it is whole, self-contained and escaped."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.evaluation.result import Evaluation, Variant
from wsss_pipeline.pictures.evaluation_page import (
    class_entries,
    confidence_page,
    confusion_texts,
    data_uri,
    evaluation_page,
    row_percentages,
)

SCORES = Scores(
    miou=0.6,
    miou_predicted_or_present=0.45,
    per_class_iou={"background": 0.9, "cat": 0.3, "猫": None},
    pixel_accuracy=0.95,
    mean_accuracy=0.7,
    frequency_weighted_iou=0.85,
    ignored_predictions=0.0125,
)


def test_classes_have_the_colours_of_the_masks() -> None:
    entries = class_entries(SCORES, ("cat", "猫"))
    assert [(entry.name, entry.colour) for entry in entries] == [
        *(("background", (0, 0, 0)), ("cat", (128, 0, 0)), ("猫", (0, 128, 0)))
    ]
    assert [entry.text for entry in entries] == ["90.00", "30.00", "not in the ground truth"]
    assert [entry.percent for entry in entries] == [90.0, 30.0, 0.0]
    assert [entry.text for entry in class_entries(None, ("cat",))] == ["", ""]


def test_confusions_are_the_largest_shares_of_a_row() -> None:
    matrix = np.array([[90, 10, 0, 0], [30, 60, 0, 10], [0, 0, 0, 0]])
    assert row_percentages(matrix).tolist() == [[90, 10, 0, 0], [30, 60, 0, 10], [0, 0, 0, 0]]
    assert confusion_texts(matrix, ("cat", "dog")) == [
        "30.0 % of cat is taken for background",
        "10.0 % of background is taken for cat",
        "10.0 % of cat is taken for no label",
    ]
    tiny = np.array([[99_960, 40, 0], [0, 100, 0]])
    assert confusion_texts(tiny, ("cat",)) == []  # under 0.05 %
    assert confusion_texts(np.array([[9995, 5, 0], [0, 100, 0]]), ("cat",)) == [
        "0.1 % of background is taken for cat"
    ]


def test_a_picture_is_a_jpeg_within_the_page() -> None:
    pixels = np.full((9, 7, 3), (200, 30, 30), np.uint8)
    kind, _, content = data_uri(pixels).partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.format == "JPEG"
    assert picture.size == (7, 9)
    assert np.abs(np.asarray(picture).astype(int) - pixels).max() < 8

    one = np.array([[0, 1, 0], [0, 5, 0]])
    assert row_percentages(one).tolist() == [[0, 100, 0], [0, 100, 0]]


class Texts(HTMLParser):
    """All text and attributes of a page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.alternatives: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.alternatives += [value or "" for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = "<script>alert(1)</script>"


def hostile_folder(tmp_path: Path) -> MaskFolder:
    """A mask and an image, their id HTML, and one of another size."""
    for name, size in (("a<i>", (20, 30)), ("b", (9, 9))):
        mask = np.zeros(size, np.uint8)
        mask[2:8, 2:8] = 1
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return MaskFolder(tmp_path / "masks", [HOSTILE, "dog"])


def test_the_page_of_an_evaluation_holds_what_it_is_given_and_escapes_it(tmp_path: Path) -> None:
    masks = hostile_folder(tmp_path)
    images = {name: tmp_path / "images" / f"{name}.png" for name in ("a<i>", "b")}
    mask = masks["a<i>"].mask
    matrix = confusion_matrix(mask, mask, 3)
    scores = Scores.from_matrix(matrix, ("background", HOSTILE, "dog"))
    evaluation = Evaluation(
        variants={"": Variant(scores, None)},
        class_names=masks.class_names,
        source="masks <b>",
        ground_truth="truth & more",
        split="<u>",
        min_confidence=None,
        image_miou={"a<i>": 1.0, "b": 0.25, "gone": 0.5},
        matrix=matrix,
    )
    html = evaluation_page(evaluation, images, {"Prediction": masks}, {"checkpoint": {"<b>": "猫"}})
    assert html.startswith("<!DOCTYPE html>")
    page = Texts(html)
    assert not {"script", "i", "b", "u"} & page.tags
    text = "".join(page.texts)
    for expected in (
        *("Evaluation on <u>", "100.00 %", "masks <b>", "truth & more", HOSTILE, "<b>: 猫"),
        *("mIoU over its own classes 25.0 %", f"Prediction: {HOSTILE} 6 %"),
        *("the image is 30x20, its mask 9x9", "no image with this id"),
    ):
        assert expected in text, expected
    assert "Image of a<i>" in page.alternatives
    assert text.index("25.0 %") < text.index("50.0 %") < text.index("100.0 %"), "the worst first"


def test_the_page_without_ground_truth_shows_the_least_certain_first(tmp_path: Path) -> None:
    masks = hostile_folder(tmp_path)
    images = {name: tmp_path / "images" / f"{name}.png" for name in ("a<i>", "b")}
    html = confidence_page(
        {"a<i>": 80.0, "b": 40.0}, {"a<i>": 33.0}, images, {"Pseudo mask": masks, "Prediction": masks}, {}
    )
    page = Texts(html)
    text = "".join(page.texts)
    assert not {"script", "i"} & page.tags
    assert text.index("mean confidence 40.0 %") < text.index("mean confidence 80.0 %")
    assert "Mean confidence" in text
    assert "60.0 %" in text
    assert "33.0 % of the pixels agree" in text
    assert "Largest disagreement" in text
    assert HOSTILE in text
    without = confidence_page({"b": 40.0}, {}, images, {"Pseudo mask": masks}, {})
    assert "disagreement" not in without
