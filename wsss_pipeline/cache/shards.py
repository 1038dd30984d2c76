"""Shard files: named, built in memory, written whole, opened read-only.

HDF5 never writes to the disk here. Where a write fails (disk full, quota, file-size limit), HDF5 2.0 leaves a
file that often doesn't open any more, and crashes the process when it closes its handles; and a process
killed in the midst of a flush leaves the same. So a shard is built in memory and its bytes are written by us.
"""

from __future__ import annotations

import re
import stat
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from wsss_pipeline.cache.records import escape_id, own_member
from wsss_pipeline.errors import CacheFormatError
from wsss_pipeline.files import check_machine, check_plain
from wsss_pipeline.runtime.output import one_line

FORMAT_VERSION = 1
IMAGES = "images"
PARTIAL_SUFFIX = ".partial"
DAMAGED_SUFFIX = ".damaged"
# a shard is finished once it has 64 MiB, and the record of one image more takes at most 2.5 GiB, CAMs included
MAX_SHARD_BYTES = 3 * 2**30
METADATA_BYTES = 2**18  # that HDF5 keeps in memory of an open shard

# what a killed process was writing, in this mask set, with or without random digits in its name
_LEFT_OVER = re.compile(
    r"(manifest\.json|index\.h5|checked\.json|(known|checked)-\d+-of-\d+\.json|writer-\d+-of-\d+\.owner"
    r"|shard-\d+of\d+-\d+\.h5(\.partial)?)(\.[0-9a-f]{16})?\.tmp"
)
_PATTERN = re.compile(r"shard-(\d{1,9})of(\d{1,9})-(\d{1,9})\.h5(\..+)?")


@dataclass(frozen=True, order=True)
class ShardFile:
    """File ``sequence`` in the folder, by writer ``index`` of ``count``; the order is that of writing.

    ``suffix``: what stands behind ``.h5``, nothing for a finished one, which never changes.
    """

    sequence: int
    index: int
    count: int
    suffix: str
    path: Path


def named_shards(folder: Path) -> list[ShardFile]:
    """All files of shards, in order of writing; folders and the like under such names are nobody's business."""
    matches = ((_PATTERN.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(
        ShardFile(int(match[3]), int(match[1]), int(match[2]), match[4] or "", path)
        for match, path in matches
        if match is not None and (match[4] is None or is_plain(path))
    )


def is_plain(path: Path) -> bool:
    """Whether a plain file lies at ``path``, not a link to one."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def shard_files(folder: Path, suffix: str = "") -> list[Path]:
    """Files of shards with this suffix, in order of writing: what a later one says holds."""
    return [shard.path for shard in named_shards(folder) if shard.suffix == suffix]


def is_left_over(path: Path) -> bool:
    """Whether a file of a mask set is one that a killed process didn't finish, and nobody needs."""
    return _LEFT_OVER.fullmatch(path.name) is not None and is_plain(path)


def next_shard(folder: Path, index: int, count: int) -> str:
    """A new name, such as ``shard-0of4-00012.h5``, with a number larger than any shard file in the folder has."""
    sequence = 1 + max((shard.sequence for shard in named_shards(folder)), default=0)
    return f"shard-{index}of{count}-{sequence:05}.h5"


class ShardBuilder:
    """A shard in memory, or the index.

    Args:
        fingerprint: fingerprint of the mask set that it belongs to.

    Attributes:
        images: the group of its records, for ``write_record``.
        is_labelled: image id of each record to whether it has a label.
    """

    def __init__(self, fingerprint: str) -> None:
        # HDF5 takes two files in memory of the same name for one. The format of HDF5 1.10 has checksums in its
        # metadata (flipped bytes in the default format crashed HDF5) and saves 6 KB of index for each image.
        name = f"memory-{uuid.uuid4().hex}"
        self.file = h5py.File(name, "w", driver="core", backing_store=False, libver=("v110", "v110"))
        self.file.attrs["format_version"] = FORMAT_VERSION
        self.file.attrs["fingerprint"] = fingerprint
        self.images = self.file.create_group(IMAGES)
        self.is_labelled: dict[str, bool] = {}

    @property
    def size(self) -> int:
        """Bytes in memory, about those of the file to come."""
        return int(self.file.id.get_filesize())

    def copy(self, images: h5py.Group, image_id: str, is_labelled: bool) -> None:
        """Add a record out of another shard's ``images`` as it is, in place of one of the same image."""
        self.is_labelled[image_id] = is_labelled
        name = escape_id(image_id)
        if name in self.images:
            del self.images[name]
        self.images.copy(images[name], self.images, name=name)

    def to_bytes(self) -> bytes:
        """The file as it stands."""
        self.file.flush()
        content: bytes = self.file.id.get_file_image()
        return content

    def close(self) -> None:
        """Free the memory."""
        self.file.close()


class UnreadableShardError(CacheFormatError):
    """A shard can't be opened; ``is_damaged``: it isn't whole, rather than another's or refused by the system."""

    def __init__(self, message: str, is_damaged: bool) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged


def open_shard(path: Path, fingerprint: str) -> h5py.File:
    """A finished or partial shard, for reading; the group ``IMAGES`` of all records lies in the file itself.

    HDF5 goes round for ever in some damaged files: only those that ``inspection`` has been through are opened in
    the process that does the work.

    Raises:
        UnreadableShardError: the file is damaged, or belongs to another format version or mask set.
        ResourceError: this process has too many files open.
    """
    file: h5py.File | None = None
    try:
        check_plain(path, MAX_SHARD_BYTES)
        # "best-effort": file systems without locks can be read as well; a finished shard needs none
        file = h5py.File(path, "r", locking="best-effort")
        # HDF5 keeps what it knows of up to a thousand records, 20 to 40 MB a file, and many files are open
        kept = file.id.get_mdc_config()
        kept.set_initial_size, kept.incr_mode, kept.flash_incr_mode, kept.decr_mode = True, 0, 0, 0
        kept.initial_size = kept.min_size = kept.max_size = METADATA_BYTES
        file.id.set_mdc_config(kept)
        version, owner = file.attrs["format_version"], str(file.attrs["fingerprint"])
        if not isinstance(version, np.integer):
            raise ValueError(f"its format version is of type {type(version).__name__}")
        own_member(file, IMAGES, h5py.Group)
    except Exception as error:  # a damaged file makes HDF5 raise almost anything
        if file is not None:
            file.close()
        check_machine(error)
        # with a number it is the operating system that refuses
        is_damaged = not isinstance(error, OSError) or error.errno is None
        raise UnreadableShardError(
            f"{path} can't be opened ({one_line(error)}); `wsss cache gc` sets it aside", is_damaged
        ) from error
    if version != FORMAT_VERSION or owner != fingerprint:
        file.close()
        other = f"format version {version}" if version != FORMAT_VERSION else f"mask set {owner[:12]}"
        raise UnreadableShardError(f"{path} belongs to {other}, not to this folder; move it away", False)
    return file
