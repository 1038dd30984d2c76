"""Stop requests and progress lines."""

from __future__ import annotations

import io
import os
import signal

import pytest

from wsss_pipeline.runtime import progress as progress_module
from wsss_pipeline.runtime.interrupts import StopRequest
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
