"""Where an image's bytes lie: in a file of its own, or among others in a tar archive."""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from wsss_pipeline.errors import ImageError

# size in bytes; times of modification and of change in nanoseconds; of an archive's member also its place
Status = tuple[int, ...]


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar archive.

    ``offset``, ``size``: of its bytes in the archive. ``labels``: the member beside it that holds its labels.
    """

    archive: Path
    name: str
    offset: int
    size: int
    labels: TarMember | None = None

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def check_file(file: ImageFile) -> int:
    """Size in bytes of a regular file that isn't empty.

    Raises:
        ImageError: not a regular file, or empty.
        OSError: it isn't there.
    """
    if isinstance(file, TarMember):
        size = file.size
    else:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{file}: not a file; name an image file")
    if size == 0:
        raise ImageError(f"{file}: the file is empty; replace or remove it")
    return size
