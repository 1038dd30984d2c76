"""What ``wsss cache`` does with mask sets: look at them, check, merge, and compact them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache.index import Stamp, list_records, write_index
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
from wsss_pipeline.cache.mask_cache import MaskCache
from wsss_pipeline.cache.records import check_records, image_ids, read_texts
from wsss_pipeline.cache.shards import (
    DAMAGED_SUFFIX,
    IMAGES,
    PARTIAL_SUFFIX,
    ShardBuilder,
    is_left_over,
    next_shard,
    open_shard,
    shard_files,
)
from wsss_pipeline.cache.writer import (
    BYTES_PER_SHARD,
    IMAGES_PER_SHARD,
    finish_shard,
    salvage,
    take_over_partials,
)
from wsss_pipeline.errors import CacheError, CacheFormatError, CacheRecordError
from wsss_pipeline.runtime.output import write_file, writing
from wsss_pipeline.runtime.progress import Progress

SMALL_SHARD = 100  # images; several smaller ones, as interrupted runs leave them, become one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskSetStatus:
    """What there is to know of a mask set without checking it.

    Attributes:
        path: its folder.
        manifest: fingerprint, what determines the masks, classes, completion, time of creation.
        images: number of images in finished shards.
        images_without_labels: those of them that no class was given for; background throughout.
        shards: number of finished shards.
        bytes: size of all finished shards.
        superseded: records that a later one of the same image replaces; gc removes them.
        partial: names of files that are being written, or were when their writer died.
        damaged: names of files that couldn't be opened and were set aside.
        unreadable: name to reason for finished shards that can't be opened.
        complete: True where the last run over each share came to its end, no image was missing, and all shards
            can be opened.
    """

    path: Path
    manifest: Manifest
    images: int
    images_without_labels: int
    shards: int
    bytes: int
    superseded: int
    partial: tuple[str, ...]
    damaged: tuple[str, ...]
    unreadable: Mapping[str, str]
    complete: bool

    @property
    def bytes_per_image(self) -> float:
        """Size of a record on the average; 0 where there is none."""
        return self.bytes / self.images if self.images else 0.0


def status(mask_set: Path) -> MaskSetStatus:
    """What a mask set holds.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    finished = shard_files(mask_set)
    without_labels = 0
    with MaskCache(mask_set) as cache:
        for image_id in sorted(cache, key=cache.shard_of.__getitem__):
            with suppress(CacheRecordError):
                without_labels += not cache.labels(image_id)
    return MaskSetStatus(
        path=mask_set,
        manifest=cache.manifest,
        images=len(cache),
        images_without_labels=without_labels,
        shards=len(finished),
        bytes=sum(path.stat().st_size for path in finished),
        superseded=cache.superseded,
        partial=tuple(path.name for path in shard_files(mask_set, PARTIAL_SUFFIX)),
        damaged=tuple(path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)),
        unreadable=cache.unreadable,
        complete=cache.manifest.completion.complete and not cache.unreadable,
    )


@dataclass
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        sound: number of images whose record is sound.
        damaged: image id to reason.
        damaged_superseded: number of damaged records that a later one replaces, so that nobody misses them.
        unreadable: name to reason for shards that can't be opened.
    """

    sound: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    damaged_superseded: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every image that was ever finished can be read."""
        return not self.damaged and not self.unreadable


