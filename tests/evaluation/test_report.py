"""What an evaluation says of itself: text, JSON, and the parts of the HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wsss_pipeline.evaluation.html_report import (
    Cell,
    ImageRow,
    ReportPage,
    Section,
    class_entries,
    confusion_texts,
    data_uri,
    row_percentages,
    settings_text,
    write_report,
)
from wsss_pipeline.evaluation.report import RULE, EvaluationResult, id_digest

from wsss_pipeline.errors import ConfigError
from wsss_pipeline.evaluation.metrics import Scores

SCORES = Scores(
    miou=0.6,
    miou_predicted_or_present=0.45,
    per_class_iou={"background": 0.9, "cat": 0.3, "猫": None},
    pixel_accuracy=0.95,
    mean_accuracy=0.7,
    frequency_weighted_iou=0.85,
    ignored_predictions=0.0125,
)
RESULT = EvaluationResult(
    scores=SCORES,
    images=1234,
    split="val",
    id_digest="0123456789ab",
    ground_truth="VOC/SegmentationClass",
    scored="cache voc12-1a2b",
    crf={"backend": "lattice", "image": "bgr"},
    min_confidence=0.95,
    missing=("a", "b"),
    skipped={"c": "damaged"},
    warnings=("a remark",),
)


def test_the_text_holds_every_number_and_what_it_was_measured_on() -> None:
    assert RESULT.as_text().splitlines() == [
        "class        IoU %",
        "----------  ------",
        "background   90.00",
        "cat          30.00",
        "猫               -",  # two cells wide
        "(-: not in the ground truth, in no mean)",
        "",
        "mIoU 60.00 %   pixel accuracy 95.00 %   mean accuracy 70.00 %   frequency-weighted IoU 85.00 %",
        "mIoU 45.00 % when classes that are predicted but absent from the ground truth count as 0",
        "1.25 % of the pixels have no label; they count as misses",
        "",
        "split val, 1,234 images (ids 0123456789ab), min confidence 0.95",
        "masks: cache voc12-1a2b (CRF: backend lattice, image bgr)",
        "ground truth: VOC/SegmentationClass",
        f"rule: {RULE}",
        "left out, no prediction: 2 (the first is 'a')",
        "left out, could not be scored: 1",
        "  c: damaged",
    ]


def test_the_text_leaves_out_what_there_is_nothing_to_say_of() -> None:
    scores = Scores(0.5, 0.5, {"background": 0.5}, 0.5, 0.5, 0.5, 0.0)
    result = EvaluationResult(scores, 1, "all", "x", "gt", "masks", None, None, (), {}, ())
    assert result.as_text().splitlines() == [
        "class        IoU %",
        "----------  ------",
        "background   50.00",
        "",
        "mIoU 50.00 %   pixel accuracy 50.00 %   mean accuracy 50.00 %   frequency-weighted IoU 50.00 %",
        "",
        "split all, 1 images (ids x), min confidence none",
        "masks: masks (CRF: not known)",
        "ground truth: gt",
        f"rule: {RULE}",
    ]


def test_the_json_has_the_scores_at_the_top() -> None:
    values = RESULT.as_json()
    assert "scores" not in values
    assert (values["miou"], values["images"], values["missing"]) == (0.6, 1234, ["a", "b"])
    assert values["per_class_iou"]["猫"] is None
    assert values["rule"] == RULE


def test_the_digest_of_ids_is_that_of_the_set() -> None:
    assert id_digest(["b", "a"]) == id_digest(["a", "b"]) == "911169ddaaf1"
    assert id_digest(["ab"]) != id_digest(["a", "b"])
    assert id_digest(["\udcff"]) != id_digest([])


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


def test_settings_are_yaml_in_their_order() -> None:
    assert settings_text({"b": {"c": 1}, "a": "猫"}) == "b:\n  c: 1\na: 猫\n"


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the report .*page\.html can't be written: "):
        write_report(tmp_path / "file" / "page.html", None)  # type: ignore[arg-type]


def test_the_page_holds_what_it_is_given_and_escapes_it(tmp_path: Path) -> None:
    page = ReportPage(
        title="a <b> & title",
        summary=[("mIoU", "60.00 %")],
        sections=[
            Section("worst", [ImageRow("<i>", "a note", [Cell("prediction", "data:image/jpeg;base64,AAAA")])])
        ],
        settings="a: <script>",
        warnings=["a remark \udcff"],
        classes=class_entries(SCORES, ("cat", "猫")),
    )
    file = tmp_path / "new" / "folder" / "page.html"
    write_report(file, page)
    html = file.read_text("utf-8")
    assert html.startswith("<!DOCTYPE html>")
    for text in (
        "a &lt;b&gt; &amp; title",
        "60.00 %",
        "&lt;i&gt;",
        "a: &lt;script&gt;",
        "a remark ?",
        "猫",
        "AAAA",
    ):
        assert text in html, text
    assert "<script>" not in html
    write_report(file, page)  # over what is there
    assert file.read_text("utf-8") == html
    one = np.array([[0, 1, 0], [0, 5, 0]])
    assert row_percentages(one).tolist() == [[0, 100, 0], [0, 100, 0]]
