"""A lock of a process on a file, which says who has it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wsss_pipeline.files import read_text
from wsss_pipeline.runtime.output import write_file, writing

_MAX_OWNER_BYTES = 1000


class ProcessLock:
    """The lock ``path``; it ends with the process, however that ends. Its owner stands in a file beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = path.with_suffix(".owner")
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        """Take it without waiting; whether nobody else has it.

        Raises:
            OutputError: its folder can't be written, or a link is in its place.
        """
        self._lock = acquired(self.path)
        if self._lock is None:
            return False
        try:
            write_file(self._owner, f"process {os.getpid()} on {socket.gethostname()}", durable=False)
        except BaseException:
            self.release()
            raise
        return True

    @property
    def owner(self) -> str:
        """Who has it, for people."""
        with suppress(OSError, ValueError):
            return read_text(self._owner, _MAX_OWNER_BYTES)[:200] or "another process"
        return "another process"

    def release(self) -> None:
        """Give it back; nothing happens where it isn't held."""
        if self._lock is not None:
            with suppress(OSError):
                self._owner.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def acquired(path: Path, seconds: float = 0.0) -> FileLock | None:
    """The lock on a file, held; None where another process doesn't let go of it for so long."""
    lock = FileLock(path, thread_local=False)
    with writing(path.parent), suppress(Timeout):
        lock.acquire(timeout=seconds)
        return lock
    return None