def verify(mask_set: Path) -> VerifyReport:
    """Read and recompute every record of a mask set, and show how far it is.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    fingerprint = read_manifest(mask_set).fingerprint
    listing = list_records(mask_set, fingerprint)
    report = VerifyReport(unreadable={shard: str(error) for shard, error in listing.unreadable.items()})
    with Progress(len(listing.stamps), "shards") as progress:
        for shard in progress.over(listing.stamps):
            try:
                with open_shard(mask_set / shard, fingerprint) as file:
                    sound, damaged = check_records(file[IMAGES])
            except CacheFormatError as error:
                report.unreadable[shard] = str(error)
                continue
            report.sound += sum(listing.shard_of.get(image_id) == shard for image_id in sound)
            lost = {i: reason for i, reason in damaged.items() if listing.shard_of.get(i) == shard}
            report.damaged |= lost
            report.damaged_superseded += len(damaged) - len(lost)
    return report


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
            with suppress(CacheFormatError), open_shard(path, expected) as file:
                for image_id in image_ids(file[IMAGES]):
                    known.pop(image_id, None)
                    with suppress(CacheRecordError):
                        known[image_id] = read_texts(file[IMAGES], image_id, "record_digest")
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
            with open_shard(path, fingerprint) as file:
                digests = {i: read_texts(file[IMAGES], i, "record_digest") for i in image_ids(file[IMAGES])}
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
        write_file(report.path / next_shard(report.path, 0, 1), content)
        known |= digests
        report.copied += 1


@dataclass
class GcReport:
    """What ``gc`` did.

    Attributes:
        images: number of images that the mask set holds now.
        superseded: records dropped because a later one of the same image is there.
        damaged: images whose only record was damaged; generate-masks makes them anew.
        salvaged: images taken over from interrupted runs.
        removed: names of files that are gone.
        set_aside: names of shards that couldn't be opened, now ``*.damaged``; the next gc removes them.
        bytes_freed: number of bytes by which the folder shrank.
    """

    images: int = 0
    superseded: int = 0
    damaged: list[str] = field(default_factory=list)
    salvaged: int = 0
    removed: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    bytes_freed: int = 0


def gc(mask_set: Path) -> GcReport:
    """Rewrite shards with superseded or damaged records, salvage and remove what interrupted runs left.

    A kill at any moment loses nothing: a new shard is finished before those that it replaces are removed.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
        CacheLockedError: a generate-masks is writing there.
        OutputError: disk full, read-only, ...
    """
    fingerprint = read_manifest(mask_set).fingerprint
    report = GcReport()
    checked: dict[str, Stamp] = {}
    with without_writers(mask_set):
        size = _folder_size(mask_set)
        # what was set aside before, and what a killed process was writing
        left_over = [path for path in mask_set.iterdir() if is_left_over(path)]
        _remove([*shard_files(mask_set, DAMAGED_SUFFIX), *left_over], report)
        for name in take_over_partials(mask_set, 0, 1):
            report.salvaged += salvage(mask_set, name, fingerprint, checked)
        listing = list_records(mask_set, fingerprint)
        for shard, error in listing.unreadable.items():
            cause = error.__cause__
            # no cause: of another mask set; a number: the operating system refuses, no damage
            if cause is None or (isinstance(cause, OSError) and cause.errno is not None):
                logger.warning("left as it is: %s", error)
                continue
            with writing(mask_set):
                (mask_set / shard).replace(mask_set / (shard + DAMAGED_SUFFIX))
        rewrite: dict[Path, list[str]] = {}  # shards, each with the images in it that are sound and current
        has_waste = False
        for shard, stamp in listing.stamps.items():
            with open_shard(mask_set / shard, fingerprint) as file:
                sound, damaged = check_records(file[IMAGES])
            current, lost = (
                [image_id for image_id in part if listing.shard_of.get(image_id) == shard]
                for part in (sound, damaged)
            )
            waste = len(sound) - len(current) + len(damaged)
            report.damaged += lost
            report.superseded += waste - len(lost)
            if not damaged:
                checked[shard] = stamp
            if waste or len(current) < SMALL_SHARD:
                rewrite[mask_set / shard] = current
                has_waste |= waste > 0
        if has_waste or len(rewrite) > 1:  # a small shard alone stays
            for content, copied in _packed(rewrite, fingerprint):
                if content:
                    name = next_shard(mask_set, 0, 1)
                    checked[name] = finish_shard(mask_set, name, content)
                _remove(copied, report)
        report.set_aside = [path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)]
        report.images = len(write_index(mask_set, fingerprint, checked).shard_of)
        changes = {"images": report.images} | (
            {"complete": False} if report.damaged or report.set_aside else {}
        )
        update_completion(mask_set, lambda before: before.model_copy(update=changes))
        report.bytes_freed = size - _folder_size(mask_set)
    return report


def _packed(rewrite: Mapping[Path, list[str]], fingerprint: str) -> Iterator[tuple[bytes, list[Path]]]:
    """New shards with these images of these shards, and the old ones that nobody needs once each is written."""
    builder, copied = ShardBuilder(fingerprint), list[Path]()
    try:
        for path, ids in rewrite.items():
            with open_shard(path, fingerprint) as file:
                for image_id in ids:
                    builder.copy(file[IMAGES], image_id)
                    if len(builder.images) >= IMAGES_PER_SHARD or builder.size >= BYTES_PER_SHARD:
                        yield builder.to_bytes(), copied
                        builder.close()
                        builder, copied = ShardBuilder(fingerprint), []
            copied.append(path)
        yield builder.to_bytes() if len(builder.images) else b"", copied
    finally:
        builder.close()


def _remove(paths: list[Path], report: GcReport) -> None:
    for path in paths:
        with writing(path.parent):
            path.unlink()
        report.removed.append(path.name)


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
