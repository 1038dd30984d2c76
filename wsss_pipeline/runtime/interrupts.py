"""Ctrl-C and a scheduler's signals as a request to stop after the current image."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Context manager: the first signal sets ``requested``, a second one stops at once.

    Outside the main thread, where Python allows no handlers, it never becomes requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None:
                try:
                    self._previous[number] = signal.signal(number, self._on_signal)
                except ValueError:
                    break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        with suppress(OSError):  # nobody listens, and the request stands
            print(
                f"{name}: finishing the image at hand, then stopping; once more stops at once",
                file=sys.stderr,
            )
