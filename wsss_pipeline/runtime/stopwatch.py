"""How long a device works, where a GPU goes on after the call that gave it the work has returned."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Stopwatch:
    """Context manager that times what is given to a device inside it.

    Args:
        device: ``cpu`` or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []

    def __enter__(self) -> Stopwatch:
        self._marks = [self._mark()]
        return self

    def __exit__(self, *_: object) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """The device's time from entry to exit; waits until it is there."""
        start, end = self._marks
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]  # both are of one kind
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if self._device == "cpu":
            return time.monotonic()
        import torch

        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
