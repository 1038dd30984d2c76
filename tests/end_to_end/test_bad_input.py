"""Bad input gets one clear line and exit code 2; nothing is written, nothing is a traceback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Run, generate_arguments, write_labels, wsss
from wsss_pipeline.pseudo_masks import run


def only_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ({"cat": ["cat", "sofaa"]}, ["labels.json", "'cat'", "sofaa", "'sofa'"]),
        ({"../../x": ["cat"]}, ["labels.json", "../../x"]),
        ({"/etc/passwd": ["cat"]}, ["labels.json", "/etc/passwd"]),
        ({"a\x00b": ["cat"]}, ["labels.json"]),
        ({"cat": 3}, ["labels.json", "cat"]),
        ({"cat": [], "tiny_odd": []}, ["labels.json", "2 images and no class of any"]),
        ({"cat": [1]}, ["labels.json", "cat"]),
        ({}, ["labels.json"]),
    ],
)
def test_labels(generate: Run, world: Path, labels: Any, parts: list[str]) -> None:
    write_labels(world, labels)
    result = generate()
    assert result.exit_code == 2
    line = only_error(result.stderr)
    assert all(part in line for part in parts), line
    assert not (world / "cache").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_label_files_that_are_no_json(generate: Run, world: Path, content: bytes) -> None:
    (world / "labels.json").write_bytes(content)
    result = generate()
    assert result.exit_code == 2
    assert "labels.json" in only_error(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--classes", "cat,cat"], "cat"),
        (["--classes", "voc21"], "voc12"),
        (["--classes", "no/such.yaml"], "no/such.yaml"),
        (["--set", "cam.treshold=1"], "cam.threshold"),
        (["--preset", "clip-es/voc"], "clip-es/voc12"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--attributes", "none"], "--attributes: method clip-es has no setting 'excel.attributes'"),
        (["--method", "clip-es", "--attributes", "a.json"], "give --method excel, or leave it out"),
        (["--method", "excel", "--set", "cam.threshold=1"], "--set cam.threshold=1: method excel has no"),
        (["--template", "no place"], "no place"),
        (["--clip", "./no-such-clip"], "no-such-clip"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--shard", "4/4"], "4/4"),
        (["--max-pixels", "1"], "max_pixels"),
        (["--voc", "nowhere"], "--images"),
        (["--split", "train"], "--split"),
    ],
)
def test_options(world: Path, clip: Path, arguments: list[str], part: str) -> None:
    result = wsss(*generate_arguments(world, clip), *arguments)
    assert result.exit_code == 2
    assert part in only_error(result.stderr)
    assert not (world / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "clip-es"], "method clip-es takes no attributes; give --method excel"),
        (["--set", "method=clip-es"], "method clip-es takes no attributes; give --method excel"),
        (["--method", "clip-es", "--attributes", "a.json"], "--attributes: method clip-es has no setting"),
    ],
)
def test_attributes_of_a_method_that_takes_none(arguments: list[str], part: str) -> None:
    result = wsss("attributes", "check", "--classes", "voc12", "--clip", "demo", *arguments)
    assert result.exit_code == 2
    assert part in only_error(result.stderr)


def test_no_images_no_classes_no_folder(world: Path, clip: Path) -> None:
    base = ["generate-masks", "--labels", world / "labels.json", "--clip", clip, "--cache", world / "cache"]
    assert "--images" in only_error(wsss(*base, "--classes", "voc12").stderr)
    assert "--classes" in only_error(wsss(*base, "--images", world / "images").stderr)
    nowhere = wsss(*base, "--classes", "voc12", "--images", world / "nowhere")
    assert "nowhere" in only_error(nowhere.stderr)
    voc = wsss("generate-masks", "--clip", clip, "--voc", world / "nothing", "--split", "train")
    assert "nothing" in only_error(voc.stderr)


@pytest.mark.parametrize("command", ["generate-masks", "select-prompt", "learn-prompts"])
def test_labels_in_another_form_than_insisted_on(world: Path, clip: Path, command: str) -> None:
    given = ["--labels", world / "labels.json", "--labels-format", "csv", "--images", world / "images"]
    further = ["--out", world / "out"] if command == "learn-prompts" else []
    result = wsss(command, *given, "--classes", "voc12", "--clip", clip, *further)
    assert result.exit_code == 2
    assert "a json file is never in the form csv" in only_error(result.stderr)
    without = wsss(command, *given[2:], "--classes", "voc12", "--clip", clip, *further)
    assert "--labels-format goes with --labels" in only_error(without.stderr)


def test_hostile_names_stay_on_one_line(generate: Run, world: Path) -> None:
    write_labels(world, {"cat": ["\x1b[31mred\nTraceback"]})
    result = generate()
    line = only_error(result.stderr.replace("Traceback", ""))
    assert "\x1b" not in line


def test_two_files_of_one_id(generate: Run, world: Path) -> None:
    (world / "images" / "cat.jpg").write_bytes((world / "images" / "cat.png").read_bytes())
    result = generate()
    assert result.exit_code == 2
    line = only_error(result.stderr)
    assert "cat.jpg" in line
    assert "cat.png" in line


def test_json_summary_is_json(generate: Run) -> None:
    summary = json.loads(generate("--json", "--limit", 1).stdout.splitlines()[0])
    assert {"path", "images", "computed", "reused", "failed", "without_labels", "seconds"} <= set(summary)


def test_what_the_machine_ran_out_of_ends_the_run(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(run, "file_status", refuse)
    result = generate()
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: this machine ran out of")
    assert "ulimit -n" in result.stderr
