"""Inputs are only read, and what is written over is what the program wrote itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import IDS, write_scored_world, wsss
from wsss_pipeline.data.classes import voc_palette

PREDICT = ("predict", "--checkpoint", "run", "--device", "cpu")
RELABEL = ("relabel", "--checkpoint", "run", "--device", "cpu")
SCORE = ("evaluate", "--cache", "cache", "--images", "images", "--gt", "truth")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_scored_world(tmp_path_factory.mktemp("root"))
    (folder / "split.txt").write_text("three\n")
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the small world."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        (*PREDICT, "--images", "images", "--out", "images"),
        (*PREDICT, "--images", "images/masks", "--out", "images"),
        (*PREDICT, "--images", "images/overlays", "--out", "images", "--overlays"),
        (*PREDICT, "--images", "images/masks/a", "--out", "images"),
        (*PREDICT, "--images", "images", "--out", "images/a"),
        (*PREDICT, "--images", "images", "--out", "link"),
        (*PREDICT, "--images", "images", "--out", "run/best"),
        (*RELABEL, "--images", "images", "--cache", "images/cache"),
        (*RELABEL, "--images", "images", "--cache", "link"),
        (*RELABEL, "--images", "images", "--cache", "run/best"),
        (*RELABEL, "--images", "images", "--cache", "split.txt", "--split", "split.txt"),
        ("export-masks", "--cache", "cache", "--out", "cache/{name}"),
        ("export-masks", "--cache", "cache", "--out", "."),
        ("export-model", "--checkpoint", "run", "--out", "run/best", "--format", "huggingface"),
        ("export-model", "--checkpoint", "run", "--out", "run", "--format", "huggingface"),
        ("export-model", "--checkpoint", "run", "--out", "run/best/net.onnx"),
        ("preview", "--cache", "cache", "--images", "images", "--out", "images/new.png"),
        ("preview", "--cache", "cache/{name}", "--images", "images", "--out", "cache/{name}/new.png"),
        ("preview", "--cache", "cache/{name}", "--images", "images", "--html", "cache/{name}/look"),
        (*SCORE, "--report", "images/report.html"),
        (*SCORE, "--report", "truth/report.html"),
        (*SCORE, "--json", "cache/{name}/scores.json"),
        (*SCORE, "--split", "split.txt", "--json", "split.txt"),
        (*SCORE, "--json", "same", "--report", "./same"),
        ("evaluate", "--predictions", "masks", "--classes", "cat,dog", "--gt", "truth", "--json", "masks/x"),
        (
            *("evaluate", "--checkpoint", "run", "--images", "images", "--gt", "truth", "--device", "cpu"),
            *("--report", "run/best/report.html"),
        ),
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_an_output_in_an_input_is_refused(place: Path, arguments: tuple[str, ...]) -> None:
    for folder in ("images/overlays", "images/masks/a"):
        shutil.copytree("images/a", folder)
    Path("link").symlink_to("images")
    (mask_set,) = Path("cache").iterdir()
    before = content(place)
    result = wsss(*(argument.format(name=mask_set.name) for argument in arguments))
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "that is only read" in error or "give each a file of its own" in error
    assert content(place) == before


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("out/masks/three.png", (*PREDICT, "--images", "images", "--out", "out", "--overwrite")),
        ("out/overlays/three.jpg", (*PREDICT, "--images", "images", "--out", "out", "--overlays")),
        ("out/three.png", ("export-masks", "--cache", "cache", "--out", "out", "--overwrite")),
        ("out.png", ("preview", "--cache", "cache", "--images", "images", "--out", "out.png")),
        ("out/index.html", ("preview", "--cache", "cache", "--images", "images", "--html", "out")),
        ("out.html", (*SCORE, "--report", "out.html")),
        ("out.html", ("evaluate", "--cache", "cache", "--images", "images", "--report", "out.html")),
        ("out.json", (*SCORE, "--json", "out.json")),
        ("out.onnx", ("export-model", "--checkpoint", "run", "--out", "out.onnx")),
        *(
            (
                f"out/{name}",
                ("export-model", "--checkpoint", "run", "--out", "out", "--format", "huggingface"),
            )
            for name in ("config.json", "model.safetensors", "preprocessor_config.json")
        ),
    ],
)
def test_what_another_wrote_stays(place: Path, file: str, arguments: tuple[str, ...]) -> None:
    Path("out").mkdir()
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("precious")
    before = content(place)
    result = wsss(*arguments)
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{file} is there already, and this program didn't write it" in error
    assert content(place) == before
    Path(file).unlink()
    Path(file).symlink_to(Path("images/three.png").resolve())
    assert wsss(*arguments).exit_code == 2
    assert content(Path("images")) == {name: before[name] for name in before if name.startswith("images")}


def test_what_the_program_wrote_is_replaced(place: Path) -> None:
    commands = [
        (*PREDICT, "--images", "images", "--out", ".", "--overlays", "--confidence", "--overwrite"),
        ("preview", "--cache", "cache", "--images", "images", "--out", "out.png"),
        (*SCORE, "--report", "out.html", "--json", "out.json"),
        ("export-model", "--checkpoint", "run", "--out", "run/hf", "--format", "huggingface"),
    ]
    shutil.move("masks", "elsewhere")
    for command in [*commands, *commands]:
        result = wsss(*command)
        assert result.exit_code == 0, result.output
    assert json.loads(Path("out.json").read_text())["program"] == "wsss-pipeline"


def test_a_mask_is_kept_where_there_is_one(place: Path) -> None:
    arguments = (*PREDICT, "--images", "images", "--out", "out")
    Path("out/masks").mkdir(parents=True)
    Path("out/masks/three.png").write_text("another program's")
    result = wsss(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 masks written, 1 were there already" in result.stderr
    assert Path("out/masks/three.png").read_text() == "another program's"


def test_a_linked_folder_in_the_output_is_not_followed(place: Path) -> None:
    Path("victim").mkdir()
    Path("out/masks").mkdir(parents=True)
    Path("out/masks/a").symlink_to(Path("victim").resolve())
    result = wsss(*PREDICT, "--images", "images", "--out", "out")
    assert result.exit_code == 2
    assert "links aren't followed" in result.stderr
    assert not list(Path("victim").iterdir())


def test_the_mark_changes_neither_values_nor_palette(place: Path) -> None:
    assert wsss(*PREDICT, "--images", "images", "--out", "out", "--confidence").exit_code == 0
    for image_id in IDS:
        with (
            Image.open(f"out/masks/{image_id}.png") as mask,
            Image.open(f"out/confidence/{image_id}.png") as sure,
        ):
            assert (mask.mode, sure.mode) == ("P", "L")
            assert mask.getpalette() == voc_palette().ravel().tolist()
            assert np.array(mask).max() <= 2
            assert mask.info["Software"] == "wsss-pipeline"
