"""The GPU's way from images to masks, run on the CPU, against the CPU's own way; batches, order, failures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache, MaskWriter
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ImageError
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.pseudo_masks.maker import Generated, LabelledImage
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.pseudo_masks.run import _Run, ahead, run_share

SIZES = {"a": 32, "b": 32, "c": 32, "D": 32, "e": 48, "f": 32, "g": 32, "h": 32}  # widths; D has no label


@pytest.fixture
def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes the way of a GPU."""
    monkeypatch.setattr(_Run, "_one_by_one", _Run._in_batches)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=5, scenes={"train": 9})
    (folder / "JPEGImages" / "train_00003.jpg").write_bytes(b"not an image")
    return folder


def generate(root: Path, cache: Path, *further: object) -> MaskCache:
    result = wsss(
        *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
        *("--device", "cpu", "--precision", "fp32", "--offline", "--cache", cache, *further),
    )
    assert "images failed" in result.stderr
    return MaskCache.open(mask_set(result))


@pytest.mark.parametrize("further", [(), ("--crf", "none"), ("--max-pixels", "9000", "--store-cams")])
def test_batches_on_a_device_give_the_masks_of_threads(
    root: Path, tmp_path: Path, request: pytest.FixtureRequest, further: tuple[str, ...]
) -> None:
    expected = generate(root, tmp_path / "threads", *further)
    request.getfixturevalue("in_batches")
    found = generate(root, tmp_path / "batches", "--batch-size", 3, *further)
    assert set(found) == set(expected)
    assert len(found) == 8
    for image_id in expected:
        ours, theirs = found[image_id], expected[image_id]
        assert (ours.mask == theirs.mask).mean() > 0.999
        assert abs(ours.confidence.astype(int) - theirs.confidence.astype(int)).mean() < 0.05
        assert (ours.cams is None) == (theirs.cams is None) == ("--store-cams" not in further)
        if ours.cams is not None and theirs.cams is not None:
            assert np.abs(ours.cams.astype(np.float32) - theirs.cams).max() < 1e-2


def test_an_image_has_its_part_of_its_batchs_time() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.uint8)
    made = Generated((), zeros, zeros, None, (1.0, 3.0, 7.0), 1 / 4)
    assert made.wait()[1:] == (0.5, 1.0)


