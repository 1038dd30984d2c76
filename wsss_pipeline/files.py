"""Reading files that may be anybody's: plain ones of a bounded size, or an OSError before anything is waited for.

A pipe has no end, ``/dev/zero`` neither, and a sparse file of 300 GiB takes no room on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from wsss_pipeline.errors import ResourceError

MIB = 2**20
GIT_LFS_POINTER = "version https://git-lfs.github.com/"  # how a file begins that Git LFS is yet to fetch

# what the machine ran out of, and what to do about it
_EXHAUSTED = {
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --workers",
    errno.ENFILE: "close other programs that hold many files open, or lower --workers",
    errno.ENOMEM: "close other programs, or lower --workers",
}


def open_plain(path: Path, at_most: int) -> BufferedReader:
    """A plain file of at most so many bytes, open for reading.

    Raises:
        OSError: it isn't there, is something else than a plain file, too large, or can't be read.
    """
    # looked at before it is opened: opening a device may do something, opening a pipe waits
    check_plain(path, at_most)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(descriptor), path, at_most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_plain(path: Path, at_most: int) -> None:
    """An OSError where ``open_plain`` would raise one; for files that a library opens itself."""
    _check(path.stat(), path, at_most)


def _check(status: os.stat_result, path: Path, at_most: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    if status.st_size > at_most:
        raise OSError(
            errno.EFBIG, f"it has {status.st_size:,} bytes, at most {at_most:,} are read", str(path)
        )


def read_bytes(path: Path, at_most: int) -> bytes:
    """All of a plain file; an OSError as ``open_plain``, also where it grows beyond ``at_most`` meanwhile."""
    with open_plain(path, at_most) as file:
        # no more memory is asked for than the file says it takes
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
        if len(content) > size:  # it has grown
            content += file.read(at_most + 1 - len(content))
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
    return content


def check_machine(error: BaseException) -> None:
    """A ResourceError where an OSError says that the machine ran out of something, whatever file it was about."""
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        raise ResourceError(
            f"this machine ran out of what opening a file takes: {error.strerror}; {_EXHAUSTED[error.errno]}, "
            "then run the same command again: what was finished is kept"
        ) from error


def read_text(path: Path, at_most: int) -> str:
    """A UTF-8 file, with or without a byte order mark; an OSError as ``open_plain``, a UnicodeDecodeError."""
    return read_bytes(path, at_most).decode("utf-8-sig")


def read_json(path: Path, at_most: int) -> Any:
    """A JSON file; an OSError as ``open_plain``, a ValueError where it isn't JSON or is nested without end."""
    return parse_json(read_bytes(path, at_most))


def parse_json(content: bytes | str) -> Any:
    """JSON text; a ValueError where it is none, or nested without end."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
