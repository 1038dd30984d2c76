"""The page of an evaluation: its parts, and that it is whole, self-contained and escaped."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.evaluation.result import Evaluation, Variant
from wsss_pipeline.pictures.evaluation_page import confidence_page, evaluation_page


class Texts(HTMLParser):
    """All text and attributes of a page, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.alternatives: list[str] = []
        self.images: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.alternatives += [value or "" for name, value in attrs if name == "alt"]
        self.images += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(matrix: list[list[int]], class_names: tuple[str, ...]) -> str:
    """The page of an evaluation without images."""
    counts = np.array(matrix)
    scores = Scores.from_matrix(counts, ("background", *class_names))
    evaluation = Evaluation(
        variants={"": Variant(scores, None)},
        class_names=class_names,
        source="masks",
        ground_truth="truth",
        split="val",
        min_confidence=None,
        image_miou={},
        matrix=counts,
    )
    return evaluation_page(evaluation, {}, {}, {})


def test_classes_have_the_colours_of_the_masks_and_their_iou() -> None:
    html = page_of([[90, 10, 0, 0], [30, 60, 0, 10], [0, 0, 0, 0]], ("cat", "猫"))
    rows = re.findall(r"rgb\((.*?)\).*?</span>(.*?)</td><td.*?>(.*?)</td>.*?width: (.*?)%", html)
    assert rows == [
        ("0,0,0", "background", "69.23", "69.23"),
        ("128,0,0", "cat", "54.55", "54.55"),
        ("0,128,0", "猫", "not in the ground truth", "0"),
    ]


def confusions(html: str) -> list[str]:
    return re.findall("<li>(.*?)</li>", html)


def test_confusions_are_the_largest_shares_of_a_row() -> None:
    html = page_of([[90, 10, 0, 0], [30, 60, 0, 10], [0, 0, 0, 0]], ("cat", "dog"))
    assert confusions(html) == [
        "30.0 % of cat is taken for background",
        "10.0 % of background is taken for cat",
        "10.0 % of cat is taken for no label",
    ]
    (table,) = re.findall(r'class="matrix">.*?</table>', html, re.DOTALL)
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert cells == [["90.0", "10.0", "", ""], ["30.0", "60.0", "", "10.0"], ["", "", "", ""]]
    assert re.findall('scope="(.*?)">(.*?)</th>', table) == [
        *(("col", name) for name in ("background", "cat", "dog", "no label")),
        *(("row", name) for name in ("background", "cat", "dog")),
    ]
    assert confusions(page_of([[99_960, 40, 0], [0, 100, 0]], ("cat",))) == []  # under 0.05 %
    assert confusions(page_of([[9995, 5, 0], [0, 100, 0]], ("cat",))) == [
        "0.1 % of background is taken for cat"
    ]


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
    kind, _, content = page.images[page.alternatives.index("Image of a<i>")].partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (image.format, image.size) == ("JPEG", (320, 213))
    assert np.abs(np.asarray(image).astype(int) - 90).max() < 8
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
