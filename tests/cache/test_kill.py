"""SIGKILL at random moments: nothing finished is damaged, and the end is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
from cache_samples import MASK_SET, start_writer

from wsss_pipeline.cache import MaskCache, open_mask_set, verify
from wsss_pipeline.cache.records import escape_id

KILLS = 12
IMAGES = 400


def record_digests(folder: Path) -> dict[str, str]:
    with h5py.File(folder / "index.h5") as index:
        return {
            image_id: index["images"][escape_id(image_id)].attrs["record_digest"]
            for image_id in MaskCache.open(folder)
        }


class Writers:
    """Processes that fill a mask set, one after another, forked from one that has imported all they need."""

    def __init__(self) -> None:
        self._parent = start_writer("fork", Path(), IMAGES)

    def start(self, folder: Path) -> int:
        """Begins to fill a folder; the process's id."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{folder}\n")
        self._parent.stdin.flush()
        return self._number()

    def end(self) -> int:
        """The exit code of the one that was started last."""
        return self._number()

    def run_to_the_end(self, folder: Path) -> float:
        """Seconds that the work took."""
        start = time.monotonic()
        self.start(folder)
        assert self.end() == 0
        return time.monotonic() - start

    def _number(self) -> int:
        assert self._parent.stdout is not None
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        self._parent.communicate()


@pytest.fixture
def writers() -> Iterator[Writers]:
    started = Writers()
    yield started
    started.close()


def test_kills_at_random_moments_damage_nothing(tmp_path: Path, writers: Writers) -> None:
    undisturbed = open_mask_set(tmp_path / "undisturbed", MASK_SET)
    duration = writers.run_to_the_end(undisturbed)
    expected = record_digests(undisturbed)
    assert len(expected) == IMAGES

    moments = random.Random(2)
    kills, lost_to_a_kill, sets = 0, 0, 0
    while kills < KILLS:
        sets += 1
        folder = open_mask_set(tmp_path / f"killed-{sets}", MASK_SET)
        for _ in range(8):
            process = writers.start(folder)
            time.sleep(moments.uniform(0, 0.5 * duration))
            with suppress(ProcessLookupError):  # where it came to its end before
                os.kill(process, signal.SIGKILL)
            if writers.end() == 0:
                break
            kills += 1
            report = verify(folder)
            assert report.ok
            assert report.damaged_superseded == 0
            lost_to_a_kill += len(list(folder.glob("*.partial*")))
        writers.run_to_the_end(folder)
        assert record_digests(folder) == expected
        assert verify(folder).ok
        assert not list(folder.glob("*.partial*")) + list(folder.glob("*.damaged"))
    assert lost_to_a_kill > 0, "no kill came while a shard was open: the test has lost its point"
