"""What a mask set already holds, and for which bytes and labels, so that no mask is made twice.

Two things spare the reading, both as in git's index. A shard whose size and time are those at which it was checked
(``index``) is believed; every other one is checked when the first of its images is asked for. And an image file
whose size and times are as a ``known-I-of-N.json`` has them is believed to hold the bytes that it held then.

There may be millions of images. So these lists are read a line at a time, and shards one after the other; of an image
itself nothing is kept but its id.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from wsss_pipeline.cache.index import (
    Listing,
    SoundShard,
    Stamp,
    add_lines,
    checked_shard,
    list_records,
    note_checked,
    read_lines,
    stamp,
)
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import RecordInfo
from wsss_pipeline.cache.shards import shard_files
from wsss_pipeline.data.image_files import ImageFile, Status, file_status
from wsss_pipeline.data.images import image_digest
from wsss_pipeline.errors import CacheFormatError, ImageError
from wsss_pipeline.runtime.output import replacing

# A file may change twice within one tick of its clock: what was read so soon after a change isn't believed.
SETTLED_NS = 2 * 10**9

Entry = tuple[str, Status, tuple[str, ...], bool]  # shard, status of the file, labels, whether there are CAMs

logger = logging.getLogger(__name__)

# To be raised when the digests of images hang on something else: what was known before is then looked at again.
_DIGESTS = 2
_KNOWN = "known-*-of-*.json"
_IMAGES_PER_LINE = 1000


class _Known(BaseModel):
    """A line of ``known-I-of-N.json``: some images by id, and the version of their digests."""

    images: dict[str, Entry]
    digests: int = 1


class FinishedImages:
    """The images in finished shards, as they are when this is made.

    It takes no lock, and only ``save`` and ``tidy`` write.

    Args:
        folder: folder of the mask set.
        index: 0-based share of the work.
        count: number of shares.
        checked: shards that the caller knows to be sound.

    Attributes:
        listing: what the finished shards hold.
        has_checked: True where the caller has checked some, or some were found sound since.

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
        self._share = index, count
        self._checked = dict(checked or {})  # that aren't in a note yet
        self.has_checked = bool(checked)
        self.listing = self._list()
        self._path = folder / f"known-{index}-of-{count}.json"
        self._noted: dict[str, Entry] = {}
        self._unsaved: list[str] = []  # lines
        self._is_changed = False

    def _list(self) -> Listing:
        return list_records(
            self._folder, self._manifest.fingerprint, self._manifest.mask_set.kind, self._checked
        )

    def list_again(self) -> Listing:
        """Look what the finished shards hold now; ``listing`` from then on."""
        now: dict[str, Stamp] = {}
        for path in shard_files(self._folder):
            with suppress(OSError):  # which the listing reports
                now[path.name] = stamp(path)
        if now != self.listing.stamps:
            self.listing = Listing()  # a second one of a million images isn't to lie beside it
            self.listing = self._list()
        return self.listing

    def unfinished(
        self,
        image_ids: Sequence[str],
        files: Mapping[str, ImageFile],
        labels: Mapping[str, tuple[str, ...] | None],
        *,
        need_cams: bool = False,
        check_bytes: bool = False,
    ) -> list[str]:
        """Those of the images without a sound record for the bytes that their files have and for their labels.

        Args:
            image_ids: ids from ``find_images``.
            files: image id to file; one that can't be read is unfinished.
            labels: image id to class names, in order; None where they follow from the bytes, so that any will do.
            need_cams: a record without CAMs doesn't count.
            check_bytes: choice to read files even where their size and times are as they were.
        """
        left, shard_of, sound = dict.fromkeys(image_ids), self.listing.shard_of, self.listing.sound
        others = sorted(path for path in self._folder.glob(_KNOWN) if path != self._path)
        for path in () if check_bytes else (self._path, *others):
            for known in self._lines(path) if left else ():
                for image_id, (shard, status, names, has_cams) in known.items():
                    if (
                        image_id in left
                        and shard in sound
                        and shard_of.get(image_id) == shard
                        and labels[image_id] in (None, names)
                        and (has_cams or not need_cams)
                        and _status(files[image_id]) == status
                    ):
                        del left[image_id]
        of_shard: defaultdict[str, list[str]] = defaultdict(list)
        for image_id in left:
            if image_id in shard_of:
                of_shard[shard_of[image_id]].append(image_id)
        for shard, members in of_shard.items():
            records = self._inspected(shard, members)
            for image_id in members:
                record, wanted = records.get(image_id), labels[image_id]
                if (
                    record is None
                    or wanted not in (None, record.labels)
                    or (need_cams and not record.has_cams)
                ):
                    continue
                now = _status(files[image_id])
                with suppress(ImageError):
                    if now is not None and record.image_digest == image_digest(files[image_id]):
                        self.note(image_id, (shard, now, record.labels, record.has_cams))
                        del left[image_id]
        return list(left)

    def record(self, image_id: str) -> RecordInfo | None:
        """What is known of an image; None where it has no record, or a damaged one."""
        shard = self.listing.shard_of.get(image_id)
        return None if shard is None else self._inspected(shard, [image_id]).get(image_id)

    def _inspected(self, shard: str, image_ids: Sequence[str]) -> dict[str, RecordInfo]:
        """What is known of the sound records of these images; a shard that nobody has checked is read whole."""
        is_believed, path, manifest = shard in self.listing.sound, self._folder / shard, self._manifest
        try:
            inspection = inspect(
                path,
                manifest.fingerprint,
                manifest.mask_set.kind,
                *(("infos", image_ids) if is_believed else ("records", None)),
            )
        except CacheFormatError as error:
            logger.warning("its images are done again: %s", error)
            return {}
        for reason in inspection.damaged.values():
            logger.warning("it is done again: %s", reason)
        if not is_believed and (sound := checked_shard(self.listing.stamps[shard], inspection)):
            self.note_sound(shard, sound)
        return inspection.infos

    def note_sound(self, shard: str, sound: SoundShard) -> None:
        """Remember that all records of a shard are sound."""
        self._checked[shard] = sound
        self.has_checked = True

    def note(self, image_id: str, entry: Entry) -> None:
        """Remember that a shard holds the mask for the bytes that a file of this status had."""
        _, status, _, _ = entry
        if time.time_ns() - max(status[1], status[2]) > SETTLED_NS:
            self._noted[image_id] = entry
            if len(self._noted) >= _IMAGES_PER_LINE:
                self._pack()

    def _pack(self) -> None:
        if self._noted:
            self._unsaved.append(_line(self._noted))
            self._noted = {}

    def save(self) -> None:
        """Write what was noted behind what is known, for the next run; the shards that it is about are finished."""
        if self._checked:
            note_checked(self._folder, *self._share, self._checked)
            self._checked = {}
        self._pack()
        if self._unsaved:
            add_lines(self._path, self._unsaved)
            self._unsaved, self._is_changed = [], True

    def tidy(self) -> None:
        """Leave out of what is known what no longer holds, now that ``listing`` is of the end of the run."""
        if not self._is_changed:
            return
        latest: dict[str, int] = {}  # image id to the number of the line that counts
        shard_of = self.listing.shard_of
        for number, known in enumerate(self._lines(self._path)):
            for image_id, (shard, *_) in known.items():
                if shard_of.get(image_id) == shard:
                    latest[image_id] = number
        with replacing(self._path, durable=False) as file:
            for number, known in enumerate(self._lines(self._path)):
                if kept := {i: entry for i, entry in known.items() if latest.get(i) == number}:
                    file.write(f"{_line(kept)}\n".encode())
        self._is_changed = False

    def _lines(self, path: Path) -> Iterator[dict[str, Entry]]:
        """What a list of known images says, line by line; one that can't be understood costs its own images alone."""
        for known in read_lines(path, _Known, "the images are looked at again"):
            if known.digests == _DIGESTS:
                yield known.images


def _line(images: Mapping[str, Entry]) -> str:
    return json.dumps({"digests": _DIGESTS, "images": images}, separators=(",", ":"))


def _status(file: ImageFile) -> Status | None:
    try:
        return file_status(file)
    except OSError:
        return None
