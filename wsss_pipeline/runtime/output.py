"""Output: files whole or not at all, with one line that says why where it can't be done; text as one safe line."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wsss_pipeline.errors import ConfigError, OutputError

# stands near the beginning or the end of every file that may be replaced later, as a proof of where it is from
MARK = "wsss-pipeline"
_MARK_WITHIN = 4096  # bytes from either end
_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp", re.DOTALL)
LONGEST_LINE = 2000

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
    errno.ELOOP: "remove the link, or name the folder that it leads to",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs that hold many files open",
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


def write_file(path: Path, content: bytes | str, *, durable: bool = True, below: Path | None = None) -> None:
    """Write all of a file, as ``replacing`` does; text is written as UTF-8."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")  # names of files may hold lone surrogates
    with replacing(path, durable=durable, below=below) as file:
        file.write(content)


def keep_file(
    path: Path,
    content: bytes,
    below: Path,
    *,
    overwrite: bool = False,
    remedy: str = "choose another folder, or move it away",
) -> bool:
    """Write a file that isn't there yet, as ``replacing`` does but without waiting for the disk.

    Args:
        path: the file; one that holds ``content`` already is left alone.
        content: all of it.
        below: folder that the user named, as for ``replacing``.
        overwrite: choice to replace a file with the program's mark that holds something else.
        remedy: advice where there is such a file and it isn't replaced.

    Returns:
        False where it was left alone.

    Raises:
        OutputError: it holds something else, or can't be written.
    """
    with writing(path):
        refuse_links(path.parent, below)
        try:
            status = path.lstat()
        except FileNotFoundError:
            is_there = False
        else:
            is_there, is_plain = True, stat.S_ISREG(status.st_mode)
            if is_plain and status.st_size == len(content) and path.read_bytes() == content:
                return False
    if is_there:
        check_replaceable(path)
        if not overwrite:
            raise OutputError(f"{path} is there already and holds something else; {remedy}")
    write_file(path, content, durable=False, below=below)
    return True


@contextmanager
def replacing(path: Path, *, durable: bool = True, below: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is whole; its folder is made where it isn't there.

    Nothing is written through a link: the new file is made under a name that nobody can have planted, and a link at
    ``path`` is replaced itself.

    Args:
        path: the file.
        durable: wait until it is on the disk, so that it outlives a power cut as well as a kill.
        below: folder that the user named; of the folders between it and ``path`` none may be a link.

    Raises:
        OutputError: the disk is full, read-only, ...; ``path`` is then as it was.
    """
    # cut, for the longest name that a file system allows has no room for a suffix
    temporary = path.with_name(f"{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        if below is not None:
            refuse_links(path.parent, below)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_new(temporary) as file:
                yield file
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


def open_new(path: Path) -> BinaryIO:
    """A file for writing that wasn't there before; an OSError where there is one, or a link of its name."""
    return os.fdopen(os.open(path, _FLAGS | os.O_EXCL, 0o666), "wb")


def append_line(path: Path, line: str) -> None:
    """Put a line behind a file's last; an OutputError where it is a link or no plain file, or can't be written."""
    with writing(path):
        descriptor = os.open(path, _FLAGS | os.O_APPEND, 0o666)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a plain file", str(path))
            file.write(f"{line}\n")


# a pipe without a reader is an error with O_NONBLOCK, and is waited for without
_FLAGS = os.O_WRONLY | os.O_CREAT
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
    _FLAGS |= getattr(os, _name, 0)


def refuse_links(folder: Path, below: Path) -> None:
    """An OSError where ``folder``, or one between it and ``below``, is a link."""
    while folder != below and below in folder.parents:
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it lies in a linked folder, and links aren't followed", str(folder))
        folder = folder.parent


def is_temporary(path: Path) -> bool:
    """Whether a name is one that ``replacing`` gives to a file that isn't whole yet."""
    return _TEMPORARY.fullmatch(path.name) is not None


def check_replaceable(path: Path) -> None:
    """Refuse to write over what this program can't have written.

    Raises:
        OutputError: there is something at ``path`` that doesn't carry the program's mark.
    """
    with writing(path):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        is_own = stat.S_ISREG(status.st_mode) and _is_marked(path)
    if not is_own:
        raise OutputError(
            f"{path} is there already, and this program didn't write it; give another name, or move it away"
        )


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_MARK_WITHIN)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _MARK_WITHIN))
        return MARK.encode() in start or MARK.encode() in file.read(_MARK_WITHIN)


def check_apart(output: Path, option: str, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output that is an input, holds one, or lies in one.

    Args:
        output: file or folder to be written.
        option: name of the option that gave it, for the message.
        inputs: option to file or folder that is read; None where not given.

    Raises:
        ConfigError: one of them is.
    """
    target = output.resolve()
    for name, path in inputs.items():
        source = target.parent if path is None else path.resolve()
        if path is None or not (source == target or source in target.parents or target in source.parents):
            continue
        how = "is" if source == target else "lies in" if source in target.parents else "holds"
        raise ConfigError(
            f"{option} {output} {how} {name} {path}, and that is only read; give {option} a place of its own"
        )


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


def one_line(text: object, at_most: int = LONGEST_LINE) -> str:
    """``text`` printable, with all white space folded; what is longer loses its middle."""
    line = printable(" ".join(str(text).split()))
    half = at_most // 2
    return line if len(line) <= at_most else f"{line[:half]} ... {line[-half:]}"
