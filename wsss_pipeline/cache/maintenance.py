"""Looking at mask sets: which there are, what they hold, whether it is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache.index import list_records
from wsss_pipeline.cache.manifest import Manifest, mask_sets_below, read_manifest
from wsss_pipeline.cache.mask_cache import MaskCache
from wsss_pipeline.cache.records import check_records
from wsss_pipeline.cache.shard_names import DAMAGED_SUFFIX, PARTIAL_SUFFIX, shard_files
from wsss_pipeline.cache.shards import open_shard
from wsss_pipeline.errors import CacheFormatError


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


def list_mask_sets(cache_dir: Path) -> list[Path]:
    """The mask sets right below ``cache_dir``, by name; ``cache_dir`` itself where it is one.

    Raises:
        CacheFormatError: ``cache_dir`` isn't a folder.
    """
    return mask_sets_below(cache_dir)


def status(mask_set: Path) -> MaskSetStatus:
    """What a mask set holds.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    manifest = read_manifest(mask_set)
    finished = shard_files(mask_set)
    listing = list_records(mask_set, manifest.fingerprint)
    with MaskCache(mask_set) as cache:
        without_labels = cache.count_without_labels()
    return MaskSetStatus(
        path=mask_set,
        manifest=manifest,
        images=len(listing.places),
        images_without_labels=without_labels,
        shards=len(finished),
        bytes=sum(path.stat().st_size for path in finished),
        superseded=sum(listing.superseded.values()),
        partial=tuple(path.name for path in shard_files(mask_set, PARTIAL_SUFFIX)),
        damaged=tuple(path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)),
        unreadable=listing.unreadable,
    )


def verify(mask_set: Path, progress: Callable[[Sequence[str]], Iterable[str]] = iter) -> VerifyReport:
    """Read and recompute every record of a mask set.

    Args:
        mask_set: its folder.
        progress: gets the names of the shards and yields them while it shows how far the check is.

    Raises:
        CacheFormatError: ``mask_set`` isn't a mask set of this format version.
    """
    fingerprint = read_manifest(mask_set).fingerprint
    listing = list_records(mask_set, fingerprint)
    report = VerifyReport(unreadable=dict(listing.unreadable))
    names = [path.name for path in shard_files(mask_set) if path.name not in listing.unreadable]
    for name in progress(names):
        try:
            with open_shard(mask_set / name, fingerprint) as images:
                sound, damaged = check_records(images)
        except CacheFormatError as error:
            report.unreadable[name] = str(error)
            continue
        report.sound += sum(listing.places.get(image_id) == name for image_id in sound)
        for image_id, reason in damaged.items():
            if listing.places.get(image_id) == name:
                report.damaged[image_id] = reason
            else:
                report.damaged_superseded += 1
    return report
