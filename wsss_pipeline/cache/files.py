"""Whole files, written so that a reader finds the old content or the new, and nothing between."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsss_pipeline.errors import CacheWriteError

TEMPORARY_SUFFIX = ".tmp"

_REMEDIES = {
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write to, or have its permissions changed",
    errno.EPERM: "choose a folder that you may write to, or have its permissions changed",
    errno.EIO: "check the disk or choose another folder",
    errno.ENOTDIR: "choose a path that has no file in it where a folder should be",
    errno.EEXIST: "choose a path that has no file in it where a folder should be",
}


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` beside ``path``, then put it in place of ``path``.

    Args:
        path: the file; its folder must be there.
        content: all of it.
        durable: wait until it is on the disk, so that it outlives a power cut as well as a kill.

    Raises:
        CacheWriteError: the disk is full, read-only, ...; ``path`` is then as it was.
    """
    # Cut, for the longest name a file system allows has no room for a suffix.
    temporary = path.with_name(path.name[:100] + TEMPORARY_SUFFIX)
    with writing(path.parent):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where the file system can tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's complaints about ``folder`` into one line that says what to do.

    Raises:
        CacheWriteError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "check that folder or choose another")
        raise CacheWriteError(
            f"{folder} can't be written: {reason}; {remedy}, then run the same command again: "
            "what was finished is kept"
        ) from error
