"""A finished mask set of drawn scenes, and the command that made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import mask_set, wsss
from tests.faults.kills import State, masks
from wsss_pipeline.demo.voc_folder import write_voc_folder


class Finished:
    """``generate`` runs generate-masks on ``voc`` into ``cache``; ``expected`` is what the first run made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.voc, self.cache = root / "voc", root / "cache"

    def arguments(self, *further: object) -> list[object]:
        return [
            *("generate-masks", "--voc", self.voc, "--split", "train", "--classes", "demo", "--clip", "demo"),
            *("--offline", "--workers", 0, "--cache", self.cache, *further),
        ]

    def generate(self, *further: object) -> Path:
        result = wsss(*self.arguments(*further))
        assert result.exit_code == 0, result.stderr
        self.said = result.stderr
        return mask_set(result)

    def state(self) -> State:
        return masks(self.cache)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    finished = Finished(tmp_path_factory.mktemp("finished"))
    write_voc_folder(finished.voc, seed=4, scenes={"train": 8}, size=(64, 48))
    finished.generate()
    return finished


@pytest.fixture
def finished(original: Finished, tmp_path: Path) -> Finished:
    """A copy of its own for each test."""
    shutil.copytree(original.root, tmp_path / "world")
    return Finished(tmp_path / "world")
