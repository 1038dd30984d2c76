"""Who may write: one writer for each share of a mask set, and one at a time for what they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsss_pipeline.errors import CacheLockedError
from wsss_pipeline.runtime.locks import ProcessLock, acquired

SET_LOCK = "set.lock"
SET_LOCK_TIMEOUT = 300.0  # seconds; the longest that holds it is `wsss cache gc` on a large set


class WriterLock(ProcessLock):
    """The right to write share ``index`` of ``count``."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        super().__init__(folder / lock_name(index, count))

    def acquire(self) -> bool:
        """Take the lock without waiting.

        Raises:
            CacheLockedError: another process has it.
        """
        if not super().acquire():
            raise CacheLockedError(
                f"{self.path} is held by {self.owner}, which writes the same share; wait for it or stop it, or "
                "give each process its own --shard I/N"
            )
        return True


def lock_name(index: int, count: int) -> str:
    """File name of the lock for share ``index`` of ``count``."""
    return f"writer-{index}-of-{count}.lock"


@contextmanager
def set_lock(folder: Path) -> Iterator[None]:
    """Hold what all writers have in common: the files' ownership, the index and the manifest.

    Raises:
        CacheLockedError: another process doesn't let go of it.
    """
    lock = acquired(folder / SET_LOCK, SET_LOCK_TIMEOUT)
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
        if lock := acquired(path):
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
                f"{path} is held: a `wsss generate-masks`, `relabel` or `propose-regions` is writing there; "
                "wait for it or stop it"
            )
        yield
