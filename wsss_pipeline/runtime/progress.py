"""Progress on stderr: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)


class Progress:
    """Context manager that counts what is finished or has failed, and shows rate and time left.

    Nothing is shown where the package's log leaves out what is only informative (``wsss --quiet``, a library's
    user without a log).

    Args:
        total: number of things to come.
        unit: word for the things counted, in the plural.
        done: number of things that an earlier run finished.
        stream: file to show it on, whatever the log says; stderr where None.
        is_shown: nothing is where it is false.
    """

    def __init__(
        self,
        total: int,
        unit: str = "images",
        *,
        done: int = 0,
        stream: TextIO | None = None,
        is_shown: bool = True,
    ) -> None:
        self.total = total
        self.done = self._start = done
        self.failed = 0
        self._unit = unit
        self._is_shown = is_shown and (stream is not None or logger.isEnabledFor(logging.INFO))
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        if self._stream is None:  # Python's own, where stderr was closed when it began
            self._is_shown = False
        elif self._is_shown and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task(self.line(), total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def left(self) -> int:
        """Number of things that have neither finished nor failed."""
        return self.total - self.done

    def advance(self, count: int = 1, *, failed: int = 0, note: str = "", show: bool = False) -> None:
        """Count things that have finished or failed.

        Args:
            count: all of them.
            failed: those of them that failed.
            note: further text, such as the loss.
            show: a line now, however long ago the last one is.
        """
        self.done += count
        self.failed += failed
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self.line(note))
        elif self._is_shown and (show or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            with suppress(OSError):  # nobody listens, and the work goes on
                print(self.line(note), file=self._stream, flush=True)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted as soon as the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def line(self, note: str = "") -> str:
        """For example ``120/1000 images, 2.10 images/s, ETA 0:06:59, 1 failed``."""
        rate = (self.done - self._start) / max(1e-9, time.monotonic() - self._began)
        left = timedelta(seconds=round(self.left / rate)) if rate else "unknown"
        parts = [f"{self.done}/{self.total} {self._unit}", f"{rate:.2f} {self._unit}/s", f"ETA {left}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join([*parts, *([note] if note else [])])
