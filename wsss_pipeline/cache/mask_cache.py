"""Reading a mask set."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py

from wsss_pipeline.cache.index import list_records
from wsss_pipeline.cache.manifest import Manifest, only_mask_set, read_manifest
from wsss_pipeline.cache.records import RecordInfo, read_info, read_record, read_texts
from wsss_pipeline.cache.shards import IMAGES, open_shard
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import CacheFormatError, CacheRecordError
from wsss_pipeline.runtime.output import one_line

OPEN_SHARDS = 64  # file handles that one process keeps


class MaskCache:
    """The masks of one mask set, by image id: ``cache[image_id]``, ``in``, ``len``, iteration sorted by id.

    A ``MaskSource``. Read only, and a snapshot of the finished shards at the time of ``open``. It may be
    pickled, and forked: each process opens files of its own when it first needs them.

    Attributes:
        path: the mask set's folder.
        manifest: description of the mask set; its ``completion`` as it was at the time of ``open``.
        shard_of: image id to the name of the shard that holds its record, sorted by id.
        superseded: number of records that a later one of the same image replaces.
        unreadable: file name to reason for shards that can't be opened; their images count as missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        listing = list_records(path, self.manifest.fingerprint)
        self.superseded = listing.superseded
        self.unreadable = {shard: one_line(error) for shard, error in listing.unreadable.items()}
        self.shard_of: dict[str, str] = dict(sorted(listing.shard_of.items()))
        self._open: OrderedDict[str, h5py.File] = OrderedDict()
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path | str) -> MaskCache:
        """The mask set at ``path``, or the only one right below it.

        Raises:
            CacheFormatError: it isn't a mask set, or one of another format version.
            CacheError: there are several; the message lists them.
        """
        return cls(only_mask_set(Path(path)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of mask values 1..C; 0 is background."""
        return self.manifest.mask_set.class_names

    @property
    def identity(self) -> str:
        """The fingerprint: SHA-256 of what determines the masks, hexadecimal."""
        return self.manifest.fingerprint

    @property
    def description(self) -> str:
        """Where the masks are from, for people."""
        return f"mask set {self.path}"

    def __len__(self) -> int:
        return len(self.shard_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_of)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.shard_of

    def __getitem__(self, image_id: str) -> PseudoMask:
        """The pseudo mask of an image, its digest checked.

        Raises:
            CacheRecordError: there is none, it is damaged, or it holds a value that is no class.
        """
        pseudo_mask, _ = read_record(self._images(image_id), image_id)
        largest = pseudo_mask.mask.max()
        if largest > len(self.class_names):
            raise CacheRecordError(
                f"the mask of image '{image_id}' in {self.path} holds the value {largest}, but the mask set has "
                f"{len(self.class_names)} classes; this program wrote no such mask: make them anew elsewhere"
            )
        return pseudo_mask

    def labels(self, image_id: str) -> tuple[str, ...]:
        """The class names of an image, without reading its arrays.

        Raises:
            CacheRecordError: there is no record, or it is damaged.
        """
        return read_texts(self._images(image_id), image_id, "labels")

    def record_info(self, image_id: str) -> RecordInfo:
        """What is known of an image without reading its arrays.

        Raises:
            CacheRecordError: there is no record, or it is damaged.
        """
        return read_info(self._images(image_id), image_id)

    def missing(self, image_ids: Iterable[str]) -> list[str]:
        """Those of ``image_ids`` that aren't there, in their order."""
        return [image_id for image_id in image_ids if image_id not in self.shard_of]

    def close(self) -> None:
        """Close the files; the next access opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> MaskCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _images(self, image_id: str) -> h5py.Group:
        """The group, in the shard that has it, of all records."""
        shard = self.shard_of.get(image_id)
        if shard is None:
            raise CacheRecordError(
                f"image '{image_id}' isn't in the cache {self.path}; `wsss generate-masks --cache "
                f"{self.path.parent}` with the options of the first run fills it"
            )
        if self._process != os.getpid():
            # Another process's handles came along with a fork. They aren't ours to use.
            self._open = OrderedDict()
            self._process = os.getpid()
        if shard not in self._open:
            try:
                self._open[shard] = open_shard(self.path / shard, self.manifest.fingerprint)
            except CacheFormatError as error:
                raise CacheRecordError(f"image '{image_id}': {error}") from error
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard][IMAGES]
