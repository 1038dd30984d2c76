"""Standard streams that are closed, full or gone, and what else may happen to a process as a whole."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import IDS, write_scored_world, wsss

ROOT = Path(__file__).parent.parent.parent
EXPORT = "export-masks --cache cache --out out"
KEPT = "export-masks --cache cache --out kept"
SCORE = "evaluate --predictions masks --classes cat,dog --gt truth"

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_world(tmp_path_factory.mktemp("root"))


@pytest.fixture
def shell(place: Path) -> Shell:
    """Runs a command line in which ``wsss`` stands for this program."""

    def run(line: str) -> subprocess.CompletedProcess[str]:
        wsss = f"{shlex.quote(sys.executable)} -m wsss_pipeline"
        return subprocess.run(
            ["bash", "-c", line.replace("wsss", wsss)],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.mark.parametrize("command", ["--help", "config show", KEPT, f"{SCORE} --json -"])
def test_a_full_disk_behind_stdout_is_one_line_and_what_was_computed_is_kept(
    shell: Shell, place: Path, command: str
) -> None:
    done = shell(f"wsss {command} > /dev/full")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: what is printed can't be written: No space left")
    assert done.stderr.count("No space left") == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if command == KEPT:
        assert len(list((place / "kept").rglob("*.png"))) == len(IDS)


@pytest.mark.parametrize("command", ["config show", EXPORT, f"{SCORE} --json -"])
def test_a_reader_that_is_gone_is_one_line(shell: Shell, command: str) -> None:
    done = shell(f"wsss {command} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: what is printed can't be written: Broken pipe")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        *((EXPORT, closed) for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full")),
        *((f"{SCORE} --json scores.json", closed) for closed in (">&-", "<&- >&- 2>&-")),
    ],
)
def test_streams_that_nobody_listens_to_are_no_error(
    shell: Shell, place: Path, command: str, closed: str
) -> None:
    done = shell(f"wsss {command} {closed}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if "2>&-" in closed:
        assert "written" not in done.stdout, "remarks in the place of results"
    assert (place / "scores.json").read_text().startswith("{") if "scores" in command else True


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "memory ran out"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("wsss_pipeline.cache.MaskCache.open", fail)
    result = wsss("export-masks", "--cache", place / "cache", "--out", place / "new")
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    (line,) = result.stderr.splitlines()
    assert said in line


def test_a_mistake_of_the_program_is_no_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("wsss_pipeline.cache.MaskCache.open", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        wsss("export-masks", "--cache", place / "cache", "--out", place / "new")


def test_a_small_limit_on_the_address_space_is_said_before_torch_ends_without_a_word(shell: Shell) -> None:
    predict = "wsss predict --checkpoint run --images images --device cpu --out predictions"
    done = shell(f"ulimit -v 6000000; {predict}")
    assert "warning: the address space is limited to 5.7 GiB (ulimit -v)" in done.stderr
    done = shell(f"ulimit -v 2000000; {predict}")
    assert "Traceback" not in done.stderr
    if done.returncode:  # a torch without CUDA may fit
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: memory ran out")


def test_the_help_can_be_interrupted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("click.Context.get_help", fail)
    result = wsss("--help")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_an_interrupt_that_falls_into_a_destructor_is_not_forgotten(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def work(*arguments: object) -> None:
        Interrupted()
        for _ in range(100):  # it falls between two calls of C, in which Python looks for none
            time.sleep(0.1)

    monkeypatch.setattr("wsss_pipeline.cache.MaskCache.open", work)
    # tests that a shell started in the background have it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = wsss("export-masks", "--cache", place / "cache", "--out", place / "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted")
