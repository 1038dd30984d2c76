"""What a mask set already holds, and for which bytes and labels, so that no mask is made twice.

Two things spare the reading, both as in git's index. A shard whose size and time are those at which it was checked
(``index``) is believed; every other one is checked when the first of its images is asked for. And an image file
whose size and times are as ``known-I-of-N.json`` has them is believed to hold the bytes that it held then.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from wsss_pipeline.cache.index import MAX_NOTES_BYTES, SoundShard, checked_shard, list_records
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import RecordInfo
from wsss_pipeline.data.image_files import ImageFile, Status, file_status
from wsss_pipeline.data.images import image_digest
from wsss_pipeline.errors import CacheFormatError, ImageError
from wsss_pipeline.files import check_machine, read_bytes
from wsss_pipeline.runtime.output import write_file

# A file may change twice within one tick of its clock: what was read so soon after a change isn't believed.
SETTLED_NS = 2 * 10**9

Entry = tuple[str, Status, tuple[str, ...], bool]  # shard, status of the file, labels, whether there are CAMs

logger = logging.getLogger(__name__)


# To be raised when the digests of images hang on something else: what was known before is then looked at again.
_DIGESTS = 2


class _Known(BaseModel):
    """The content of ``known-I-of-N.json``, by image id, and the version of its digests."""

    images: dict[str, Entry]
    digests: int = 1


class FinishedImages:
    """The images in finished shards, as they are when this is made. It takes no lock, and only ``save`` writes.

    Args:
        folder: folder of the mask set.
        index: 0-based share of the work.
        count: number of shares.
        checked: shards that the caller knows to be sound.

    Attributes:
        checked: these, and those that were found sound since.

    Raises:
        CacheFormatError: the folder isn't a mask set of this format version.
    """

    def __init__(
        self,
        folder: Path,
        index: int = 0,
        count: int = 1,
        checked: Mapping[str, SoundShard] | None = None,
    ) -> None:
        self._folder = folder
        self._manifest = read_manifest(folder)
        self._listing = list_records(
            folder, self._manifest.fingerprint, self._manifest.mask_set.kind, checked
        )
        self._shard_of = self._listing.shard_of
        self._path = folder / f"known-{index}-of-{count}.json"
        self._known: dict[str, Entry] = {}
        try:
            content = read_bytes(self._path, MAX_NOTES_BYTES)
            known = _Known.model_validate_json(content, strict=True)
            self._known = known.images if known.digests == _DIGESTS else {}
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            check_machine(error)
            logger.warning("%s can't be read; the images are looked at again", self._path)
        self._noted: dict[str, Entry] = {}
        self._records: dict[str, dict[str, RecordInfo]] = {}
        self.checked: dict[str, SoundShard] = dict(checked or {})

    def is_current(
        self,
        image_id: str,
        file: ImageFile,
        labels: tuple[str, ...] | None,
        *,
        need_cams: bool = False,
        check_bytes: bool = False,
    ) -> bool:
        """Whether there is a sound record for the bytes that ``file`` has and for these labels.

        Args:
            image_id: id from ``find_images``.
            file: the image; one that can't be read isn't current.
            labels: its class names, in order; None where they follow from the bytes, so that any will do.
            need_cams: a record without CAMs doesn't count.
            check_bytes: choice to read the file even where its size and times are as they were.
        """
        shard = self._shard_of.get(image_id)
        wanted = None if labels is None else tuple(labels)
        if shard is None:
            return False
        try:
            status = file_status(file)
        except OSError:
            return False
        if not check_bytes and shard in self._listing.sound and image_id in self._known:
            *entry, known, has_cams = self._known[image_id]
            if entry == [shard, status] and wanted in (None, known) and (has_cams or not need_cams):
                return True
        record = self.record(image_id)
        if record is None or wanted not in (None, record.labels) or (need_cams and not record.has_cams):
            return False
        try:
            if record.image_digest != image_digest(file):
                return False
        except ImageError:
            return False
        self.note(image_id, (shard, status, record.labels, record.has_cams))
        return True

    def record(self, image_id: str) -> RecordInfo | None:
        """What is known of an image; None where it has no record, or a damaged one."""
        shard = self._shard_of.get(image_id)
        if shard is None:
            return None
        if shard not in self._records:
            self._records[shard] = {}
            is_believed, path = shard in self._listing.sound, self._folder / shard
            manifest = self._manifest
            try:
                inspection = inspect(
                    path,
                    manifest.fingerprint,
                    manifest.mask_set.kind,
                    "infos" if is_believed else "records",
                )
            except CacheFormatError as error:
                logger.warning("its images are done again: %s", error)
                return None
            self._records[shard] = inspection.infos
            for reason in inspection.damaged.values():
                logger.warning("it is done again: %s", reason)
            if not is_believed:
                sound = checked_shard(self._listing.stamps[shard], inspection)
                self.checked |= {} if sound is None else {shard: sound}
        return self._records[shard].get(image_id)

    def note(self, image_id: str, entry: Entry) -> None:
        """Remember that a shard holds the mask for the bytes that a file of this status had."""
        _, status, _, _ = entry
        if time.time_ns() - max(status[1], status[2]) > SETTLED_NS:
            self._noted[image_id] = entry

    def save(self, shard_of: Mapping[str, str]) -> None:
        """Write what was noted, for the next run; ``shard_of``: image id to the shard that holds its mask now."""
        if self._noted:
            known = (self._known | self._noted).items()
            images = {image_id: entry for image_id, entry in known if shard_of.get(image_id) == entry[0]}
            content = {"digests": _DIGESTS, "images": images}
            write_file(self._path, json.dumps(content, separators=(",", ":")), durable=False)
