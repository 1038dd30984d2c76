"""What masks are likely to score, out of their own confidence."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.errors import MaskError
from wsss_pipeline.evaluation.quality import Quality, estimate, is_sure_of_everything, likely_wrong
from wsss_pipeline.pictures.evaluation_page import confidence_page
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

NAMES = ("cat", "dog", "bird")


def record(mask: list[int], confidence: list[int], labels: tuple[str, ...] = ()) -> PseudoMask:
    return PseudoMask(np.array([mask], np.uint8), np.array([confidence], np.uint8), labels)


def test_an_estimate_worked_out_by_hand() -> None:
    quality = Quality(NAMES)
    # odds of 0.5 are 1 and of 0.75 are 3: right with 1/2 and 9/10
    quality.add("a", record([0, 0, 1, 1, 255], [150, 100, 150, 200, 0], ("cat", "dog")))
    missed = (0.1 + 0.5) / 2  # of the background, shared by two classes
    assert quality.images["a"] == {"cat": pytest.approx(1.9 / (2 + missed)), "dog": 0.0}
    quality.add("b", record([1, 1, 3], [200, 200, 100]))
    assert quality.images["b"] == {"cat": 1.0, "bird": pytest.approx(0.5)}
    assert list(quality.by_class) == ["dog", "bird", "cat"]
    assert quality.by_class["cat"] == pytest.approx((1.9 + 2) / (4 + missed))
    assert list(quality.by_image) == ["a", "b"]
    assert quality.mean == pytest.approx(np.mean([0, 0.5, 3.9 / (4 + missed)]))
    assert quality.note("b") == "estimated IoU bird 50 %, cat 100 %"


def test_what_is_likely_wrong_is_what_the_estimate_lacks() -> None:
    assert likely_wrong(record([2, 2], [100, 100], ("cat",)), NAMES) == {"cat": 1.0, "dog": 0.5}
    assert likely_wrong(record([0], [20]), NAMES) == {}


def test_an_image_without_classes_and_names_of_other_sets_take_no_part() -> None:
    quality = Quality(NAMES)
    quality.add("a", record([0, 0, 255], [200, 0, 0]))
    quality.add("b", record([0], [200], ("zebra",)))
    assert quality.images == {}
    assert quality.mean is None
    assert quality.note("a") == ""
    assert quality.lines() == ["no mask has a class: there is nothing to estimate"]


class Some:
    class_names = NAMES
    identity = description = "some"

    def __contains__(self, image_id: object) -> bool:
        return True

    def __getitem__(self, image_id: str) -> PseudoMask:
        if image_id == "damaged":
            raise MaskError("its digest differs")
        return record([1, 1], [190, 60 if image_id == "poor" else 190], ("cat",))


def test_masks_that_cannot_be_read_are_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        quality = estimate(Some(), ["good", "damaged", "poor"])
    assert "damaged: left out: its digest differs" in caplog.text
    assert list(quality.by_image) == ["poor", "good"]
    assert quality.lines(shown=1)[1:] == [
        "most likely wrong:",
        f"  poor: {100 * quality.by_image['poor']:.1f} % ({quality.note('poor')})",
    ]
    assert list(quality.as_json()["images"]) == ["poor", "good"]


@pytest.mark.parametrize(
    ("determinants", "expected"),
    [
        ({"crf": {"backend": "lattice"}}, True),
        ({"vote": {}}, True),
        ({"crf": {"backend": "none"}}, False),
        ({"par": {}}, False),
        ({"crf": {"backend": "lattice"}, "confidence": "product"}, False),
    ],
)
def test_a_posterior_that_is_sure_of_everything_is_told(
    determinants: dict[str, object], expected: bool
) -> None:
    assert is_sure_of_everything(determinants) is expected


def test_the_page_shows_what_is_likely_wrong_first_and_escapes_names(tmp_path: Path) -> None:
    quality = estimate(Some(), ["good", "<b>poor"])
    quality.add("<b>poor", record([2], [20], ("dog",)))
    html = confidence_page({"good": 95.0}, {}, {}, {"Pseudo mask": Some()}, {}, quality)
    assert "<b>" not in html
    assert html.index("&lt;b&gt;poor") < html.index("good</h3>")
    assert "Most likely wrong" in html
    assert html.index("Estimated IoU by class, worst first") < html.index(">dog<") < html.index(">cat<")
    assert "Estimated mIoU" in html


def test_the_order_of_estimates_is_near_that_of_the_true_ious() -> None:
    """Far under what docs/demo.md says, and far over chance."""
    settings = {"clip.weights": "demo", "clip.precision": "fp32", "confidence": "product", "refine": "par"}
    made = MaskGenerator("demo", method="clip-es", settings=settings, device="cpu", offline=True)
    quality, true, found = Quality(made.class_set.names), [], []
    for number in range(12):
        scene = draw_scene((901, number))
        made_of_it = made(scene.image, scene.labels)
        quality.add(str(number), made_of_it)
        for name, estimated in quality.images[str(number)].items():
            own, truth = (
                made_of_it.mask == made.class_set.index(name),
                scene.mask == made.class_set.index(name),
            )
            true.append((own & truth).sum() / (own | truth).sum())
            found.append(estimated)
    ranks = [np.argsort(np.argsort(values)) for values in (true, found)]
    assert np.corrcoef(ranks)[0, 1] > 0.5
