"""Runs of ``wsss`` one after another in one process: ``python -m`` with the file that lists them.

That is JSON, name to arguments. What a run says lies beside it, in ``NAME-RANK.stdout`` and ``.stderr``, and its exit
code in ``.code``; RANK is torchrun's, or 0. What takes long to start, torch and a Ray cluster, starts once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """Of ``--json``."""
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[0])
        return found


def write_list(folder: Path, runs: dict[str, list[object]]) -> Path:
    """The file that lists them."""
    folder.mkdir()
    file = folder / "runs.json"
    file.write_text(json.dumps({name: [str(word) for word in words] for name, words in runs.items()}))
    return file


def ended(file: Path, name: str, rank: int = 0) -> Ended | None:
    """What the run of this name left, or None while it hasn't."""
    code, stdout, stderr = (file.with_name(f"{name}-{rank}.{what}") for what in ("code", "stdout", "stderr"))
    return Ended(int(code.read_text()), stdout.read_text(), stderr.read_text()) if code.exists() else None


def main() -> None:
    """All runs."""
    file, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    from wsss_pipeline.cli import main as wsss

    runs = json.loads(file.read_text())
    stop = one_cluster() if any("ray" in arguments for arguments in runs.values()) else None
    own = os.dup(1), os.dup(2)
    for name, arguments in runs.items():
        for stream, what in ((1, "stdout"), (2, "stderr")):
            opened = os.open(file.with_name(f"{name}-{rank}.{what}"), os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, stream)
            os.close(opened)
        sys.argv = ["wsss", *arguments]
        code: object = 99
        try:
            wsss(arguments, prog_name="wsss")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, before in zip((1, 2), own, strict=True):
                os.dup2(before, stream)
        done = file.with_name(f"{name}-{rank}.code")
        done.with_suffix(".tmp").write_text(str(code))
        done.with_suffix(".tmp").rename(done)
    if stop is not None:
        stop()


def one_cluster() -> Callable[[], None]:
    """Let Ray's cluster live from the first run to the last, and the workers with it; what ends it."""
    import ray

    stop: Callable[[], None] = ray.shutdown
    ray.shutdown = lambda: None
    return stop


if __name__ == "__main__":
    main()
