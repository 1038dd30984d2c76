"""SIGKILL at random moments: nothing finished is damaged, and the end is that of an undisturbed run."""

from __future__ import annotations

import random
import time
from pathlib import Path

import h5py
from cache_samples import MASK_SET, start_writer

from wsss_pipeline.cache import MaskCache, open_mask_set, verify
from wsss_pipeline.cache.records import escape_id

KILLS = 24
IMAGES = 400


def record_digests(folder: Path) -> dict[str, str]:
    with h5py.File(folder / "index.h5") as index:
        return {
            image_id: index["images"][escape_id(image_id)].attrs["record_digest"]
            for image_id in MaskCache.open(folder)
        }


def run_to_the_end(folder: Path) -> float:
    """Seconds that the work took, without the start of Python."""
    process = start_writer("fill", folder, IMAGES)
    start = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("done\n", 0)
    return time.monotonic() - start


def test_kills_at_random_moments_damage_nothing(tmp_path: Path) -> None:
    undisturbed = open_mask_set(tmp_path / "undisturbed", MASK_SET)
    duration = run_to_the_end(undisturbed)
    expected = record_digests(undisturbed)
    assert len(expected) == IMAGES

    moments = random.Random(2)
    kills, lost_to_a_kill, sets = 0, 0, 0
    while kills < KILLS:
        sets += 1
        folder = open_mask_set(tmp_path / f"killed-{sets}", MASK_SET)
        for _ in range(8):
            process = start_writer("fill", folder, IMAGES)
            time.sleep(moments.uniform(0, 0.5 * duration))
            process.kill()
            process.communicate()
            if process.returncode == 0:
                break
            kills += 1
            report = verify(folder)
            assert report.ok
            assert report.damaged_superseded == 0
            lost_to_a_kill += len(list(folder.glob("*.partial*")))
        run_to_the_end(folder)
        assert record_digests(folder) == expected
        assert verify(folder).ok
        assert not list(folder.glob("*.partial*")) + list(folder.glob("*.damaged"))
    assert lost_to_a_kill > 0, "no kill came while a shard was open: the test has lost its point"
