"""Filling a mask set: the only way records get into it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsss_pipeline.cache.finished import FinishedImages
from wsss_pipeline.cache.index import (
    INDEX,
    SoundShard,
    stamp,
    write_index,
)
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.locks import WriterLock, held_locks, lock_name, set_lock
from wsss_pipeline.cache.manifest import Completion, ShareCompletion, read_manifest, update_completion
from wsss_pipeline.cache.records import RecordKind, write_record
from wsss_pipeline.cache.shards import (
    DAMAGED_SUFFIX,
    IMAGES,
    PARTIAL_SUFFIX,
    ShardBuilder,
    UnreadableShardError,
    is_left_over,
    named_shards,
    next_shard,
    open_shard,
)
from wsss_pipeline.data.image_files import ImageFile, Status
from wsss_pipeline.errors import CacheError, OutputError
from wsss_pipeline.runtime.output import sync_folder, write_file, writing

IMAGES_PER_SHARD = 1000
BYTES_PER_SHARD = 64 * 2**20  # a shard is in memory until it is finished
IMAGES_PER_FLUSH = 32
SECONDS_PER_FLUSH = 10.0
# A flush writes the whole partial file: on a slow disk, not before so many times its last duration has gone.
FLUSH_REST = 20.0

logger = logging.getLogger(__name__)


class MaskWriter:
    """Context manager that writes share ``index`` of ``count`` of a set of masks or regions.

    Entering it takes the share's lock and salvages what interrupted runs left. Records gather in a shard in
    memory, which is written to a ``*.partial`` file every 32 images or 10 seconds, each time as a whole new
    file, and finished when it has ``images_per_shard`` images or 64 MiB. Leaving it, by an error as well,
    finishes the shard and sees to the index.

    Args:
        folder: folder of the mask set, from ``open_mask_set``.
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
        self._index, self._count, self._share = index, count, f"{index}/{count}"
        self._images_per_shard = images_per_shard
        self._lock = WriterLock(self._folder, index, count)
        self._finished: FinishedImages | None = None
        self._shard: tuple[str, ShardBuilder] | None = (
            None  # the one at hand, and its name when it is finished
        )
        self._unsaved = 0
        self._last_flush = time.monotonic()
        self._flush_duration = 0.0
        self._is_marked_incomplete = False
        self._failed = False

    def __enter__(self) -> MaskWriter:
        manifest = read_manifest(self._folder)
        self._fingerprint, self._kind = manifest.fingerprint, manifest.mask_set.kind
        checked: dict[str, SoundShard] = {}
        try:
            with set_lock(self._folder):
                self._lock.acquire()
                names = take_over_partials(self._folder, self._index, self._count)
            for name in names:
                salvage(self._folder, name, self._fingerprint, self._kind, checked)
            self._finished = FinishedImages(self._folder, self._index, self._count, checked)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except (CacheError, OutputError) as second:
            if error is None:
                raise
            logger.warning("%s", second)

    def unfinished(
        self,
        image_ids: Sequence[str],
        files: Mapping[str, ImageFile],
        labels: Mapping[str, tuple[str, ...] | None],
        **options: bool,
    ) -> list[str]:
        """Images whose masks finished shards didn't hold at the start; as ``FinishedImages.unfinished``."""
        return self._open().unfinished(image_ids, files, labels, **options)

    def write(
        self,
        image_id: str,
        content: Any,
        *,
        image_digest: str,
        seconds: float,
        scale: float = 1.0,
        status: Status | None = None,
    ) -> None:
        """Add an image's record; it takes the place of an earlier one.

        Args:
            image_id: id from ``find_images``.
            content: PseudoMask, or Regions where the set holds regions.
            image_digest: digest of the image file, see ``data.images.image_digest``.
            seconds: time the record took to make.
            scale: side of the image that CLIP and CRF saw, by that of the file's.
            status: ``file_status`` of the image file before it was read; with it the next run needn't read it.

        Raises:
            CacheRecordError: the id can't be stored, or mask or labels have a class that the mask set doesn't.
            OutputError: see the class.
        """
        finished = self._open()
        if self._shard is None:
            with self._failing_for_good(), writing(self._folder):
                name = next_shard(self._folder, self._index, self._count)
            self._shard = name, ShardBuilder(self._fingerprint)
            self._last_flush = time.monotonic()
        name, builder = self._shard
        parts = write_record(builder.images, image_id, content, image_digest, seconds, scale, self._kind)
        builder.is_labelled[image_id] = bool(parts.labels)
        if status is not None:
            finished.note(image_id, (name, status, parts.labels, "cams" in parts.arrays))
        self._unsaved += 1
        if len(builder.images) >= self._images_per_shard or builder.size >= BYTES_PER_SHARD:
            self._finish_shard()
            return
        rested = time.monotonic() - self._last_flush
        is_time = self._unsaved >= IMAGES_PER_FLUSH or rested >= SECONDS_PER_FLUSH
        if is_time and rested >= FLUSH_REST * self._flush_duration:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered to the partial file, where a kill can't reach it."""
        if self._shard is None or not self._unsaved:
            return
        name, builder = self._shard
        start = time.monotonic()
        with self._failing_for_good():
            self._mark_incomplete()
            write_file(self._folder / (name + PARTIAL_SUFFIX), builder.to_bytes(), durable=False)
        self._unsaved = 0
        self._last_flush = time.monotonic()
        self._flush_duration = self._last_flush - start

    def finish(self, expected_ids: Collection[str]) -> Completion:
        """Finish the shard at hand, note in the manifest how complete the set is, and for the next run what is known.

        Args:
            expected_ids: all images of this share, those that failed or were there before as well. The set is
                complete when each of the shares has finished with none of its images missing.
        """
        finished = self._open()
        self._finish_shard()
        # outside the lock, which others wait for: what they finish meanwhile is theirs to count
        shard_of = finished.list_again().shard_of
        missing = sum(image_id not in shard_of for image_id in expected_ids)
        images, own = len(shard_of), ShareCompletion(expected=len(expected_ids), missing=missing)
        with set_lock(self._folder):
            completion = update_completion(
                self._folder,
                lambda before: Completion.of(images, {**before.shares, self._share: own}, self._count),
            )
        finished.save()
        finished.tidy()
        return completion

    def close(self) -> None:
        """Finish the shard at hand, see to the index, let go of the lock; nothing more the second time.

        The index is rewritten whole, so of several writers only the last one to close does it.
        """
        if self._finished is None:
            return
        try:
            if not self._failed:
                self._finish_shard()
                self._finished.save()
                listing = self._finished.listing
                if (
                    self._finished.has_checked
                    or not (self._folder / INDEX).exists()
                    or listing.stamps.keys() != listing.noted
                ):
                    with set_lock(self._folder):
                        # let go within the set's lock: of two that close together, the second finds itself alone
                        self._lock.release()
                        if not held_locks(self._folder):
                            images = len(
                                write_index(self._folder, self._fingerprint, self._kind, {}).shard_of
                            )
                            update_completion(
                                self._folder, lambda before: before.model_copy(update={"images": images})
                            )
        finally:
            self._finished = None
            if self._shard is not None:
                self._shard[1].close()
                self._shard = None
            self._lock.release()

    def _open(self) -> FinishedImages:
        if self._finished is None:
            raise CacheError(f"{self._folder}: the writer isn't open; use it in a with statement")
        if self._failed:
            raise OutputError(f"{self._folder}: an earlier write failed; run the same command again")
        return self._finished

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        name, builder = self._shard
        if len(builder.images):
            with self._failing_for_good():
                self._mark_incomplete()
                finished, sound = self._open(), finish_shard(self._folder, name, builder)
                finished.note_sound(name, sound)
                finished.save()
        builder.close()
        self._shard, self._unsaved = None, 0

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

        def without_own_share(before: Completion) -> Completion:
            others = {share: item for share, item in before.shares.items() if share != self._share}
            return Completion.of(before.images, others, self._count)

        if not self._is_marked_incomplete:
            with set_lock(self._folder):
                update_completion(self._folder, without_own_share)
            self._is_marked_incomplete = True


