"""Reading a set of records, above all of masks."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Self

import h5py

from wsss_pipeline.cache.index import Listing, list_records, open_checked
from wsss_pipeline.cache.manifest import Manifest, only_mask_set, read_manifest
from wsss_pipeline.cache.records import (
    Content,
    Holds,
    RecordInfo,
    RecordKind,
    read_info,
    read_record,
    read_texts,
)
from wsss_pipeline.cache.shards import IMAGES
from wsss_pipeline.config import PixelRange, as_pixel_range
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import CacheFormatError, CacheRecordError, ResourceError
from wsss_pipeline.runtime.output import one_line

OPEN_SHARDS = 64  # file handles that one process keeps


class RecordCache(Generic[Content]):
    """The records of one set, by image id: ``in``, ``len``, iteration sorted by id; what they hold, subclasses give.

    Read only, and a snapshot of the finished shards at the time of ``open``, whatever ``gc`` does meanwhile. It may
    be pickled, and forked: each process opens files of its own when it first needs them.

    Attributes:
        holds: what lies in the set.
        path: the set's folder.
        manifest: description of the set; its ``completion`` as it was at the time of ``open``.
        shard_of: image id to the name of the shard that holds its record, sorted by id.
        superseded: number of records that a later one of the same image replaces.
        unreadable: file name to reason for shards that can't be opened; their images count as missing.
    """

    holds: ClassVar[Holds]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        if (found := self.manifest.mask_set.holds) != self.holds:
            raise CacheFormatError(f"{path} holds {found}, not {self.holds}; name a set of {self.holds}")
        self._kind: RecordKind[Content] = self.manifest.mask_set.kind
        listing = self._list()
        self.superseded = listing.superseded
        self.unreadable = {shard: one_line(error) for shard, error in listing.unreadable.items()}
        self.shard_of: dict[str, str] = dict(sorted(listing.shard_of.items()))
        self._open: OrderedDict[str, h5py.File] = OrderedDict()
        self._process = os.getpid()

    def _list(self) -> Listing:
        listing = list_records(self.path, self.manifest.fingerprint, self._kind)
        # ids take memory in each process that loads samples, and stand in ``shard_of``
        self._sound = {name: sound.model_copy(update={"images": []}) for name, sound in listing.sound.items()}
        return listing

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The set at ``path``, or the only one of its kind right below it.

        Raises:
            CacheFormatError: it isn't a set of this kind, or one of another format version.
            CacheError: there are several; the message lists them.
        """
        return cls(only_mask_set(Path(path), cls.holds))

    def __len__(self) -> int:
        return len(self.shard_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_of)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.shard_of

    def read(self, image_id: str) -> Content:
        """What the record of an image holds, its digest checked.

        Raises:
            CacheRecordError: there is none, it is damaged, or it holds what no such record may.
        """
        content, _ = read_record(self._images(image_id), image_id, self._kind)
        return content

    def record_info(self, image_id: str) -> RecordInfo:
        """What is known of an image without reading its arrays.

        Raises:
            CacheRecordError: there is no record, or it is damaged.
        """
        return read_info(self._images(image_id), image_id, self._kind)

    def missing(self, image_ids: Iterable[str]) -> list[str]:
        """Those of ``image_ids`` that aren't there, in their order."""
        return [image_id for image_id in image_ids if image_id not in self.shard_of]

    def close(self) -> None:
        """Close the files; the next access opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _images(self, image_id: str) -> h5py.Group:
        """The group, in the shard that has it, of all records."""
        shard = self.shard_of.get(image_id)
        if shard is None:
            remedy = self._kind.remedy.replace("{folder}", str(self.path.parent))
            raise CacheRecordError(f"image '{image_id}' isn't in the cache {self.path}; {remedy}")
        if self._process != os.getpid():
            # Another process's handles came along with a fork. They aren't ours to use.
            self._open = OrderedDict()
            self._process = os.getpid()
        while shard not in self._open:
            path, manifest = self.path / shard, self.manifest
            try:
                file = open_checked(path, manifest.fingerprint, self._kind, self._sound.get(shard))
            except ResourceError:
                if not self._open:
                    raise
                self.close()  # others of this process need files as well
                continue
            except CacheFormatError as error:
                if not path.exists():
                    self._follow_gc()
                if self.shard_of[image_id] == shard:
                    raise CacheRecordError(f"image '{image_id}': {error}") from error
                shard = self.shard_of[image_id]
                continue
            self._open[shard] = file
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard][IMAGES]

    def _follow_gc(self) -> None:
        """``wsss cache gc`` has put records into new shards and removed the old ones: look where they are now."""
        listing = self._list()
        for image_id, shard in self.shard_of.items():
            if shard not in listing.stamps:
                self.shard_of[image_id] = listing.shard_of.get(image_id, shard)


class MaskCache(RecordCache[PseudoMask]):
    """The masks of one mask set, by image id: ``cache[image_id]``. A ``MaskSource``; further as ``RecordCache``."""

    holds = "masks"

    @property
    def pixel_range(self) -> PixelRange | None:
        """Values of images that the masks were made with as 0 and 255, where they were given; see ``read_image``."""
        try:
            return as_pixel_range(self.manifest.mask_set.determinants.get("pixel_range"))
        except ValueError as error:
            raise CacheFormatError(f"{self.path}: its manifest's pixel_range: {error}") from error

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

    def __getitem__(self, image_id: str) -> PseudoMask:
        """The pseudo mask of an image, its digest checked.

        Raises:
            CacheRecordError: there is none, it is damaged, or it holds a value that is no class.
        """
        return self.read(image_id)

    def labels(self, image_id: str) -> tuple[str, ...]:
        """The class names of an image, without reading its arrays.

        Raises:
            CacheRecordError: there is no record, or it is damaged.
        """
        return read_texts(self._images(image_id), image_id, "labels")
