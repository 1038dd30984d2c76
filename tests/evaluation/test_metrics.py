"""The confusion matrix and scores against hand-computed cases and against torchmetrics."""

import numpy as np
import pytest

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.errors import EvaluationError
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix

NAMES = ("background", "cat", "dog")


def mask(*rows):
    return np.array(rows, dtype=np.uint8)


def test_rows_are_ground_truth_and_columns_prediction():
    matrix = confusion_matrix(mask([0, 1, 1, 2]), mask([0, 0, 1, 1]), 3)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_ignored_ground_truth_is_left_out_whatever_the_prediction():
    matrix = confusion_matrix(mask([0, 1, 2, 255]), mask([255, 255, 255, 255]), 3)
    assert matrix.sum() == 0


def test_ignored_prediction_is_a_miss_of_its_class():
    # cat: 4 pixels, 2 right, 2 without a label -> 2 / 4; background: 2 pixels, 2 right
    matrix = confusion_matrix(mask([0, 0, 1], [1, 255, 255]), mask([0, 0, 1], [1, 1, 1]), 3)
    scores = Scores.from_matrix(matrix, NAMES)
    assert matrix[1].tolist() == [0, 2, 0, 2]
    assert scores.per_class_iou == {"background": 1.0, "cat": 0.5, "dog": None}
    assert scores.pixel_accuracy == pytest.approx(4 / 6)
    assert scores.mean_accuracy == pytest.approx(0.75)
    assert scores.ignored_predictions == pytest.approx(2 / 6)


def test_hand_computed_scores_with_a_class_predicted_but_absent():
    truth = mask([0, 0, 0, 0], [0, 0, 1, 1])
    prediction = mask([0, 0, 0, 2], [0, 1, 1, 1])
    scores = Scores.from_matrix(confusion_matrix(prediction, truth, 3), NAMES)
    # background: 4 hits of 6 true, 4 predicted -> 4/6; cat: 2 hits, 2 true, 3 predicted -> 2/3; dog absent
    assert scores.per_class_iou == {
        "background": pytest.approx(4 / 6),
        "cat": pytest.approx(2 / 3),
        "dog": None,
    }
    assert scores.miou == pytest.approx(2 / 3)
    assert scores.miou_predicted_or_present == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert scores.pixel_accuracy == pytest.approx(6 / 8)
    assert scores.mean_accuracy == pytest.approx((4 / 6 + 1) / 2)
    assert scores.frequency_weighted_iou == pytest.approx(6 / 8 * 4 / 6 + 2 / 8 * 2 / 3)


def test_class_absent_from_both_is_in_no_mean():
    truth = mask([0, 0, 1, 1])
    scores = Scores.from_matrix(confusion_matrix(truth, truth, 3), NAMES)
    assert (scores.miou, scores.miou_predicted_or_present) == (1.0, 1.0)


def test_matrices_add_up_to_one_data_set_rather_than_a_mean_of_images():
    perfect = confusion_matrix(mask([1, 1, 1, 1]), mask([1, 1, 1, 1]), 3)
    wrong = confusion_matrix(mask([0, 0]), mask([1, 1]), 3)
    scores = Scores.from_matrix(perfect + wrong, NAMES)
    assert scores.per_class_iou["cat"] == pytest.approx(4 / 6)


def test_agrees_with_torchmetrics_where_the_rule_is_the_same():
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.classification")
    generator = np.random.default_rng(7)
    truth = generator.integers(0, 5, (3, 40, 50)).astype(np.uint8)
    prediction = np.where(generator.random(truth.shape) < 0.6, truth, generator.integers(0, 5, truth.shape))
    prediction = prediction.astype(np.uint8)
    truth[generator.random(truth.shape) < 0.2] = 255
    matrix = sum(confusion_matrix(p, t, 5) for p, t in zip(prediction, truth, strict=True))
    assert isinstance(matrix, np.ndarray)

    arguments = torch.from_numpy(prediction).long(), torch.from_numpy(truth).long()
    oracle = classification.MulticlassConfusionMatrix(5, ignore_index=255)(*arguments)
    assert np.array_equal(matrix[:, :5], oracle.numpy())
    assert not matrix[:, 5].any()
    iou = classification.MulticlassJaccardIndex(5, average="none", ignore_index=255)(*arguments)
    scores = Scores.from_matrix(matrix, [str(i) for i in range(5)])
    assert list(scores.per_class_iou.values()) == pytest.approx(iou.tolist(), abs=1e-6)
    accuracy = classification.MulticlassAccuracy(5, average="macro", ignore_index=255)(*arguments)
    assert scores.mean_accuracy == pytest.approx(float(accuracy), abs=1e-6)


def test_all_pixels_ignored_is_an_error_not_a_nan():
    with pytest.raises(EvaluationError, match="no pixel to score"):
        Scores.from_matrix(np.zeros((3, 4), np.int64), NAMES)


@pytest.mark.parametrize(
    ("values", "num_classes", "cause"),
    [
        ([0, 3], 3, "another class set"),
        ([0, 17, 90], 81, "COCO category ids"),
        (list(range(0, 200, 7)), 21, "grey levels or colours"),
    ],
)
def test_ground_truth_value_that_fits_no_class_names_file_values_and_cause(values, num_classes, cause):
    truth = mask([*values, 255])
    with pytest.raises(EvaluationError, match=cause) as error:
        confusion_matrix(np.zeros_like(truth), truth, num_classes, "gt/cat.png")
    assert "gt/cat.png" in str(error.value)
    assert str(values[1]) in str(error.value)
    assert "\n" not in str(error.value)


