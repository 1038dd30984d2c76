"""A small world for the commands: the golden pictures, a CLIP around the golden vision tower, a runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.tiny_clip import write_golden_clip
from wsss_pipeline.cli import main

GOLDEN = Path(__file__).parent.parent / "golden"
LABELS = {name: entry["labels"] for name, entry in json.loads((GOLDEN / "labels.json").read_text()).items()}

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden_clip(tmp_path_factory.mktemp("clip"), GOLDEN)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with ``images/``, ``labels.json`` and nothing in ``cache/`` yet."""
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    write_labels(tmp_path, LABELS)
    return tmp_path


@pytest.fixture
def generate(world: Path, clip: Path) -> Run:
    """``wsss generate-masks`` on the world, with further arguments."""

    def run(*arguments: object, cache: str = "cache") -> Result:
        return wsss(*generate_arguments(world, clip, cache), *arguments)

    return run


def generate_arguments(world: Path, clip: Path, cache: str = "cache") -> list[object]:
    return [
        *("generate-masks", "--images", world / "images", "--labels", world / "labels.json"),
        *("--classes", "voc12", "--clip", clip, "--cache", world / cache, "--workers", 0),
    ]


def wsss(*arguments: object) -> Result:
    """One command in this process; a traceback is never what a user should get."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_labels(world: Path, labels: dict[str, list[str]]) -> None:
    (world / "labels.json").write_text(json.dumps(labels))


def mask_set(result: Result) -> Path:
    """The folder on the last line of stdout."""
    return Path(result.stdout.splitlines()[-1])
