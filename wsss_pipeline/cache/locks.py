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
        self._lock = FileLock(folder / lock_name(index, count), thread_local=False)
        self._owner = folder / f"writer-{index}-of-{count}.owner"

    def acquire(self) -> None:
        """Take the lock without waiting.

        Raises:
            CacheLockedError: another process has it.
            OutputError: the lock file can't be made.
        """
        with writing(self._owner.parent):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                owner = "another process"
                with suppress(OSError, ValueError):
                    owner = self._owner.read_text()[:200] or owner
                raise CacheLockedError(
                    f"{self._lock.lock_file} is held by {owner}, which writes the same share; wait for it or "
                    "stop it, or give each process its own --shard I/N"
                ) from error
            self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def release(self) -> None:
        """Give the lock back; nothing happens where it isn't held."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._owner.unlink(missing_ok=True)
            self._lock.release()


def lock_name(index: int, count: int) -> str:
    """File name of the lock for share ``index`` of ``count``."""
    return f"writer-{index}-of-{count}.lock"


@contextmanager
def set_lock(folder: Path) -> Iterator[None]:
    """Hold what all writers have in common: the files' ownership, the index and the manifest.

    Raises:
        CacheLockedError: another process doesn't let go of it.
        OutputError: the lock file can't be made.
    """
    lock = FileLock(folder / SET_LOCK, thread_local=False)
    with writing(folder):
        try:
            lock.acquire(timeout=SET_LOCK_TIMEOUT)
        except Timeout as error:
            raise CacheLockedError(
                f"{lock.lock_file} has been held for {SET_LOCK_TIMEOUT:.0f} s by another process; is a "
                "`wsss cache gc` or `merge` running? Wait for it, then run the same command again"
            ) from error
    try:
        yield
    finally:
        lock.release()


def held_locks(folder: Path) -> list[Path]:
    """Lock files of the shares that some process writes; the caller holds the set's lock.

    Raises:
        OutputError: a lock file can't be opened.
    """
    held = []
    with writing(folder):
        for path in sorted(folder.glob("writer-*-of-*.lock")):
            lock = FileLock(path, thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                held.append(path)
            else:
                lock.release()
    return held


@contextmanager
def without_writers(folder: Path) -> Iterator[None]:
    """Hold the set's lock while nobody writes a share; writers that start meanwhile wait.

    Raises:
        CacheLockedError: somebody writes.
        OutputError: the lock file can't be made.
    """
    with set_lock(folder):
        for path in held_locks(folder):
            raise CacheLockedError(
                f"{path} is held: a `wsss generate-masks` is writing there; wait for it or stop it"
            )
        yield
