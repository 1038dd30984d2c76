"""Progress on stderr: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts finished and failed images and shows rate and time left.

    Args:
        total: number of images to come.
        stream: a terminal gets a live bar; anything else a line every 30 seconds.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.finished = 0
        self.failed = 0
        self._stream = stream or sys.stderr
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task(self.line(), total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def images_per_second(self) -> float:
        """Finished images a second since the start."""
        return self.finished / max(1e-9, time.monotonic() - self._start)

    @property
    def left(self) -> int:
        """Images that have neither finished nor failed."""
        return self.total - self.finished - self.failed

    def advance(self, *, failed: bool = False) -> None:
        """One image more is finished, or has failed."""
        self.failed += failed
        self.finished += not failed
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished + self.failed, description=self.line())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """For example ``120/1000 images, 2.1 images/s, ETA 0:06:59, 1 failed``."""
        done = self.finished + self.failed
        rate = done / max(1e-9, time.monotonic() - self._start)
        left = timedelta(seconds=round((self.total - done) / rate)) if done else "unknown"
        return f"{done}/{self.total} images, {rate:.2f} images/s, ETA {left}, {self.failed} failed"
