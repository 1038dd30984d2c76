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
    is_mask_set,
    only_mask_set,
    open_mask_set,
    read_manifest,
    update_completion,
)
from wsss_pipeline.cache.records import image_ids, read_texts
from wsss_pipeline.cache.shards import PARTIAL_SUFFIX, next_shard, open_shard, shard_files
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
    expected = manifests[0].fingerprint
    there = [destination] if is_mask_set(destination) else []
    for folder, manifest in zip([*folders, *there], [*manifests, *map(read_manifest, there)], strict=True):
        if manifest.fingerprint != expected:
            raise CacheError(
                f"{folder} and {folders[0]} were made with other settings (fingerprints "
                f"{manifest.fingerprint[:12]} and {expected[:12]}); merge only what the same command made"
            )
    target = destination if there else open_mask_set(destination, manifests[0].mask_set)
    report = MergeReport(target)
    with without_writers(target):
        known: dict[str, tuple[str, ...]] = {}  # digests of the records that count
        for path in shard_files(target):
            with suppress(CacheFormatError), open_shard(path, expected) as images:
                for image_id in image_ids(images):
                    known.pop(image_id, None)
                    with suppress(CacheRecordError):
                        known[image_id] = read_texts(images, image_id, "record_digest")
        for folder in folders:
            if folder.resolve() != target.resolve():
                _copy_shards(folder, expected, known, report)
        report.images = len(write_index(target, expected, {}).shard_of)

        def merged(before: Completion) -> Completion:
            completions = (before, *(manifest.completion for manifest in manifests))
            shares = [share for completion in completions for share in completion.shares.items()]
            count = int(shares[-1][0].rpartition("/")[2]) if shares else 1
            return Completion.of(report.images, dict(shares), count)

        update_completion(target, merged)
    return report


def _copy_shards(
    source: Path, fingerprint: str, known: dict[str, tuple[str, ...]], report: MergeReport
) -> None:
    if shard_files(source, PARTIAL_SUFFIX):
        logger.warning(
            "%s holds unfinished work, which isn't merged; run generate-masks there to its end first", source
        )
    for path in shard_files(source):
        try:
            with open_shard(path, fingerprint) as images:
                digests = {
                    image_id: read_texts(images, image_id, "record_digest") for image_id in image_ids(images)
                }
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
        write_file(report.path / str(next_shard(report.path, 0, 1)), content)
        known |= digests
        report.copied += 1
