"""What a run tells a person."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss_pipeline.pseudo_masks.ray_tasks import _add
from wsss_pipeline.pseudo_masks.report import FAILURES_SHOWN, MISSING, MaskReport


def test_a_run_tells_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    report = MaskReport(
        Path("cache/voc12-1"),
        images=20,
        unlabelled=4,
        computed=10,
        reused=5,
        without_labels=3,
        scaled=2,
        seconds=5.0,
        computing=4.0,
        busy={"reading": 1.0, "CLIP": 4.0, "refining": 3.0, "writing": 2.0},
        workers=2,
        shared=("reading", "CLIP", "refining"),
    )
    report.fail("broken", "broken.jpg: cut short")
    assert caplog.messages == ["broken: broken.jpg: cut short"]
    assert report.lines() == [
        "10 masks computed in 5.0 s (2.00 images/s)",
        # two threads have 8 seconds for the first three
        "busy: reading 12 %, CLIP 50 %, refining 38 %, writing 50 %; waiting on CLIP",
        "5 masks reused from the cache",
        "3 of 20 images without a label: all background",
        "2 of 20 images scaled down for CLIP and the refiner (--max-pixels)",
        "images left out, since the labels don't name them: 4",
        "1 of 20 images failed:",
        "  broken: broken.jpg: cut short",
        "4 of 20 images left to do",
    ]
    assert report.as_dict()["path"] == "cache/voc12-1"


@pytest.mark.parametrize("workers", [0, 1])
def test_one_thread_has_the_time_of_one(workers: int) -> None:
    times = {"reading": 1.0, "CLIP": 3.0, "writing": 0.0}
    report = MaskReport(
        Path("cache"),
        images=1,
        computed=1,
        computing=4.0,
        busy=times,
        workers=workers,
        shared=("reading", "CLIP"),
    )
    assert report.lines()[1] == "busy: reading 25 %, CLIP 75 %; waiting on CLIP"


def test_a_run_that_found_everything_says_why_it_was_so_fast() -> None:
    lines = MaskReport(Path("cache"), images=5, reused=5, seconds=1.0).lines()
    assert lines == ["5 masks reused from the cache", "nothing was left to compute, so CLIP was not loaded"]


def test_what_tasks_on_a_cluster_did_is_counted_together() -> None:
    whole = MaskReport(Path("cache"), images=9)
    for name in "ab":
        part = MaskReport(Path("cache"), computed=2, reused=1, without_labels=1, scaled=1)
        part.failed = {f"{name} broken": "cut short", f"{name} missing": MISSING}
        _add(whole, part)
    assert (whole.computed, whole.reused, whole.without_labels, whole.scaled) == (4, 2, 2, 2)
    assert whole.failed == {
        "a missing": MISSING,
        "a broken": "cut short",
        "b missing": MISSING,
        "b broken": "cut short",
    }


@pytest.mark.parametrize("more", [0, 1, 7])
def test_a_long_list_of_failures_is_cut(more: int) -> None:
    report = MaskReport(Path("cache"), images=FAILURES_SHOWN + more)
    for number in range(report.images):
        report.fail(f"image-{number:02}", "damaged")
    first, *listed = report.lines()
    assert first == f"{report.images} of {report.images} images failed:"
    assert listed[FAILURES_SHOWN - 1] == f"  image-{FAILURES_SHOWN - 1:02}: damaged"
    assert listed[FAILURES_SHOWN:] == ([f"  and {more} more; --json has them all"] if more else [])


def test_a_million_images_that_are_not_there_bring_a_few_warnings(caplog: pytest.LogCaptureFixture) -> None:
    report = MaskReport(Path("cache"), images=1000)
    report.miss(f"image-{number:03}" for number in range(1000))
    assert len(caplog.messages) == 21
    assert caplog.messages[0] == "image-000: the labels or the split name it, but there is no such image"
    assert caplog.messages[-1] == "and 980 more images that the labels or the split name aren't there"
    assert len(report.failed) == 1000
    assert len(set(map(id, report.failed.values()))) == 1, "one text for all"
    assert "1000 of 1000 images failed:" in report.lines()