def finish_shard(folder: Path, name: str, builder: ShardBuilder) -> SoundShard:
    """Write a shard's last state, wait until it is on the disk, and give it its final name."""
    partial, finished, content = folder / (name + PARTIAL_SUFFIX), folder / name, builder.to_bytes()
    write_file(partial, content)
    with writing(folder):
        partial.replace(finished)
        sync_folder(folder)
        return SoundShard(
            stamp=stamp(finished),
            sha256=hashlib.sha256(content).hexdigest(),
            images=list(builder.is_labelled),
            unlabelled=[image_id for image_id, labelled in builder.is_labelled.items() if not labelled],
        )


def take_over_partials(folder: Path, index: int, count: int) -> list[str]:
    """Give what dead writers left new names, of share ``index`` of ``count``, whose lock protects it then.

    The caller holds the set's lock and that of the share.
    """
    taken = []
    held = {path.name for path in held_locks(folder)} - {lock_name(index, count)}
    with writing(folder):
        for shard in named_shards(folder):
            if lock_name(shard.index, shard.count) in held:
                continue
            if is_left_over(shard.path):
                shard.path.unlink()
            elif shard.suffix == PARTIAL_SUFFIX:
                taken.append(next_shard(folder, index, count))
                shard.path.replace(folder / (taken[-1] + PARTIAL_SUFFIX))
    return taken


def salvage(
    folder: Path,
    name: str,
    fingerprint: str,
    kind: RecordKind[Any],
    checked: dict[str, SoundShard],
) -> int:
    """Finish a shard that its writer didn't, without the records that are damaged.

    A partial file that can't be opened is kept, as ``*.damaged``; one without a sound record is removed.

    Args:
        folder, fingerprint, kind: those of the mask set.
        name: name of the shard, from ``take_over_partials``.
        checked: gets the note of the finished shard, by its name.

    Returns:
        Number of records that were sound. After an OutputError the partial file is still there.
    """
    partial, builder = folder / (name + PARTIAL_SUFFIX), ShardBuilder(fingerprint)
    try:
        inspection = inspect(partial, fingerprint, kind, "records")
        with open_shard(partial, fingerprint) as file:
            for image_id, info in inspection.infos.items():
                builder.copy(file[IMAGES], image_id, bool(info.labels))
        if inspection.damaged:
            damaged = len(inspection.damaged)
            logger.warning("%d records of an interrupted run are damaged, they are done again", damaged)
        if inspection.infos:
            checked[name] = finish_shard(folder, name, builder)
            count = len(inspection.infos)
            logger.info("%d images of an interrupted run were salvaged into %s", count, name)
        else:
            with writing(folder):
                partial.unlink()
        return len(inspection.infos)
    except UnreadableShardError as error:
        if not error.is_damaged:
            logger.warning("what an interrupted run left can't be used now, and is kept: %s", error)
            return 0
        with writing(folder):
            kept = partial.replace(folder / (name + DAMAGED_SUFFIX))
        logger.warning("%s; what an interrupted run left is kept as %s", error, kept.name)
        return 0
    finally:
        builder.close()
