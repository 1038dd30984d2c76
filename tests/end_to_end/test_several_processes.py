"""One mask set from several processes: torchrun's, shares of the work, Ray's workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.conftest import LABELS, Run, generate_arguments, mask_set, wsss
from tests.end_to_end.test_interruptions import ROOT, many_images, records


def test_torchrun_divides_the_images_and_one_bad_one_stops_nobody(
    world: Path, clip: Path, generate: Run
) -> None:
    many_images(world, 24)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    expected = records(mask_set(generate(cache="alone")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(item) for item in generate_arguments(world, clip)]
    done = subprocess.run(
        [*torchrun, "-m", "wsss_pipeline", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(summaries) == 2
    assert sum(summary["computed"] for summary in summaries) == 23
    assert all(summary["computed"] for summary in summaries)
    assert sum(len(summary["failed"]) for summary in summaries) == 1
    (path,) = (world / "cache").glob("voc12-*")
    assert {name.name.split("-")[1] for name in path.glob("shard-*.h5")} == {"0of2", "1of2"}
    assert records(path) == expected


def test_shares_of_any_number_give_the_masks_of_one_run(world: Path, clip: Path, generate: Run) -> None:
    expected = records(mask_set(generate(cache="alone")))
    assert set(expected) == set(LABELS)
    for count in (2, 3):
        for index in range(count):
            result = wsss(*generate_arguments(world, clip, f"of{count}"), "--shard", f"{index}/{count}")
            assert result.exit_code == 0, result.stderr
        assert records(mask_set(result)) == expected
        assert json.loads((mask_set(result) / "manifest.json").read_text())["completion"]["complete"]


def ray_workers() -> list[int]:
    """Process ids of Ray's workers that are at a task."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(b"ray::") and b"_run_task" in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(find_spec("ray") is None, reason="the optional package ray isn't installed")
def test_ray_goes_on_when_a_worker_is_killed_half_way(world: Path, clip: Path, generate: Run) -> None:
    many_images(world, 160)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    arguments = [str(item) for item in generate_arguments(world, clip)]
    arguments += ["--engine", "ray", "--workers", "2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "wsss_pipeline", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((world / "cache").glob("*/shard-*.h5*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(ray_workers()[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    summary = json.loads(stdout.splitlines()[0])
    # what the killed worker had flushed, its successor found in the cache
    assert summary["computed"] + summary["reused"] == 159
    assert list(summary["failed"]) == ["tiny_odd_4"]
    (path,) = (world / "cache").glob("voc12-*")
    assert records(path) == records(mask_set(generate(cache="alone")))
    again = json.loads(generate("--json").stdout.splitlines()[0])
    assert (again["reused"], again["computed"]) == (159, 0)
