"""``wsss relabel`` as a user runs it: from a network to masks to the next network; signals, locks, bad input."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.end_to_end.conftest import mask_set, write_scored_world, wsss
from tests.end_to_end.test_interruptions import records
from wsss_pipeline.cache import MaskWriter, verify

LABELS = {"a/one": ["dog"], "a/two": [], "three": ["cat", "dog"]}
RUN = ("--checkpoint", "run", "--images", "images", "--device", "cpu", "--workers", "0")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the small world, with labels."""
    write_scored_world(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def relabel(*further: str) -> Result:
    return wsss("relabel", *RUN, "--cache", "relabelled", *further)


def test_from_one_network_to_the_next(world: Path) -> None:
    result = relabel("--labels", "labels.json", "--scales", "0.5,1", "--flip")
    assert result.exit_code == 0, result.stderr
    for text in (
        "network: run/best, fp32 on cpu",
        "classes (2): cat, dog",
        "scales 0.5,1 flip",
        "CRF: lattice",
    ):
        assert text in result.stderr
    assert "a mask may have: the classes of its labels" in result.stderr
    assert "3 masks computed" in result.stderr
    assert "images without a label: all background" in result.stderr
    path = mask_set(result)
    assert path.parent == Path("relabelled")
    assert verify(path).ok
    found = records(path)
    assert {image_id: list(labels) for image_id, (_, _, labels) in found.items()} == LABELS
    again = relabel("--labels", "labels.json", "--scales", "0.5,1", "--flip", "--json")
    summary = json.loads(again.stdout.splitlines()[0])
    assert (summary["reused"], summary["computed"], summary["failed"]) == (3, 0, {})
    assert mask_set(again) == path
    assert "nothing was left to compute\n" in again.stderr
    trained = wsss(
        *("train-seg", "--cache", "relabelled", "--images", "images", "--out", "second", "--device", "cpu"),
        *(
            "--network",
            "segformer",
            "--encoder",
            "tiny",
            "--weights",
            "none",
            "--workers",
            "0",
            "--crop",
            "32",
        ),
        *("--iterations", "1", "--batch-size", "2", "--min-confidence", "0", "--precision", "fp32"),
    )
    assert trained.exit_code == 0, trained.stderr
    assert f"mask set {path}, 3 images" in trained.stderr
    for command in (("evaluate", "--cache", path, "--gt", "truth"), ("cache", "status", path)):
        assert wsss(*command).exit_code == 0


def test_what_would_be_done_is_said_and_not_done(world: Path) -> None:
    result = relabel("--refine", "par", "--dry-run")
    assert result.exit_code == 0
    for line in (
        "a mask may have: any class",
        "PAR: 20 iterations",
        "images: 3, 0 of them in the cache, 3 to compute",
    ):
        assert line in result.stdout.splitlines()
    assert not Path("relabelled").exists()


def test_one_bad_image_is_reported_skipped_and_counted(world: Path) -> None:
    Path("images/three.png").write_bytes(b"no image")
    Path("labels.json").write_text(json.dumps({**LABELS, "gone": ["cat"]}))
    result = relabel("--labels", "labels.json", "--refine", "none", "--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout.splitlines()[0])
    assert summary["failed"].keys() == {"three", "gone"}
    assert summary["computed"] == 2
    assert "2 of 4 images failed:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--checkpoint", "nowhere"), "nowhere holds no checkpoint"),
        (("--images", "nowhere"), "nowhere"),
        (("--images", "none"), "none: holds no image"),
        (("--labels", "unknown.json"), "unknown class 'catt'; did you mean 'cat'?"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
        (("--labels", "labels.json", "--labels-format", "csv"), "never in the form csv"),
        (("--labels-format", "csv"), "--labels-format goes with --labels"),
        (("--labels", "labels.json", "--classes", "demo"), "(cat, dog)"),
        (("--any-class",), "--labels"),
        (("--split", "nowhere.txt"), "nowhere.txt"),
        (("--scales", "0"), "--scales 0"),
        (("--set", "crf.iteration=1"), "did you mean 'crf.iterations'?"),
        (("--refine", "crf", "--crf", "none"), "contradict each other"),
        (("--shard", "4/4"), "4/4"),
        (("--device", "tpu"), "auto, cpu, cuda"),
        (("--cache", "labels.json"), "labels.json"),
    ],
)
def test_bad_input_gets_one_line(world: Path, arguments: tuple[str, ...], part: str) -> None:
    Path("none").mkdir()
    Path("unknown.json").write_text(json.dumps({"three": ["catt"]}))
    result = relabel(*arguments)
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert part in error
    assert not Path("relabelled").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_image_and_says_how_to_go_on(
    world: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    write = MaskWriter.write

    def interrupted(*arguments: Any, **attributes: Any) -> None:
        write(*arguments, **attributes)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(MaskWriter, "write", interrupted)
        patch.setattr(sys, "argv", ["wsss", "relabel", *RUN])
        result = relabel()
    assert result.exit_code == 130
    assert f"{number.name}: finishing the image at hand" in result.stderr
    assert "interrupted; go on with: wsss relabel --checkpoint run --images images" in result.stderr
    assert "images left to do" in result.stderr
    assert len(records(mask_set(result))) == 1
    summary = json.loads(relabel("--json").stdout.splitlines()[0])
    assert (summary["reused"], summary["computed"]) == (1, 2)


def test_of_two_runs_over_the_same_share_the_second_is_told_about_the_first(world: Path) -> None:
    path = mask_set(relabel("--limit", "1"))
    with MaskWriter(path, 1, 2):
        assert relabel("--shard", "0/2").exit_code == 0
        refused = relabel("--shard", "1/2")
    assert refused.exit_code == 2
    assert str(os.getpid()) in refused.stderr
