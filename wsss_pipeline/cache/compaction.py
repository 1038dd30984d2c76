"""``wsss cache gc``: every image kept once, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache.index import Listing, Stamp, list_records, read_trusted, stamp, write_index
from wsss_pipeline.cache.locks import without_writers
from wsss_pipeline.cache.manifest import Completion, read_manifest, update_completion
from wsss_pipeline.cache.records import check_records
from wsss_pipeline.cache.salvage import finish_shard, salvage, take_over_partials
from wsss_pipeline.cache.shard_names import DAMAGED_SUFFIX, ShardName, next_sequence, parse, shard_files
from wsss_pipeline.cache.shards import ShardBuilder, open_shard
from wsss_pipeline.cache.writer import BYTES_PER_SHARD, IMAGES_PER_SHARD
from wsss_pipeline.errors import CacheFormatError
from wsss_pipeline.runtime.output import TEMPORARY_SUFFIX, writing

SMALL_SHARD = 100  # images; several smaller ones, as interrupted runs leave them, become one

logger = logging.getLogger(__name__)


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
        bytes_freed: by how much the folder shrank.
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
    with without_writers(mask_set):
        before = _folder_size(mask_set)
        collection = _Collection(mask_set, fingerprint)
        collection.remove_leftovers()
        collection.salvage_partials()
        collection.set_unreadable_aside()
        collection.rewrite()
        collection.write_index()
        collection.report.bytes_freed = before - _folder_size(mask_set)
    return collection.report


class _Collection:
    """One run of gc, under the set's lock."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._checked: dict[str, Stamp] = {}
        self.report = GcReport()

    def remove_leftovers(self) -> None:
        """Remove files that were set aside before, and those that a killed process was writing."""
        leftovers = shard_files(self._folder, DAMAGED_SUFFIX)
        leftovers += sorted(self._folder.glob(f"*{TEMPORARY_SUFFIX}"))
        for path in leftovers:
            self._remove(path)

    def salvage_partials(self) -> None:
        """Finish the sound records of interrupted runs."""
        for partial in take_over_partials(self._folder, 0, 1):
            found = salvage(partial, self._fingerprint)
            if found is None:
                parsed = parse(partial.name)
                if parsed is not None and (self._folder / parsed[0].damaged).exists():
                    self.report.set_aside.append(parsed[0].damaged)
                continue
            path, self._checked[path.name] = found
            with open_shard(path, self._fingerprint) as images:
                self.report.salvaged += len(images)

    def set_unreadable_aside(self) -> None:
        """Rename shards that are damaged as a whole; leave those that only we may not read."""
        for path in shard_files(self._folder):
            try:
                with open_shard(path, self._fingerprint):
                    pass
            except CacheFormatError as error:
                cause = error.__cause__
                # no cause: of another mask set; a number: the operating system refuses, no damage
                if cause is None or (isinstance(cause, OSError) and cause.errno is not None):
                    logger.warning("left as it is: %s", error)
                    continue
                parsed = parse(path.name)
                assert parsed is not None, path
                with writing(self._folder):
                    path.replace(self._folder / parsed[0].damaged)
                self.report.set_aside.append(parsed[0].damaged)

    def rewrite(self) -> None:
        """Gather in new shards what is sound and current in shards that hold something else as well."""
        listing = list_records(self._folder, self._fingerprint)
        keep: dict[Path, list[str]] = {}
        small: list[Path] = []
        for path in shard_files(self._folder):
            if path.name in listing.unreadable:
                continue
            kept, others = self._sort_records(path, listing)
            if others:
                keep[path] = kept
            elif len(kept) < SMALL_SHARD:
                small.append(path)
                keep[path] = kept
        if len(small) == len(keep) == 1:
            keep.clear()
        self._gather(keep)

    def write_index(self) -> None:
        """Bring index and manifest in line with the shards."""
        listing = list_records(self._folder, self._fingerprint)
        write_index(self._folder, self._fingerprint, listing, read_trusted(self._folder) | self._checked)
        completion = read_manifest(self._folder).completion
        is_complete = completion.complete and not self.report.damaged and not self.report.set_aside
        self.report.images = len(listing.places)
        update_completion(self._folder, Completion(self.report.images, completion.shares, is_complete))

    def _sort_records(self, path: Path, listing: Listing) -> tuple[list[str], int]:
        """Ids to keep out of a shard, and the number of its other records."""
        checked_at = stamp(path)
        with open_shard(path, self._fingerprint) as images:
            sound, damaged = check_records(images)
        current = [image_id for image_id in sound if listing.places.get(image_id) == path.name]
        lost = [image_id for image_id in damaged if listing.places.get(image_id) == path.name]
        others = len(sound) - len(current) + len(damaged)
        self.report.damaged += lost
        self.report.superseded += others - len(lost)
        if not damaged:
            self._checked[path.name] = checked_at
        return current, others

    def _gather(self, keep: dict[Path, list[str]]) -> None:
        builder = ShardBuilder(self._fingerprint)
        copied: list[Path] = []
        try:
            for path, image_ids in keep.items():
                with open_shard(path, self._fingerprint) as images:
                    for image_id in image_ids:
                        builder.copy(images, image_id)
                        if len(builder) >= IMAGES_PER_SHARD or builder.size >= BYTES_PER_SHARD:
                            builder = self._replace(builder, copied)
                copied.append(path)
            self._replace(builder, copied).close()
        finally:
            builder.close()

    def _replace(self, builder: ShardBuilder, copied: list[Path]) -> ShardBuilder:
        """Finish a new shard, then remove those that are wholly copied; returns an empty builder."""
        if len(builder):
            name = ShardName(next_sequence(self._folder), 0, 1)
            self._checked[name.finished] = finish_shard(self._folder, name, builder.to_bytes())
        builder.close()
        for path in copied:
            self._remove(path)
        copied.clear()
        return ShardBuilder(self._fingerprint)

    def _remove(self, path: Path) -> None:
        with writing(self._folder):
            path.unlink()
        self.report.removed.append(path.name)


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