def test_palette_read_as_grey_is_recognised():
    from PIL import Image

    image = Image.fromarray(mask([0, 1, 15, 255])).convert("P")
    image.putpalette(voc_palette().tobytes())
    truth = np.asarray(image.convert("L"))
    with pytest.raises(EvaluationError, match="grey levels of the VOC colours"):
        confusion_matrix(np.zeros_like(truth), truth, 21)


def test_prediction_value_that_fits_no_class_is_an_error():
    with pytest.raises(EvaluationError, match=r"prediction holds values 3, 254,"):
        confusion_matrix(mask([0, 3, 254]), mask([0, 0, 255]), 3)


@pytest.mark.parametrize(
    ("prediction", "truth", "cause"),
    [
        ((30, 40), (40, 30), "rotated"),
        ((30, 40), (60, 80), "resized"),
        ((30, 40), (33, 90), "different images"),
    ],
)
def test_sizes_that_differ_name_both_and_the_cause(prediction, truth, cause):
    with pytest.raises(EvaluationError, match=cause) as error:
        confusion_matrix(np.zeros(prediction, np.uint8), np.zeros(truth, np.uint8), 3, "a/b")
    assert f"ground truth is {truth[1]}x{truth[0]}, prediction is {prediction[1]}x{prediction[0]}" in str(
        error.value
    )


def refusal(prediction, truth, num_classes=3, **options):
    with pytest.raises(EvaluationError) as error:
        confusion_matrix(prediction, truth, num_classes, **options)
    return str(error.value)


def test_messages_say_what_there_is_what_may_be_and_what_to_do():
    truth = mask([0, 3, 255])
    assert refusal(np.zeros_like(truth), truth, origin="gt/a.png") == (
        "gt/a.png: ground truth holds values 3, but with 2 classes and the background it may hold 0..2 and 255; "
        "the masks belong to another class set: give the one that they were made with"
    )
    coco = mask([17, 91])
    assert refusal(np.zeros_like(coco), coco, 81) == (
        "ground truth: ground truth holds values 17, 91, but with 80 classes and the background it may hold "
        "0..80 and 255; these are COCO category ids (1..90 with gaps): map them to 1..80 in category order"
    )
    assert "COCO" not in refusal(mask([0, 0]), mask([17, 92]), 81)
    assert "another class set" in refusal(mask([0, 0, 0]), mask([1, 2, 3]))
    many = mask([*range(2, 30)])
    assert refusal(np.zeros_like(many), many) == (
        "ground truth: ground truth holds values 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 16 more, but with 2 "
        "classes and the background it may hold 0..2 and 255; these look like grey levels or colours, not "
        "classes: a mask holds one class index a pixel"
    )
    twelve, thirteen = mask([*range(3, 15)]), mask([*range(3, 16)])
    assert "13, 14, but" in refusal(np.zeros_like(twelve), twelve)
    assert "13, 14 and 1 more, but" in refusal(np.zeros_like(thirteen), thirteen)
    assert refusal(mask([0, 3, 255, 9]), mask([0, 0, 0, 0])) == (
        "ground truth: the prediction holds values 3, 9, but with 2 classes and the background the largest value "
        "is 2; give the class set it was made with"
    )


def test_messages_about_sizes():
    assert refusal(mask([0]), np.zeros((2, 2, 3), np.uint8), origin="a") == (
        "a: masks are (H, W) arrays of class indices, not (2, 2, 3) and (1, 1)"
    )
    assert refusal(np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8)).endswith(
        "ground truth is 3x4, prediction is 4x3: one of the two was rotated (EXIF orientation); use images and "
        "masks of the same orientation"
    )
    # rounded to whole pixels, as a resize does it, and just beyond
    for prediction, truth, is_resized in (
        *(((30, 41), (60, 80), True), ((30, 40), (61, 80), True), ((30, 41), (90, 120), True)),
        *(((30, 40), (62, 81), True), ((10, 10), (20, 22), True), ((10, 10), (20, 23), False)),
    ):
        text = refusal(np.zeros(prediction, np.uint8), np.zeros(truth, np.uint8))
        assert ("resized" in text) == is_resized, (prediction, truth)


def test_a_class_of_one_pixel_counts():
    scores = Scores.from_matrix(confusion_matrix(mask([0, 0, 0]), mask([0, 0, 1]), 3), NAMES)
    assert scores.per_class_iou == {"background": pytest.approx(2 / 3), "cat": 0.0, "dog": None}
    assert scores.ignored_predictions == 0
    with pytest.raises(ValueError, match="zip"):
        Scores.from_matrix(np.ones((3, 4), np.int64), NAMES[:2])


def test_what_has_no_label_is_counted_apart_from_what_is_right():
    scores = Scores.from_matrix(confusion_matrix(mask([255, 1, 1, 1]), mask([1, 1, 1, 1]), 3), NAMES)
    assert scores.ignored_predictions == 0.25
