"""Filling a mask set: the only way records get into it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from wsss_pipeline.cache.finished_records import FinishedRecords
from wsss_pipeline.cache.index import Stamp, list_records, note_checked, read_trusted, write_index
from wsss_pipeline.cache.locks import WriterLock, is_written, set_lock
from wsss_pipeline.cache.manifest import (
    Completion,
    ShareCompletion,
    read_manifest,
    update_completion,
)
from wsss_pipeline.cache.records import RecordInfo
from wsss_pipeline.cache.salvage import finish_shard, salvage, take_over_partials
from wsss_pipeline.cache.shard_names import INDEX, ShardName, next_sequence
from wsss_pipeline.cache.shards import ShardBuilder
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import CacheError, OutputError
from wsss_pipeline.runtime.output import write_file, writing

IMAGES_PER_SHARD = 1000
BYTES_PER_SHARD = 64 * 2**20  # a shard is in memory until it is finished
IMAGES_PER_FLUSH = 32
SECONDS_PER_FLUSH = 10.0
# A flush writes the whole partial file: on a slow disk, not before so many times its last duration has gone.
FLUSH_REST = 20.0

logger = logging.getLogger(__name__)


class MaskWriter:
    """Context manager that writes share ``index`` of ``count`` of a mask set.

    Entering it takes the share's lock and salvages what interrupted runs left. Records gather in a shard in
    memory, which is written to a ``*.partial`` file every 32 images or 10 seconds, each time as a whole new
    file, and finished when it has ``images_per_shard`` images or 64 MiB. Leaving it, by an error as well,
    finishes the shard and sees to the index.

    Args:
        folder: of the mask set, from ``open_mask_set``.
        index: 0-based share of the work.
        count: number of shares.
        images_per_shard: a shard file holds at most so many images.

    Raises:
        CacheFormatError: the folder isn't a mask set of this format version.
        CacheLockedError: another process writes the same share.
        OutputError: disk full, read-only, no permission. From any method; finished shards are intact
            then, the partial file is as after the last flush, and nothing more can be written.
    """

    def __init__(
        self, folder: Path, index: int = 0, count: int = 1, *, images_per_shard: int = IMAGES_PER_SHARD
    ) -> None:
        self._folder = Path(folder)
        self._index, self._count = index, count
        self._images_per_shard = images_per_shard
        self._lock = WriterLock(self._folder, index, count)
        self._finished: FinishedRecords | None = None
        self._checked: dict[str, Stamp] = {}
        self._builder: ShardBuilder | None = None
        self._name: ShardName | None = None
        self._unsaved = 0
        self._last_flush = time.monotonic()
        self._flush_duration = 0.0
        self._is_marked_incomplete = False
        self._failed = False
        self._places: Mapping[str, str] = {}

    def __enter__(self) -> MaskWriter:
        self._fingerprint = read_manifest(self._folder).fingerprint
        with set_lock(self._folder):
            self._lock.acquire()
            try:
                partials = take_over_partials(self._folder, self._index, self._count)
            except BaseException:
                self._lock.release()
                raise
        try:
            for partial in partials:
                self._salvage(partial)
            self._finished = FinishedRecords(self._folder)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (CacheError, OutputError) as second:
            if error is None:
                raise
            logger.warning("%s", second)

    def record(self, image_id: str) -> RecordInfo | None:
        """What finished shards held of an image at the start; None where nothing, or a damaged record."""
        return self._records().get(image_id)

    def done(self, images: Mapping[str, tuple[str, tuple[str, ...]]], need_cams: bool = False) -> set[str]:
        """The images that finished shards held at the start, for the same bytes and labels.

        Args:
            images: image id to digest of the image file and class names.
            need_cams: a record without CAMs doesn't count.
        """
        return self._records().done(images, need_cams)

    def write(
        self, image_id: str, pseudo_mask: PseudoMask, *, image_digest: str, seconds: float, scale: float = 1.0
    ) -> None:
        """Add an image's record; it takes the place of an earlier one.

        Args:
            image_id: as ``find_images`` gives it.
            pseudo_mask: mask, confidence, labels, maybe CAMs.
            image_digest: SHA-256 of the image file, hexadecimal.
            seconds: time the mask took.
            scale: side of the picture that CLIP and CRF saw, by that of the image.

        Raises:
            CacheRecordError: the id can't be stored.
            OutputError: see the class.
        """
        self._records()
        if self._failed:
            raise OutputError(f"{self._folder}: an earlier write failed; run the same command again")
        if self._builder is None:
            self._begin_shard()
        assert self._builder is not None
        self._builder.add(image_id, pseudo_mask, image_digest=image_digest, seconds=seconds, scale=scale)
        self._unsaved += 1
        if len(self._builder) >= self._images_per_shard or self._builder.size >= BYTES_PER_SHARD:
            self._finish_shard()
        elif self._is_flush_due():
            self.flush()

    def flush(self) -> None:
        """Write what has gathered to the partial file, where a kill can't reach it."""
        if self._builder is None or self._name is None or not self._unsaved:
            return
        start = time.monotonic()
        with self._failing_for_good():
            self._mark_incomplete()
            write_file(self._folder / self._name.partial, self._builder.to_bytes(), durable=False)
        self._unsaved = 0
        self._last_flush = time.monotonic()
        self._flush_duration = self._last_flush - start

    def adopt(self, name: ShardName, stamp: Stamp) -> None:
        """A worker has written this shard (see ``ShardWriter``): count its images and believe its bytes."""
        self._checked[name.finished] = stamp

    def finish(self, expected_ids: Collection[str]) -> Completion:
        """Finish the shard at hand, and note in the manifest how complete the set is.

        Args:
            expected_ids: all images of this share, those that failed or were there before as well. The set is
                complete when each of the shares has finished with none of its images missing.
        """
        self._finish_shard()
        # outside the lock, which others wait for: what they finish meanwhile is theirs to count
        listing = list_records(self._folder, self._fingerprint)
        self._places = listing.places
        missing = sum(image_id not in listing.places for image_id in expected_ids)
        with set_lock(self._folder):
            completion = read_manifest(self._folder).completion
            shares = self._other_shares(completion)
            shares[f"{self._index}/{self._count}"] = ShareCompletion(len(expected_ids), missing)
            is_complete = len(shares) == self._count and not any(share.missing for share in shares.values())
            completion = Completion(len(listing.places), dict(sorted(shares.items())), is_complete)
            update_completion(self._folder, completion)
        return completion

    @property
    def places(self) -> Mapping[str, str]:
        """Image id to the finished shard that holds its record, as of ``finish``."""
        return self._places

    def close(self) -> None:
        """Finish the shard at hand, see to the index, let go of the lock; nothing more the second time.

        The index is rewritten whole, so of several writers only the last one to close does it; the others
        leave a note of the shards that need no checking.
        """
        if self._finished is None:
            return
        try:
            if not self._failed:
                self._finish_shard()
                if self._is_index_stale():
                    self._leave_index(self._checked | self._finished.checked)
        finally:
            self._finished = None
            if self._builder is not None:
                self._builder.close()
                self._builder = None
            self._lock.release()

    def _is_index_stale(self) -> bool:
        assert self._finished is not None
        if self._checked or self._finished.checked or not (self._folder / INDEX).exists():
            return True
        return bool(self._places) and set(read_trusted(self._folder)) != set(self._places.values())

    def _leave_index(self, checked: dict[str, Stamp]) -> None:
        with set_lock(self._folder):
            # let go within the set's lock: of two that close together, the second finds itself alone
            self._lock.release()
            if is_written(self._folder):
                note_checked(self._folder, self._index, self._count, checked)
                return
            listing = list_records(self._folder, self._fingerprint)
            write_index(self._folder, self._fingerprint, listing, read_trusted(self._folder) | checked)
            completion = read_manifest(self._folder).completion
            update_completion(self._folder, replace(completion, images=len(listing.places)))

    def _records(self) -> FinishedRecords:
        if self._finished is None:
            raise CacheError(f"{self._folder}: the writer isn't open; use it in a with statement")
        return self._finished

    def _salvage(self, partial: Path) -> None:
        found = salvage(partial, self._fingerprint)
        if found is not None:
            path, stamp = found
            self._checked[path.name] = stamp

    def _begin_shard(self) -> None:
        with self._failing_for_good(), writing(self._folder):
            self._name = ShardName(next_sequence(self._folder), self._index, self._count)
        self._builder = ShardBuilder(self._fingerprint)
        self._last_flush = time.monotonic()

    def _is_flush_due(self) -> bool:
        rested = time.monotonic() - self._last_flush
        is_time = self._unsaved >= IMAGES_PER_FLUSH or rested >= SECONDS_PER_FLUSH
        return is_time and rested >= FLUSH_REST * self._flush_duration

    def _finish_shard(self) -> None:
        if self._builder is None or self._name is None or self._failed:
            return
        if len(self._builder):
            with self._failing_for_good():
                self._mark_incomplete()
                stamp = finish_shard(self._folder, self._name, self._builder.to_bytes())
            self._checked[self._name.finished] = stamp
        self._builder.close()
        self._builder = self._name = None
        self._unsaved = 0

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """Remember that a write has failed: trying once more at the end would only hide the first error."""
        try:
            yield
        except (CacheError, OutputError):
            self._failed = True
            raise

    def _mark_incomplete(self) -> None:
        """Before the first write: a set that says it is complete no longer is, until ``finish``."""
        if self._is_marked_incomplete:
            return
        with set_lock(self._folder):
            completion = read_manifest(self._folder).completion
            shares = self._other_shares(completion)
            update_completion(self._folder, Completion(completion.images, shares, complete=False))
        self._is_marked_incomplete = True

    def _other_shares(self, completion: Completion) -> dict[str, ShareCompletion]:
        """Completion of the other shares of the same partition; another partition's says nothing here."""
        return {
            share: item
            for share, item in completion.shares.items()
            if share.endswith(f"/{self._count}") and share != f"{self._index}/{self._count}"
        }
