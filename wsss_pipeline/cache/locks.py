"""Who may write: one writer for each share of a mask set, and one at a time for what they have in common."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wsss_pipeline.errors import CacheLockedError
from wsss_pipeline.runtime.output import writing

SET_LOCK = "set.lock"
SET_LOCK_TIMEOUT = 300.0  # seconds; the longest that holds it is `wsss cache gc` on a large set


class WriterLock:
    """The right to write share ``index`` of ``count``; it ends with the process, however that ends."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._path = folder / lock_name(index, count)
        self._owner = self._path.with_suffix(".owner")
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Take the lock without waiting.

        Raises:
            CacheLockedError: another process has it.
        """
        self._lock = _acquired(self._path)
        if self._lock is None:
            owner = "another process"
            with suppress(OSError, ValueError):
                owner = self._owner.read_text()[:200] or owner
            raise CacheLockedError(
                f"{self._path} is held by {owner}, which writes the same share; wait for it or stop it, or "
                "give each process its own --shard I/N"
            )
        with writing(self._path.parent):
            self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def release(self) -> None:
        """Give the lock back; nothing happens where it isn't held."""
        if self._lock is not None:
            with suppress(OSError):
                self._owner.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def lock_name(index: int, count: int) -> str:
    """File name of the lock for share ``index`` of ``count``."""
    return f"writer-{index}-of-{count}.lock"


def _acquired(path: Path, seconds: float = 0.0) -> FileLock | None:
    """The lock, held; None where another process doesn't let go of it for so long."""
    lock = FileLock(path, thread_local=False)
    with writing(path.parent), suppress(Timeout):
        lock.acquire(timeout=seconds)
        return lock
    return None


@contextmanager
def set_lock(folder: Path) -> Iterator[None]:
    """Hold what all writers have in common: the files' ownership, the index and the manifest.

    Raises:
        CacheLockedError: another process doesn't let go of it.
    """
    lock = _acquired(folder / SET_LOCK, SET_LOCK_TIMEOUT)
    if lock is None:
        raise CacheLockedError(
            f"{folder / SET_LOCK} has been held for {SET_LOCK_TIMEOUT:.0f} s by another process; is a "
            "`wsss cache gc` or `merge` running? Wait for it, then run the same command again"
        )
    try:
        yield
    finally:
        lock.release()


def held_locks(folder: Path) -> list[Path]:
    """Lock files of the shares that some process writes; the caller holds the set's lock."""
    held = []
    for path in sorted(folder.glob("writer-*-of-*.lock")):
        if lock := _acquired(path):
            lock.release()
        else:
            held.append(path)
    return held


@contextmanager
def without_writers(folder: Path) -> Iterator[None]:
    """Hold the set's lock while nobody writes a share; writers that start meanwhile wait.

    Raises:
        CacheLockedError: somebody writes.
    """
    with set_lock(folder):
        for path in held_locks(folder):
            raise CacheLockedError(
                f"{path} is held: a `wsss generate-masks` is writing there; wait for it or stop it"
            )
        yield