class Watched:
    """A job of small images, the batches that CLIP saw and the order in which masks were written."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[str] = []
        self.written = ""
        self.fails: Callable[[str], bool] = lambda batch: False
        for number, (name, width) in enumerate(SIZES.items()):
            pixels = np.full((16, width, 3), number, np.uint8)
            (folder / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        labels = {name: () if name == "D" else ("ball",) for name in SIZES}
        job = MaskJob.read(
            {"clip.weights": "demo", "refine": "none", "clip.precision": "fp32"},
            images=folder / "images",
            labels=write(folder / "labels.json", labels),
            classes="demo",
            cache=folder / "cache",
        )
        self.job = replace(job, device="cpu", offline=True, labels={name: labels[name] for name in SIZES})
        generate, write_mask = MaskGenerator.generate, MaskWriter.write

        def watched(
            generator: MaskGenerator, batch: Sequence[LabelledImage], with_cams: bool
        ) -> list[Generated]:
            names = "".join(list(SIZES)[image.pixels[0, 0, 0]] for image in batch)
            self.batches.append(names)
            if self.fails(names):
                raise MemoryError
            return generate(generator, batch, with_cams)

        def noted(writer: MaskWriter, image_id: str, mask: PseudoMask, **attributes: Any) -> None:
            self.written += image_id
            write_mask(writer, image_id, mask, **attributes)

        monkeypatch.setattr(MaskGenerator, "generate", watched)
        monkeypatch.setattr(MaskWriter, "write", noted)

    def run(self, **changes: Any) -> MaskReport:
        return run_share(replace(self.job, **changes))


def write(file: Path, labels: dict[str, tuple[str, ...]]) -> Path:
    file.write_text(json.dumps(labels))
    return file


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_batches: None) -> Watched:
    return Watched(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (1, ["a", "b", "c", "e", "f", "g", "h"]),
        (2, ["ab", "cf", "gh", "e"]),
        (9, ["abcfgh", "e"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_of_one_size_never_too_large_and_written_in_order(
    watched: Watched, batch_size: int, expected: list[str], workers: int
) -> None:
    report = watched.run(batch_size=batch_size, workers=workers)
    assert watched.batches == expected
    assert watched.written == "".join(SIZES)
    assert (report.computed, report.without_labels, report.failed) == (8, 1, {})
    with MaskCache.open(report.path) as cache:
        assert {image_id: cache[image_id].mask.shape for image_id in cache} == {
            name: (16, width) for name, width in SIZES.items()
        }
        assert not any(cache.record_info(image_id).has_cams for image_id in cache), "nobody asked for them"


def test_batches_are_looked_for_among_a_few_images_only(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.run.LOOK_AHEAD", 1)
    watched.run(batch_size=4)
    assert watched.batches == ["abc", "e", "fgh"]
    assert watched.written == "".join(SIZES)


def test_a_batch_that_is_too_much_is_done_one_by_one_and_what_still_fails_is_named(watched: Watched) -> None:
    watched.fails = lambda batch: "f" in batch
    report = watched.run(batch_size=3)
    assert watched.batches == ["abc", "fgh", "f", "g", "h", "e"]
    assert watched.written == "abcDegh"
    assert list(report.failed) == ["f"]
    assert "ran out of memory" in report.failed["f"]


def test_the_labels_order_is_the_order_of_the_masks_on_a_cpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.fails = lambda batch: batch == "b"
    report = watched.run(workers=4, batch_size=3)
    assert sorted(watched.batches) == sorted("abcefgh"), "on a CPU each image goes alone"
    assert watched.written == "acDefgh"
    assert list(report.failed) == ["b"]


def test_other_errors_are_no_images_failure(watched: Watched) -> None:
    def fail(batch: str) -> bool:
        raise RuntimeError("CUDA error: device-side assert triggered")

    watched.fails = fail
    with pytest.raises(RuntimeError, match="device-side"):
        watched.run(batch_size=3)


def test_a_stop_finishes_what_is_under_way_and_the_next_run_does_the_rest(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.run.LOOK_AHEAD", 1)

    def stop_at_the_first(batch: str) -> bool:
        if len(watched.batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    watched.fails = stop_at_the_first
    report = watched.run(batch_size=2)
    assert report.interrupted
    assert watched.batches == ["ab"]
    assert watched.written == "ab"
    assert watched.run(batch_size=2).reused == report.computed == 2
    assert watched.written == "abcDefgh"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_is_done_ahead_in_order_and_only_so_far(threads: int) -> None:
    asked: list[str] = []

    def make(image_id: str) -> str:
        if image_id == "c":
            raise ImageError("c is bad")
        return image_id.upper()

    def ids() -> Any:
        for image_id in "abcdefghij":
            asked.append(image_id)
            yield image_id

    found = []
    for image_id, wait in ahead(make, ids(), threads, 2):
        assert len(asked) - len(found) <= (3 if threads else 1)
        try:
            found.append(wait())
        except ImageError:
            found.append(f"no {image_id}")
    assert found == ["A", "B", "no c", *"DEFGHIJ"]


@pytest.mark.parametrize("threads", [0, 1])
def test_what_was_handed_out_may_be_waited_for_later(threads: int) -> None:
    def make(image_id: str) -> str:
        time.sleep(0.01)
        return image_id.upper()

    assert [wait() for _, wait in list(ahead(make, "abcdef", threads, 8))] == list("ABCDEF")


def test_nothing_more_is_done_for_one_that_leaves() -> None:
    done = []

    def make(image_id: str) -> None:
        time.sleep(0.02)
        done.append(image_id)

    with closing(ahead(make, "abcdefghij", 1, 8)) as results:  # type: ignore[type-var]  # a generator
        next(results)[1]()
    assert len(done) < 4
