"""Runs of stage one in processes of their own, each killed while it writes: ``python -m`` with JSON.

That is of each command its cache folder; when to kill each run, as pairs (so many writes of the partial file seen,
and then so many seconds); and its arguments. torch is imported once and each run is a fork. Prints a line for each
command, with the exit codes of its runs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Fork, wait for the moment, kill; as often as asked."""
    import torch
    import transformers

    from wsss_pipeline.cache import writer
    from wsss_pipeline.methods import load_method, method_names

    # what a run imports late: the children are to be killed at work, not while they import
    importlib.import_module("yaml")
    importlib.import_module("wsss_pipeline.stages.generate_masks")
    importlib.import_module("skimage.segmentation")
    for method in method_names():
        load_method(method)
    assert transformers.CLIPTextModelWithProjection
    assert transformers.CLIPVisionModelWithProjection
    assert transformers.CLIPTokenizer
    torch.set_num_threads(1)  # no thread pool that a fork would break
    # many small flushes, so that kills fall before, into and after them
    writer.IMAGES_PER_FLUSH, writer.FLUSH_REST = 3, 0.0
    for cache, moments, arguments in json.loads(sys.argv[1]):
        codes = [killed_run(Path(cache), flushes, seconds, arguments) for flushes, seconds in moments]
        print("exit codes", *codes, flush=True)


def killed_run(cache: Path, flushes: int, seconds: float, arguments: list[str]) -> int:
    """The exit code of a run that is killed so late."""
    from wsss_pipeline.cli import main as wsss

    child = os.fork()
    if child == 0:
        sys.argv = ["wsss", *arguments]
        wsss(arguments, prog_name="wsss")
    status = wait_for_writes(cache, flushes, child)
    if status is None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


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
