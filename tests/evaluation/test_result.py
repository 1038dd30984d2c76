"""What an evaluation says of itself: as text, as JSON."""

from __future__ import annotations

import dataclasses

import numpy as np

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.evaluation.metrics import Scores
from wsss_pipeline.evaluation.result import RULE, Evaluation, Variant, id_digest

SCORES = Scores(
    miou=0.6,
    miou_predicted_or_present=0.45,
    per_class_iou={"background": 0.9, "cat": 0.3, "猫": None},
    pixel_accuracy=0.95,
    mean_accuracy=0.7,
    frequency_weighted_iou=0.85,
    ignored_predictions=0.0125,
)
IDS = [f"image {number}" for number in range(1234)]
RESULT = Evaluation(
    variants={"": Variant(SCORES, {"backend": "lattice", "image": "bgr"})},
    class_names=("cat", "猫"),
    source="mask set voc12-1a2b",
    ground_truth="VOC/SegmentationClass",
    split="val",
    min_confidence=0.95,
    image_miou=dict.fromkeys(IDS, 0.5),
    matrix=np.zeros((3, 4), np.int64),
    missing=("a", "b"),
    skipped={"c": "damaged"},
)
NO_CLASS = dataclasses.replace(
    RESULT,
    variants={"": Variant(Scores(0.5, 0.5, {"background": 0.5}, 0.5, 0.5, 0.5, 0.0), None)},
    class_names=(),
    split="all",
    min_confidence=None,
    image_miou={"a": None},
    missing=(),
    skipped={},
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
        f"split val, 1,234 images (ids {id_digest(IDS)}), min confidence 0.95",
        "masks: mask set voc12-1a2b (CRF: backend lattice, image bgr)",
        "ground truth: VOC/SegmentationClass",
        f"rule: {RULE}",
        "left out, no prediction: 2 (the first is 'a')",
        "left out, could not be scored: 1",
        "  c: damaged",
    ]


def test_the_text_leaves_out_what_there_is_nothing_to_say_of() -> None:
    assert NO_CLASS.as_text().splitlines() == [
        "class        IoU %",
        "----------  ------",
        "background   50.00",
        "",
        "mIoU 50.00 %   pixel accuracy 50.00 %   mean accuracy 50.00 %   frequency-weighted IoU 50.00 %",
        "",
        f"split all, 1 images (ids {id_digest(['a'])}), min confidence none",
        "masks: mask set voc12-1a2b (CRF: not known)",
        "ground truth: VOC/SegmentationClass",
        f"rule: {RULE}",
    ]


def test_the_json_has_the_scores_at_the_top() -> None:
    values = RESULT.as_json()
    assert "scores" not in values
    assert "variants" not in values
    assert values["scored"] == "mask set voc12-1a2b"
    assert values["crf"] == {"backend": "lattice", "image": "bgr"}
    assert values["id_digest"] == id_digest(IDS)
    assert (values["miou"], values["images"], values["missing"]) == (0.6, 1234, ["a", "b"])
    assert values["per_class_iou"]["猫"] is None
    assert values["rule"] == RULE


def test_the_digest_of_ids_is_that_of_the_set() -> None:
    assert id_digest(["b", "a"]) == id_digest(["a", "b"]) == "911169ddaaf1"
    assert id_digest(["ab"]) != id_digest(["a", "b"])
    assert id_digest(["\udcff"]) != id_digest([])


def test_a_networks_variants_are_columns_and_lie_side_by_side_in_the_json() -> None:
    plain = dataclasses.replace(SCORES, miou=0.5, per_class_iou={"background": 0.8, "cat": 0.2, "猫": None})
    variants = {"raw": Variant(plain, {"backend": "none"}), "+CRF": Variant(SCORES, {"backend": "lattice"})}
    network = dataclasses.replace(RESULT, variants=variants, source="network run/best")
    assert network.as_text().splitlines()[:8] == [
        "IoU %            raw      +CRF",
        "----------  --------  --------",
        "background     80.00     90.00",
        "cat            20.00     30.00",
        "猫                 -         -",
        "mIoU           50.00     60.00",
        "(-: not in the ground truth, in no mean)",
        "",
    ]
    assert "masks: network run/best (+CRF) (CRF: backend lattice)" in network.as_text()
    values = network.as_json()
    assert (values["variant"], values["miou"]) == ("+CRF", 0.6)
    assert list(values["variants"]) == ["raw", "+CRF"]
    assert values["variants"]["raw"]["miou"] == 0.5
    assert values["variants"]["raw"]["crf"] == {"backend": "none"}
    assert values["variants"]["raw"]["scored"] == "network run/best (raw)"
    assert network.scores is SCORES


def test_remarks_say_what_misleads() -> None:
    (remark,) = RESULT.warnings
    assert remark.startswith("1.25 % of the scored pixels have no label and count as misses")
    assert NO_CLASS.warnings == ()
    voc = load_class_set("voc12").names
    augmented = dataclasses.replace(NO_CLASS, class_names=voc, image_miou=dict.fromkeys(range(10_582)))  # type: ignore[arg-type]
    (remark,) = augmented.warnings
    assert "10,582 images: published figures use train (1,464 images)" in remark
    assert dataclasses.replace(augmented, image_miou=dict.fromkeys(IDS)).warnings == ()
