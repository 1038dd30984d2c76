"""Output: files whole or not at all, with one line that says why where it can't be done; text as one safe line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsss_pipeline.errors import OutputError

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's complaints about ``path`` into one line that says what to do.

    Raises:
        OutputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "check that folder or choose another")
        raise OutputError(
            f"{path} can't be written: {reason}; {remedy}, then run the same command again: "
            "what was finished is kept"
        ) from error


def write_file(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write ``content`` beside ``path``, then put it in place of ``path``; its folder is made where it isn't there.

    Args:
        path: the file.
        content: all of it; text is written as UTF-8.
        durable: wait until it is on the disk, so that it outlives a power cut as well as a kill.

    Raises:
        OutputError: the disk is full, read-only, ...; ``path`` is then as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")  # names of files may hold lone surrogates
    # cut, for the longest name that a file system allows has no room for a suffix
    temporary = path.with_name(path.name[:100] + TEMPORARY_SUFFIX)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def printable(text: str) -> str:
    """``text`` as one line that a terminal takes for text: others' names may hold line breaks and escape codes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """``text`` printable, with all white space folded."""
    return printable(" ".join(str(text).split()))
