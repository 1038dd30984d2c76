"""Shard files: built in memory, written whole, opened read-only.

HDF5 never writes to the disk here. Where a write fails (disk full, quota, file-size limit), HDF5 2.0 leaves a
file that often doesn't open any more, and crashes the process when it closes its handles; and a process
killed in the midst of a flush leaves the same. So a shard is built in memory and its bytes are written by us.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from wsss_pipeline.cache.records import escape_id, write_record
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import CacheFormatError

FORMAT_VERSION = 1
IMAGES = "images"


class ShardBuilder:
    """A shard in memory.

    Args:
        fingerprint: of the mask set that the shard belongs to.
    """

    def __init__(self, fingerprint: str) -> None:
        self._file = new_file_in_memory()
        self._file.attrs["format_version"] = FORMAT_VERSION
        self._file.attrs["fingerprint"] = fingerprint
        self._images = self._file.create_group(IMAGES)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """Bytes in memory, about those of the file to come."""
        return int(self._file.id.get_filesize())

    def add(
        self, image_id: str, pseudo_mask: PseudoMask, *, image_digest: str, seconds: float, scale: float
    ) -> None:
        """Add a record, in place of one of the same image."""
        write_record(
            self._images, image_id, pseudo_mask, image_digest=image_digest, seconds=seconds, scale=scale
        )
        self._count = len(self._images)

    def copy(self, images: h5py.Group, image_id: str) -> None:
        """Add a record out of another shard's ``images`` as it is, in place of one of the same image."""
        name = escape_id(image_id)
        if name in self._images:
            del self._images[name]
        self._images.copy(images[name], self._images, name=name)
        self._count = len(self._images)

    def to_bytes(self) -> bytes:
        """The file as it stands."""
        return file_image(self._file)

    def close(self) -> None:
        """Free the memory."""
        self._file.close()


def new_file_in_memory() -> h5py.File:
    """An empty HDF5 file that never touches the disk."""
    # HDF5 takes two such files of the same name for one. The format of HDF5 1.10 has checksums in its
    # metadata (flipped bytes in the default format crashed HDF5) and saves 6 KB of index for each image.
    name = f"memory-{uuid.uuid4().hex}"
    return h5py.File(name, "w", driver="core", backing_store=False, libver=("v110", "v110"))


def file_image(file: h5py.File) -> bytes:
    """The bytes of a file in memory."""
    file.flush()
    image: bytes = file.id.get_file_image()
    return image


@contextmanager
def open_shard(path: Path, fingerprint: str) -> Iterator[h5py.Group]:
    """The group of all records of a finished or partial shard, open for reading.

    Raises:
        CacheFormatError: the file is damaged, or belongs to another format version or mask set.
    """
    file, images = open_images(path, fingerprint)
    try:
        yield images
    finally:
        file.close()


def open_images(path: Path, fingerprint: str) -> tuple[h5py.File, h5py.Group]:
    """The file, which the caller closes, and its group of all records.

    Raises:
        CacheFormatError: the file is damaged, or belongs to another format version or mask set.
    """
    file: h5py.File | None = None
    try:
        # "best-effort": file systems without locks can be read as well; a finished shard needs none
        file = h5py.File(path, "r", locking="best-effort")
        version, found = int(file.attrs["format_version"]), str(file.attrs["fingerprint"])
        images = file[IMAGES]
        if not isinstance(images, h5py.Group):
            raise TypeError(f"'{IMAGES}' isn't a group")
    except Exception as error:  # a damaged file makes HDF5 raise almost anything
        if file is not None:
            file.close()
        reason = " ".join(str(error).split())
        raise CacheFormatError(f"{path} can't be opened ({reason}); `wsss cache gc` sets it aside") from error
    if version != FORMAT_VERSION or found != fingerprint:
        file.close()
        other = f"format version {version}" if version != FORMAT_VERSION else f"mask set {found[:12]}"
        raise CacheFormatError(f"{path} belongs to {other}, not to this folder; move it away")
    return file, images
