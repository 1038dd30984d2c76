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

from tests.end_to_end.conftest import LABELS, Run, generate_arguments, mask_set
from tests.end_to_end.test_interruptions import ROOT, many_images, records
from wsss_pipeline.methods import method_names

each_method = pytest.mark.parametrize("method", method_names())


@each_method
def test_torchrun_divides_the_images_and_one_bad_one_stops_nobody(
    world: Path, clip: Path, generate: Run, method: str
) -> None:
    many_images(world, 10)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    expected = records(mask_set(generate("--method", method, cache="alone")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(item) for item in generate_arguments(world, clip)]
    done = subprocess.run(
        [*torchrun, "-m", "wsss_pipeline", *arguments, "--method", method, "--json"],
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
    assert sum(summary["computed"] for summary in summaries) == 9
    assert all(summary["computed"] for summary in summaries)
    assert sum(len(summary["failed"]) for summary in summaries) == 1
    (path,) = (world / "cache").glob("voc12-*")
    assert {name.name.split("-")[1] for name in path.glob("shard-*.h5")} == {"0of2", "1of2"}
    assert records(path) == expected


@each_method
def test_shares_of_any_number_give_the_masks_of_one_run(generate: Run, method: str) -> None:
    expected = records(mask_set(generate("--method", method, cache="alone")))
    assert set(expected) == set(LABELS)
    for count in (2, 3):
        for index in range(count):
            result = generate("--method", method, "--shard", f"{index}/{count}", cache=f"of{count}")
            assert result.exit_code == 0, result.stderr
        assert records(mask_set(result)) == expected
        assert json.loads((mask_set(result) / "manifest.json").read_text())["completion"]["complete"]


def ray_workers(driver: int) -> list[int]:
    """Process ids of a driver's workers that are at a task; another test may have a cluster of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            at_work = words.startswith(b"ray::") and b"_run_task" in words
            if at_work and parent(parent(int(folder.name))) == driver:  # between them is Ray's own process
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def parent(process: int) -> int:
    """The process that started a process."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(find_spec("ray") is None, reason="the optional package ray isn't installed")
@each_method
def test_ray_goes_on_when_a_worker_is_killed_half_way(
    world: Path, clip: Path, generate: Run, method: str
) -> None:
    many_images(world, 100)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    arguments = [str(item) for item in generate_arguments(world, clip)]
    arguments += ["--method", method, "--engine", "ray", "--workers", "2", "--json"]
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
    os.kill(ray_workers(process.pid)[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    summary = json.loads(stdout.splitlines()[0])
    # what the killed worker had flushed, its successor found in the cache
    assert summary["computed"] + summary["reused"] == 99
    assert list(summary["failed"]) == ["tiny_odd_4"]
    (path,) = (world / "cache").glob("voc12-*")
    assert records(path) == records(mask_set(generate("--method", method, cache="alone")))
    again = json.loads(generate("--method", method, "--json").stdout.splitlines()[0])
    assert (again["reused"], again["computed"]) == (99, 0)
