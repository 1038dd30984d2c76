"""``wsss cache merge``: mask sets of several machines into one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wsss_pipeline.cache.index import write_index
from wsss_pipeline.cache.locks import without_writers
from wsss_pipeline.cache.manifest import (
    Completion,
    Manifest,
    is_mask_set,
    only_mask_set,
    open_mask_set,
    read_manifest,
    update_completion,
)
from wsss_pipeline.cache.records import image_ids, stored_digest
from wsss_pipeline.cache.shards import PARTIAL_SUFFIX, ShardName, next_sequence, open_shard, shard_files
from wsss_pipeline.errors import CacheError, CacheFormatError, CacheRecordError
from wsss_pipeline.runtime.output import write_file

logger = logging.getLogger(__name__)


@dataclass
class MergeReport:
    """What ``merge`` did.

    Attributes:
        path: the mask set that holds everything now.
        images: number of its images.
        copied: number of shards copied into it.
        already_there: number of shards passed over, since all of their records are there.
        unreadable: number of shards of the sources that can't be opened.
    """

    path: Path
    images: int = 0
    copied: int = 0
    already_there: int = 0
    unreadable: int = 0


def merge(sources: Sequence[Path], destination: Path) -> MergeReport:
    """Copy the finished shards of ``sources`` into one mask set; where several have an image, the last wins.

    Args:
        sources: mask sets of equal fingerprint, or cache folders that hold only one.
        destination: a mask set of the same fingerprint, or a cache folder, made where it isn't there.

    Raises:
        CacheError: the fingerprints differ, or a source isn't a mask set.
        CacheLockedError: a generate-masks is writing into the destination.
        OutputError: disk full, read-only, ...
    """
    if not sources:
        raise CacheError("nothing to merge; name the mask sets, for example cache-a/voc12-0123456789ab")
    folders = [only_mask_set(source) for source in sources]
    manifests = [read_manifest(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        _check_equal(folder, manifest, folders[0], first)
    if is_mask_set(destination):
        target = destination
        _check_equal(target, read_manifest(target), folders[0], first)
    else:
        target = open_mask_set(destination, first.mask_set)
    report = MergeReport(target)
    with without_writers(target):
        for folder in folders:
            if folder.resolve() != target.resolve():
                _copy_shards(folder, target, first.fingerprint, report)
        report.images = len(write_index(target, first.fingerprint, {}).shard_of)
        completions = [manifest.completion for manifest in (read_manifest(target), *manifests)]
        update_completion(target, _merged_completion(completions, report.images))
    return report


def _check_equal(folder: Path, manifest: Manifest, other: Path, expected: Manifest) -> None:
    if manifest.fingerprint != expected.fingerprint:
        raise CacheError(
            f"{folder} and {other} were made with other settings (fingerprints {manifest.fingerprint[:12]} "
            f"and {expected.fingerprint[:12]}); merge only what the same command made"
        )


def _copy_shards(source: Path, target: Path, fingerprint: str, report: MergeReport) -> None:
    if shard_files(source, PARTIAL_SUFFIX):
        logger.warning(
            "%s holds unfinished work, which isn't merged; run generate-masks there to its end first", source
        )
    known: dict[str, str] = {}  # digests of the records that count
    for path in shard_files(target):
        with suppress(CacheFormatError), open_shard(path, fingerprint) as images:
            for image_id in image_ids(images):
                known.pop(image_id, None)
                with suppress(CacheRecordError):
                    known[image_id] = stored_digest(images, image_id)
    for path in shard_files(source):
        try:
            with open_shard(path, fingerprint) as images:
                digests = {image_id: stored_digest(images, image_id) for image_id in image_ids(images)}
        except (CacheFormatError, CacheRecordError) as error:
            logger.warning("left out: %s", error)
            report.unreadable += 1
            continue
        if digests.items() <= known.items():
            report.already_there += 1
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CacheError(f"{path} can't be read: {error.strerror}; mend that and merge again") from error
        write_file(target / str(ShardName(next_sequence(target), 0, 1)), content)
        known |= digests
        report.copied += 1


def _merged_completion(completions: Sequence[Completion], images: int) -> Completion:
    """The shares of all, as far as they are of the same partition as the last one's."""
    counts = [share.rpartition("/")[2] for completion in completions for share in completion.shares]
    if not counts:
        return Completion(images)
    shares = {
        share: item
        for completion in completions
        for share, item in completion.shares.items()
        if share.endswith(f"/{counts[-1]}")
    }
    is_complete = len(shares) == int(counts[-1]) and not any(item.missing for item in shares.values())
    return Completion(images, dict(sorted(shares.items())), is_complete)
