"""Looking at mask sets: what they hold, whether it is sound."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache.index import list_records
from wsss_pipeline.cache.manifest import Manifest, read_manifest
from wsss_pipeline.cache.mask_cache import MaskCache
from wsss_pipeline.cache.records import check_records
from wsss_pipeline.cache.shards import DAMAGED_SUFFIX, PARTIAL_SUFFIX, open_shard, shard_files
from wsss_pipeline.errors import CacheFormatError, CacheRecordError
from wsss_pipeline.runtime.progress import Progress


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

    @property
    def complete(self) -> bool:
        """Whether the last run over each share came to its end and no image was missing."""
        return self.manifest.completion.complete and not self.unreadable

    @property
    def bytes_per_image(self) -> float:
        """Size of a record on the average; 0 where there is none."""
        return self.bytes / self.images if self.images else 0.0


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
    )


def verify(mask_set: Path) -> VerifyReport:
    """Read and recompute every record of a mask set, and show how far it is.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    fingerprint = read_manifest(mask_set).fingerprint
    listing = list_records(mask_set, fingerprint)
    report = VerifyReport(unreadable=dict(listing.unreadable))
    paths = [path for path in shard_files(mask_set) if path.name not in listing.unreadable]
    with Progress(len(paths), "shards") as progress:
        for path in progress.over(paths):
            try:
                with open_shard(path, fingerprint) as images:
                    sound, damaged = check_records(images)
            except CacheFormatError as error:
                report.unreadable[path.name] = str(error)
                continue
            report.sound += sum(listing.shard_of.get(image_id) == path.name for image_id in sound)
            for image_id, reason in damaged.items():
                if listing.shard_of.get(image_id) == path.name:
                    report.damaged[image_id] = reason
                else:
                    report.damaged_superseded += 1
    return report
