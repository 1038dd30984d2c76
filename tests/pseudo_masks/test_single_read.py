"""Stage one reads an image once: over a network, each reading is a wait."""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import LABELS, generate_arguments, wsss

_opened: Counter[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened[str(arguments[0])] += 1


@pytest.fixture
def opened() -> Iterator[Counter[str]]:
    """Every file that this process opens, and how often."""
    global _opened
    if not getattr(sys, "_notes_opened_files", False):
        sys.addaudithook(_note)  # for good
        sys._notes_opened_files = True  # type: ignore[attr-defined]
    _opened = Counter()
    yield _opened
    _opened = None


@pytest.mark.parametrize("way", ["one by one", "in batches"])
def test_each_file_is_opened_once_and_not_again_in_the_next_run(
    generate: Any, world: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("wsss_pipeline.cache.finished.SETTLED_NS", 0)  # files this young may change unseen
    if way == "in batches":
        from wsss_pipeline.pseudo_masks.run import _Run

        monkeypatch.setattr(_Run, "_one_by_one", _Run._in_batches)
    assert generate("--batch-size", 2).exit_code == 0
    files = [str(world / "images" / f"{image_id}.png") for image_id in LABELS]
    assert {file: opened[file] for file in files} == dict.fromkeys(files, 1)
    assert generate().exit_code == 0
    assert {file: opened[file] for file in files} == dict.fromkeys(files, 1)
    assert generate("--check-bytes").exit_code == 0
    assert {file: opened[file] for file in files} == dict.fromkeys(files, 2)


def test_an_archive_is_opened_once_for_its_list_and_once_for_each_image(
    world: Path, clip: Path, opened: Counter[str]
) -> None:
    with tarfile.open(world / "0.tar", "w") as tar:
        for file in sorted((world / "images").glob("*.png")):
            tar.add(file, file.name)
    arguments = generate_arguments(world, clip)
    arguments[arguments.index("--images") + 1] = world / "0.tar"
    opened.clear()
    assert wsss(*arguments).exit_code == 0
    assert opened[str(world / "0.tar")] == 1 + len(LABELS)
