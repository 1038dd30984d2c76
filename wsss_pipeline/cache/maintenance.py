"""What ``wsss cache`` does with mask sets: look at them, check, merge, and compact them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsss_pipeline.cache.index import SoundShard, checked_shard, list_records, note_checked, write_index
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.locks import set_lock, without_writers
from wsss_pipeline.cache.manifest import (
    Completion,
    Manifest,
    is_mask_set,
    only_mask_set,
    open_mask_set,
    read_manifest,
    update_completion,
)
from wsss_pipeline.cache.records import RecordKind
from wsss_pipeline.cache.shards import (
    DAMAGED_SUFFIX,
    IMAGES,
    MAX_SHARD_BYTES,
    PARTIAL_SUFFIX,
    ShardBuilder,
    UnreadableShardError,
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
from wsss_pipeline.errors import CacheError, CacheFormatError, OutputError
from wsss_pipeline.files import open_plain
from wsss_pipeline.runtime.output import check_apart, one_line, replacing, writing
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
    manifest = read_manifest(mask_set)
    kind = manifest.mask_set.kind
    listing = list_records(mask_set, manifest.fingerprint, kind)
    without_labels = 0
    for shard in listing.stamps:
        if shard in listing.sound:
            unlabelled = listing.sound[shard].unlabelled
        else:
            unlabelled = []
            with suppress(CacheFormatError):
                found = inspect(mask_set / shard, manifest.fingerprint, kind, "infos").infos
                unlabelled = [image_id for image_id, info in found.items() if not info.labels]
        without_labels += sum(listing.shard_of.get(image_id) == shard for image_id in unlabelled)
    size = sum(size for size, *_ in listing.stamps.values())
    for shard in listing.unreadable:
        with suppress(OSError):
            size += (mask_set / shard).stat().st_size
    return MaskSetStatus(
        path=mask_set,
        manifest=manifest,
        images=len(listing.shard_of),
        images_without_labels=without_labels,
        shards=len(listing.stamps) + len(listing.unreadable),
        bytes=size,
        superseded=listing.superseded,
        partial=tuple(path.name for path in shard_files(mask_set, PARTIAL_SUFFIX)),
        damaged=tuple(path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)),
        unreadable={shard: one_line(error) for shard, error in listing.unreadable.items()},
        complete=manifest.completion.complete and not listing.unreadable,
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
    """Read and recompute every record of a mask set, and show how far it is. A gc may run meanwhile.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    manifest = read_manifest(mask_set)
    fingerprint, kind = manifest.fingerprint, manifest.mask_set.kind
    listing = list_records(mask_set, fingerprint, kind)
    report = VerifyReport(unreadable={shard: str(error) for shard, error in listing.unreadable.items()})
    waiting, sound = list(listing.stamps), set[str]()
    checked: dict[str, SoundShard] = {}
    with Progress(len(waiting), "shards") as progress:
        while waiting:
            shard = waiting.pop(0)
            progress.advance()
            try:
                inspection = inspect(mask_set / shard, fingerprint, kind, "records")
            except UnreadableShardError as error:
                if (mask_set / shard).exists():
                    report.unreadable[shard] = str(error)
                else:  # by gc; what it held lies in a later one
                    before, listing = listing, list_records(mask_set, fingerprint, kind)
                    waiting = [
                        name for name in listing.stamps if name in waiting or name not in before.stamps
                    ]
                    progress.total = progress.done + len(waiting)
                continue
            note = checked_shard(listing.stamps[shard], inspection)
            if note is not None and shard not in listing.sound:
                checked[shard] = note
            sound |= {i for i in inspection.infos if listing.shard_of.get(i) == shard}
            lost = {
                i: why for i, why in inspection.damaged.items() if listing.shard_of.get(i, shard) == shard
            }
            report.damaged |= lost
            report.damaged_superseded += len(inspection.damaged) - len(lost)
    report.sound = len(sound)
    if checked:
        with suppress(OutputError, CacheError), set_lock(mask_set):  # spares the next reader the same
            note_checked(mask_set, 0, 1, checked)
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
        ConfigError: the destination lies in a source, or holds one.
        CacheLockedError: a generate-masks or relabel is writing into the destination.
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
    place = destination if there else destination / manifests[0].mask_set.folder_name
    for folder in folders:
        if folder.resolve() != place.resolve():
            check_apart(place, "--into", {"the mask set": folder})
    target = destination if there else open_mask_set(destination, manifests[0].mask_set)
    report = MergeReport(target)
    with without_writers(target):
        kind = manifests[0].mask_set.kind
        known: dict[str, str] = {}  # digests of the records that count
        for path in shard_files(target):
            with suppress(CacheFormatError):
                found = inspect(path, expected, kind, "digests")
                for image_id in found.ids:
                    known.pop(image_id, None)
                known |= found.digests
        for folder in folders:
            if folder.resolve() != target.resolve():
                _copy_shards(folder, expected, kind, known, report)
        report.images = len(write_index(target, expected, kind, {}).shard_of)

        def merged(before: Completion) -> Completion:
            completions = (before, *(manifest.completion for manifest in manifests))
            shares = [share for completion in completions for share in completion.shares.items()]
            count = int(shares[-1][0].rpartition("/")[2]) if shares else 1
            return Completion.of(report.images, dict(shares), count)

        update_completion(target, merged)
    return report


