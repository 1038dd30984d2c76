"""Where an image's bytes lie: in a file of its own, or among others in a tar archive."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass, replace
from pathlib import Path

from wsss_pipeline.files import open_plain

MOST_ARCHIVE_BYTES = 2**50  # of an archive, of which little is read at a time

# size in bytes; times of modification and of change in nanoseconds; of an archive's member also where it begins
Status = tuple[int, ...]


@dataclass(frozen=True, slots=True)  # there may be millions
class TarMember:
    """A file inside an uncompressed tar archive.

    Attributes:
        archive: the archive.
        name: path inside it.
        offset: bytes of the archive before its own.
        size: number of its bytes.
        labels: the member beside it that holds its labels.
    """

    archive: Path
    name: str
    offset: int
    size: int
    labels: TarMember | None = None

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read_bytes(self) -> bytes:
        """Its bytes; an OSError where the archive can't be read, or ends before the member does."""
        with open_plain(self.archive, MOST_ARCHIVE_BYTES) as file:
            # asked for before memory is: a damaged header may name any size
            if self.offset + self.size > file.seek(0, io.SEEK_END):
                raise OSError(errno.EINVAL, f"{self.archive} ends in the midst of it", str(self))
            file.seek(self.offset)
            return file.read(self.size)


ImageFile = Path | TarMember


def absolute(file: ImageFile) -> ImageFile:
    """The same file under a path that holds in any current folder."""
    return file.absolute() if isinstance(file, Path) else replace(file, archive=file.archive.absolute())


def is_there(file: ImageFile) -> bool:
    """Whether the file, or the archive, exists."""
    return (file if isinstance(file, Path) else file.archive).exists()


def file_status(file: ImageFile) -> Status:
    """What tells whether a file has changed; take it before reading the file. An OSError where it isn't there."""
    if isinstance(file, TarMember):
        status = file.archive.stat()
        return file.size, status.st_mtime_ns, status.st_ctime_ns, file.offset
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def reading_order(file: ImageFile) -> tuple[str, int]:
    """Sorts files so that an archive is read from its beginning to its end; files of their own stay as they are."""
    return ("", 0) if isinstance(file, Path) else (str(file.archive), file.offset)
