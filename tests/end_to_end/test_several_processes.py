"""One mask set from several processes: torchrun's, shares of the work, Ray's workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.conftest import LABELS, Run, for_each_method, generate_arguments, mask_set, with_method
from tests.end_to_end.runs_in_turn import ended, write_list
from tests.end_to_end.test_interruptions import ROOT, many_images, records
from tests.forks import ForkServer
from wsss_pipeline.methods import DEFAULT_METHOD, method_names

RUNS_IN_TURN = "tests.end_to_end.runs_in_turn"
RAY_IMAGES = 60  # a worker has half of them, and is killed at one of the first

each_method = pytest.mark.parametrize("method", method_names())


def runs(world: Path, clip: Path, *further: object, methods: Sequence[str] = method_names()) -> Path:
    """The list of a run with each method, each into a cache of its own."""
    arguments = {
        method: [
            *generate_arguments(world, clip, f"cache-{method}"),
            *with_method(method),
            "--json",
            *further,
        ]
        for method in methods
    }
    return write_list(world / "runs", arguments)


default_or_all = pytest.mark.parametrize(
    "methods",
    [[DEFAULT_METHOD], pytest.param(method_names(), marks=pytest.mark.slow)],
    ids=["default", "all"],
)


@default_or_all
def test_torchrun_divides_the_images_and_one_bad_one_stops_nobody(
    world: Path, clip: Path, generate: Run, forks: ForkServer, methods: list[str]
) -> None:
    """The two processes go through the methods in turn; those with the default alone are forks, told the same."""
    many_images(world, 10)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    file = runs(world, clip, methods=methods)
    if methods == [DEFAULT_METHOD]:
        codes, _, stderr = forks.run_two(file, module=RUNS_IN_TURN)
        assert codes == [0, 0], stderr
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*torchrun, "-m", RUNS_IN_TURN, file],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def check(method: str) -> None:
        found = [ended(file, method, rank) for rank in range(2)]
        assert all(one and one.code == 0 for one in found), found
        summaries = [one.summary for one in found if one]
        assert sum(summary["computed"] for summary in summaries) == 9
        assert all(summary["computed"] for summary in summaries)
        assert sum(len(summary["failed"]) for summary in summaries) == 1
        (path,) = (world / f"cache-{method}").glob("voc12-*")
        assert {name.name.split("-")[1] for name in path.glob("shard-*.h5")} == {"0of2", "1of2"}
        assert records(path) == records(mask_set(generate(*with_method(method), cache="alone")))

    for_each_method(check, methods)


@each_method
def test_shares_of_any_number_give_the_masks_of_one_run(generate: Run, method: str) -> None:
    expected = records(mask_set(generate(*with_method(method), cache="alone")))
    assert set(expected) == set(LABELS)
    for count in (2, 3):
        for index in range(count):
            result = generate(*with_method(method), "--shard", f"{index}/{count}", cache=f"of{count}")
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
@default_or_all
def test_ray_goes_on_when_a_worker_is_killed_half_way(
    world: Path, clip: Path, generate: Run, methods: list[str]
) -> None:
    """One cluster works with the methods in turn, and loses a worker to each."""
    many_images(world, RAY_IMAGES)
    (world / "images" / "tiny_odd_4.png").write_bytes(b"no picture")
    file = runs(world, clip, "--engine", "ray", "--workers", 2, methods=methods)
    process = subprocess.Popen(
        [sys.executable, "-m", RUNS_IN_TURN, file],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = {}
    for method in methods:
        deadline = time.monotonic() + 120
        while not list((world / f"cache-{method}").glob("*/shard-*.h5*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        worker = next(iter(ray_workers(process.pid)), None)
        if worker is not None and ended(file, method) is None:
            os.kill(worker, signal.SIGKILL)
            killed[method] = worker
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr

    def check(method: str) -> None:
        assert method in killed, "no worker was at work when one was to be killed"
        found = ended(file, method)
        assert found is not None
        assert found.code == 1, found.stderr
        assert "Traceback" not in found.stderr
        # what the killed worker had flushed, its successor found in the cache
        assert found.summary["computed"] + found.summary["reused"] == RAY_IMAGES - 1
        assert list(found.summary["failed"]) == ["tiny_odd_4"]
        (path,) = (world / f"cache-{method}").glob("voc12-*")
        assert records(path) == records(mask_set(generate(*with_method(method), cache="alone")))
        again = generate(*with_method(method), "--json", cache=f"cache-{method}").stdout.splitlines()[0]
        assert (json.loads(again)["reused"], json.loads(again)["computed"]) == (RAY_IMAGES - 1, 0)

    for_each_method(check, methods)
