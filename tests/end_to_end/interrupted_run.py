"""Runs of stage one in processes of their own, each killed while it writes: ``python -m`` with arguments.

First the cache folder; then when to kill each run, as ``FLUSHES:SECONDS`` joined by commas (so many writes
of the partial file seen, and then so many seconds; ``-`` lets the run finish); then the command's arguments.
torch is imported once and each run is a fork. Prints each run's exit code.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Fork, wait for the moment, kill; as often as asked."""
    cache, moments, arguments = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    import torch
    import transformers

    from wsss_pipeline.cache import writer
    from wsss_pipeline.cli import main as wsss

    # what a run imports late: the children are to be killed at work, not while they import
    importlib.import_module("yaml")
    importlib.import_module("wsss_pipeline.stages.generate_masks")
    assert transformers.CLIPTextModelWithProjection
    assert transformers.CLIPVisionModelWithProjection
    assert transformers.CLIPTokenizer
    torch.set_num_threads(1)  # no thread pool that a fork would break
    # many small flushes, so that kills fall before, into and after them
    writer.IMAGES_PER_FLUSH, writer.FLUSH_REST = 3, 0.0
    for moment in moments:
        child = os.fork()
        if child == 0:
            sys.argv = ["wsss", *arguments]
            wsss(arguments, prog_name="wsss")
        status = None
        if moment != "-":
            flushes, seconds = moment.split(":")
            status = wait_for_writes(cache, int(flushes), child)
            if status is None:
                time.sleep(float(seconds))
                os.kill(child, signal.SIGKILL)
        if status is None:
            _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def wait_for_writes(cache: Path, count: int, child: int) -> int | None:
    """Return when the partial file has changed ``count`` times: None, or the child's status if it ended first."""
    seen = partial_state(cache)
    while count:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        state = partial_state(cache)
        if state != seen:
            seen, count = state, count - 1
        time.sleep(0.001)
    return None


def partial_state(cache: Path) -> list[tuple[str, int]]:
    """Names and times of all partial files."""
    found = []
    for path in cache.glob("*/*.partial"):
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return sorted(found)


if __name__ == "__main__":
    main()
