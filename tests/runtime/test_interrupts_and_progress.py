"""Stop requests, progress lines, and files that are written whole."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
from pathlib import Path

import pytest

from wsss_pipeline.errors import OutputError
from wsss_pipeline.runtime import progress as progress_module
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import write_file
from wsss_pipeline.runtime.progress import Progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_asks_second_stops(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert f"{number.name}: finishing the image at hand" in capsys.readouterr().err


def test_progress_prints_rate_time_left_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        for step in range(5):
            now[0] += 10
            progress.advance(failed=int(step == 0))
        assert progress.left == 5
    assert stream.getvalue().splitlines() == ["3/10 images, 0.10 images/s, ETA 0:01:10, 1 failed"]


def test_a_note_and_what_an_earlier_run_finished_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(40, "updates", done=20, stream=stream) as progress:
        for step in range(2):
            now[0] += 1
            progress.advance(4, note=f"loss 0.{step}", show=step == 1)
    # 8 of this run in 2 seconds, 12 left
    assert stream.getvalue().splitlines() == ["28/40 updates, 4.00 updates/s, ETA 0:00:03, loss 0.1"]


def test_things_are_counted_as_soon_as_the_next_is_asked_for() -> None:
    with Progress(3, stream=io.StringIO()) as progress:
        counted = [progress.done for _ in progress.over("abc")]
    assert counted == [0, 1, 2]
    assert progress.left == 0


@pytest.mark.parametrize(("level", "is_shown"), [(logging.INFO, True), (logging.WARNING, False)])
def test_a_quiet_log_means_no_progress(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], level: int, is_shown: bool
) -> None:
    with caplog.at_level(level, progress_module.logger.name):
        for asked in (True, False):
            with Progress(1, is_shown=asked) as progress:
                progress.advance(show=True)
    assert len(capsys.readouterr().err.splitlines()) == is_shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        progress.advance(2, failed=1, note="the end")
        progress._bar.refresh()
    assert "2/2 images" in stream.getvalue()
    assert "1 failed, the end" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K"), "the line is erased"


@pytest.mark.parametrize("content", [b"bytes", "Überblick"])
def test_a_file_is_written_whole_with_the_folders_above_it(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "new" / "deeper" / ("x" * 250)  # no room for a suffix
    for _ in range(2):
        write_file(file, content)
        assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(
        OutputError, match=r"no/file can't be written: .*; choose a path that has no file in it"
    ):
        write_file(tmp_path / "file" / "no" / "file", "x")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some space there") as caught:
        write_file(tmp_path / "file", "after")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
