"""Training's progress on stderr: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgressBar:
    """Shows update, loss, learning rate, images a second, time left and the last validation's mIoU.

    Args:
        total: number of updates of a run.
        stream: a terminal gets a live bar; anything else a line every 10 seconds and at each validation.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._loss: float | None = None
        self._miou: float | None = None
        self._first = (0, time.monotonic())
        self._last_line = 0.0

    def __enter__(self) -> TrainingProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def log(self, numbers: dict[str, Any]) -> None:
        """One update more: ``step``, ``loss``, ``lr``, ``images``, ``seconds``, and ``miou`` where validated."""
        step, now = numbers["step"], time.monotonic()
        if self._bar is None and self._stream.isatty():
            self._start()
        if self._loss is None or step <= self._first[0]:
            self._first, self._loss = (step - 1, now - numbers["seconds"]), numbers["loss"]
        self._loss = 0.9 * self._loss + 0.1 * numbers["loss"]
        self._miou = numbers.get("miou", self._miou)
        text = self.line(step, numbers["lr"], numbers["images"], now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or "miou" in numbers or step == self._total:
            self._last_line = now
            print(text, file=self._stream, flush=True)

    def _start(self) -> None:
        """At the first update: what comes before training may have a bar of its own."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._stream)
        columns = (BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=self._total)
        self._bar.start()

    def line(self, step: int, lr: float, images: int, now: float) -> str:
        """For example ``120/300 updates, loss 0.412, lr 0.0008, 81 images/s, ETA 0:00:35, mIoU 61.20 %``."""
        rate = (step - self._first[0]) / max(1e-9, now - self._first[1])
        left = timedelta(seconds=round((self._total - step) / rate))
        miou = "" if self._miou is None else f", mIoU {100 * self._miou:.2f} %"
        done = f"{step}/{self._total} updates, loss {self._loss:.3f}, lr {lr:.2g}"
        return f"{done}, {images * rate:.3g} images/s, ETA {left}{miou}"
