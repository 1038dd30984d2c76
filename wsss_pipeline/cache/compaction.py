"""``wsss cache gc``: every image kept once, and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache.index import Stamp, list_records, write_index
from wsss_pipeline.cache.locks import without_writers
from wsss_pipeline.cache.manifest import read_manifest, update_completion
from wsss_pipeline.cache.records import check_records
from wsss_pipeline.cache.shards import DAMAGED_SUFFIX, ShardBuilder, next_shard, open_shard, shard_files
from wsss_pipeline.cache.writer import (
    BYTES_PER_SHARD,
    IMAGES_PER_SHARD,
    finish_shard,
    salvage,
    take_over_partials,
)
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
    with without_writers(mask_set):
        size = _folder_size(mask_set)
        collection = _Collection(mask_set)
        report = collection.report
        # what was set aside before, and what a killed process was writing
        collection.remove([*shard_files(mask_set, DAMAGED_SUFFIX), *mask_set.glob(f"*{TEMPORARY_SUFFIX}")])
        for name in take_over_partials(mask_set, 0, 1):
            report.salvaged += salvage(mask_set, name, collection.fingerprint, collection.checked)
        collection.gather(collection.check())
        report.set_aside = [path.name for path in shard_files(mask_set, DAMAGED_SUFFIX)]
        report.images = len(write_index(mask_set, collection.fingerprint, collection.checked).shard_of)
        is_whole = not report.damaged and not report.set_aside
        changes = {"images": report.images} | ({} if is_whole else {"complete": False})
        update_completion(mask_set, lambda before: before.model_copy(update=changes))
        report.bytes_freed = size - _folder_size(mask_set)
    return report


class _Collection:
    """One run of gc, under the set's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = read_manifest(folder).fingerprint
        self.checked: dict[str, Stamp] = {}
        self.report = GcReport()

    def remove(self, paths: list[Path]) -> None:
        with writing(self.folder):
            for path in paths:
                path.unlink()
                self.report.removed.append(path.name)

    def check(self) -> dict[Path, list[str]]:
        """Set damaged shards aside; those to be rewritten, each with the images in it that are sound and current."""
        listing = list_records(self.folder, self.fingerprint)
        rewrite: dict[Path, list[str]] = {}
        has_waste = False
        for path in shard_files(self.folder):
            try:
                with open_shard(path, self.fingerprint) as images:
                    sound, damaged = check_records(images)
            except CacheFormatError as error:
                if path.name in listing.stamps:
                    raise  # it was listed a moment ago: what the disk says now is no ground to drop anything
                cause = error.__cause__
                # no cause: of another mask set; a number: the operating system refuses, no damage
                if cause is None or (isinstance(cause, OSError) and cause.errno is not None):
                    logger.warning("left as it is: %s", error)
                else:
                    with writing(self.folder):
                        path.replace(path.with_name(path.name + DAMAGED_SUFFIX))
                continue
            if path.name not in listing.stamps:
                continue  # it can be read only now
            current = [image_id for image_id in sound if listing.shard_of.get(image_id) == path.name]
            lost = [image_id for image_id in damaged if listing.shard_of.get(image_id) == path.name]
            others = len(sound) - len(current) + len(damaged)
            self.report.damaged += lost
            self.report.superseded += others - len(lost)
            if not damaged:
                self.checked[path.name] = listing.stamps[path.name]
            if others or len(current) < SMALL_SHARD:
                rewrite[path] = current
                has_waste |= others > 0
        return rewrite if has_waste or len(rewrite) > 1 else {}  # a small shard alone stays

    def gather(self, rewrite: dict[Path, list[str]]) -> None:
        """Copy these images of these shards into new ones, and remove the old ones."""
        copied: list[Path] = []
        builder = ShardBuilder(self.fingerprint)
        try:
            for path, ids in rewrite.items():
                with open_shard(path, self.fingerprint) as images:
                    for image_id in ids:
                        builder.copy(images, image_id)
                        if len(builder.images) >= IMAGES_PER_SHARD or builder.size >= BYTES_PER_SHARD:
                            self.finish(builder, copied)
                            builder, copied = ShardBuilder(self.fingerprint), []
                copied.append(path)
            self.finish(builder, copied)
        finally:
            builder.close()

    def finish(self, builder: ShardBuilder, copied: list[Path]) -> None:
        if len(builder.images):
            name = next_shard(self.folder, 0, 1)
            self.checked[str(name)] = finish_shard(self.folder, name, builder.to_bytes())
        builder.close()
        self.remove(copied)


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
