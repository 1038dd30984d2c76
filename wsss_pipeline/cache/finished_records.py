"""What a mask set already holds, as far as it can be relied on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import h5py

from wsss_pipeline.cache.index import Stamp, list_records, read_trusted, stamp
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import RecordInfo, check_records, read_info, unescape_id
from wsss_pipeline.cache.shards import open_images
from wsss_pipeline.errors import CacheFormatError, CacheRecordError

logger = logging.getLogger(__name__)


class FinishedRecords:
    """The records in finished shards, as they are when this is made.

    A shard that ``index.h5`` knows with the same size and time is believed. Every other one is checked record
    by record when the first of its images is asked for, so that flipped bytes don't pass for a mask.

    Args:
        folder: of the mask set.

    Raises:
        CacheFormatError: the folder isn't a mask set of this format version.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fingerprint = read_manifest(folder).fingerprint
        self._places = list_records(folder, self._fingerprint).places
        self._trusted = read_trusted(folder)
        self._records: dict[str, dict[str, RecordInfo]] = {}
        self.checked: dict[str, Stamp] = {}

    def get(self, image_id: str) -> RecordInfo | None:
        """What is known of an image; None where it has no record, or a damaged one."""
        shard = self._places.get(image_id)
        if shard is None:
            return None
        if shard not in self._records:
            self._records[shard] = self._read_shard(shard)
        return self._records[shard].get(image_id)

    def done(self, images: Mapping[str, tuple[str, tuple[str, ...]]], need_cams: bool) -> set[str]:
        """The images whose record is there and belongs to these bytes and labels.

        Args:
            images: image id to digest of the image file and class names.
            need_cams: a record without CAMs doesn't count.
        """
        found = set()
        for image_id, (digest, labels) in images.items():
            record = self.get(image_id)
            if (
                record is not None
                and record.image_digest == digest
                and record.labels == tuple(labels)
                and (record.has_cams or not need_cams)
            ):
                found.add(image_id)
        return found

    def _read_shard(self, shard: str) -> dict[str, RecordInfo]:
        path = self._folder / shard
        try:
            before = stamp(path)
            file, images = open_images(path, self._fingerprint)
        except (OSError, CacheFormatError) as error:
            logger.warning("its images are done again: %s", error)
            return {}
        with file:
            if self._trusted.get(shard) == before:
                return self._believed(images)
            records, damaged = check_records(images)
        for reason in damaged.values():
            logger.warning("it is done again: %s", reason)
        if not damaged:
            self.checked[shard] = before
        return records

    def _believed(self, images: h5py.Group) -> dict[str, RecordInfo]:
        records = {}
        for name in images:
            image_id = unescape_id(name)
            try:
                records[image_id] = read_info(images, image_id)
            except CacheRecordError as error:
                logger.warning("it is done again: %s", error)
        return records