def _copy_shards(
    source: Path, fingerprint: str, kind: RecordKind[Any], known: dict[str, str], report: MergeReport
) -> None:
    if shard_files(source, PARTIAL_SUFFIX):
        logger.warning(
            "%s holds unfinished work, which isn't merged; run the command that fills it to its end first",
            source,
        )
    waiting, seen = shard_files(source), set[Path]()
    while waiting:
        path = waiting.pop(0)
        seen.add(path)
        try:
            found = inspect(path, fingerprint, kind, "digests")
            if not found.damaged and found.digests.items() <= known.items():
                report.already_there += 1
                continue
            with open_plain(path, MAX_SHARD_BYTES) as file:
                name = next_shard(report.path, 0, 1)
                with replacing(report.path / name) as copy:
                    shutil.copyfileobj(file, copy)
        except (OSError, CacheFormatError) as error:
            if not os.path.lexists(path):  # a gc runs in the source
                waiting = [other for other in shard_files(source) if other not in seen]
                continue
            if isinstance(error, OSError):
                raise CacheError(
                    f"{path} can't be read: {error.strerror}; mend that and merge again"
                ) from error
            logger.warning("left out: %s", error)
            report.unreadable += 1
            continue
        known |= found.digests
        report.copied += 1


@dataclass
class GcReport:
    """What ``gc`` did.

    Attributes:
        images: number of images that the mask set holds now.
        superseded: records dropped because a later one of the same image is there.
        damaged: images whose only record was damaged; the command that made them makes them anew.
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
        CacheLockedError: a generate-masks or relabel is writing there.
        OutputError: disk full, read-only, ...
    """
    manifest = read_manifest(mask_set)
    fingerprint, kind = manifest.fingerprint, manifest.mask_set.kind
    report = GcReport()
    checked: dict[str, SoundShard] = {}
    with without_writers(mask_set):
        size = _folder_size(mask_set)
        # what was set aside before, and what a killed process was writing
        left_over = [path for path in mask_set.iterdir() if is_left_over(path)]
        _remove([*shard_files(mask_set, DAMAGED_SUFFIX), *left_over], report)
        for name in take_over_partials(mask_set, 0, 1):
            report.salvaged += salvage(mask_set, name, fingerprint, kind, checked)
        listing = list_records(mask_set, fingerprint, kind, checked)
        for shard, error in listing.unreadable.items():
            _set_aside(mask_set / shard, error)
        rewrite: dict[Path, dict[str, bool]] = {}  # images in it that are sound and current; has it a label?
        has_waste = False
        for shard, stamp in listing.stamps.items():
            try:
                inspection = inspect(mask_set / shard, fingerprint, kind, "records")
            except UnreadableShardError as error:
                _set_aside(mask_set / shard, error)
                continue
            current = {
                image_id: bool(info.labels)
                for image_id, info in inspection.infos.items()
                if listing.shard_of.get(image_id) == shard
            }
            lost = [i for i in inspection.damaged if listing.shard_of.get(i, shard) == shard]
            waste = len(inspection.infos) - len(current) + len(inspection.damaged)
            report.damaged += lost
            report.superseded += waste - len(lost)
            if (sound := checked_shard(stamp, inspection)) is not None:
                checked[shard] = sound
            if waste or len(current) < SMALL_SHARD:
                rewrite[mask_set / shard] = current
                has_waste |= waste > 0
        if has_waste or len(rewrite) > 1:  # a small shard alone stays
            for builder, copied in _packed(rewrite, fingerprint):
                if builder.is_labelled:
                    name = next_shard(mask_set, 0, 1)
                    checked[name] = finish_shard(mask_set, name, builder)
                _remove(copied, report)
        report.set_aside = [path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)]
        report.images = len(write_index(mask_set, fingerprint, kind, checked).shard_of)
        changes = {"images": report.images} | (
            {"complete": False} if report.damaged or report.set_aside else {}
        )
        update_completion(mask_set, lambda before: before.model_copy(update=changes))
        report.bytes_freed = size - _folder_size(mask_set)
    return report


def _set_aside(shard: Path, error: UnreadableShardError) -> None:
    """Rename a damaged shard, so that nobody reads it; one that the system refuses, or another's, stays as it is."""
    if not error.is_damaged:
        logger.warning("left as it is: %s", error)
        return
    with writing(shard.parent):
        shard.replace(shard.with_name(shard.name + DAMAGED_SUFFIX))


def _packed(
    rewrite: Mapping[Path, Mapping[str, bool]], fingerprint: str
) -> Iterator[tuple[ShardBuilder, list[Path]]]:
    """New shards with these images of these shards, and the old ones that nobody needs once each is written."""
    builder, copied = ShardBuilder(fingerprint), list[Path]()
    try:
        for path, images in rewrite.items():
            with open_shard(path, fingerprint) as file:
                for image_id, is_labelled in images.items():
                    builder.copy(file[IMAGES], image_id, is_labelled)
                    if len(builder.images) >= IMAGES_PER_SHARD or builder.size >= BYTES_PER_SHARD:
                        yield builder, copied
                        builder.close()
                        builder, copied = ShardBuilder(fingerprint), []
            copied.append(path)
        yield builder, copied
    finally:
        builder.close()


def _remove(paths: list[Path], report: GcReport) -> None:
    for path in paths:
        with writing(path.parent):
            path.unlink()
        report.removed.append(path.name)


def _folder_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir() if path.is_file())
