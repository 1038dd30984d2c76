"""What writers that died have left behind: taken over, checked, finished."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from wsss_pipeline.cache.index import Stamp, stamp
from wsss_pipeline.cache.locks import is_free
from wsss_pipeline.cache.records import check_records
from wsss_pipeline.cache.shard_names import PARTIAL_SUFFIX, ShardName, next_sequence, parse, shard_files
from wsss_pipeline.cache.shards import ShardBuilder, open_shard
from wsss_pipeline.errors import CacheFormatError
from wsss_pipeline.runtime.output import TEMPORARY_SUFFIX, sync_folder, write_file, writing

logger = logging.getLogger(__name__)


def finish_shard(folder: Path, name: ShardName, content: bytes) -> Stamp:
    """Write a shard's last state, wait until it is on the disk, and give it its final name.

    Raises:
        OutputError: disk full, read-only, ...
    """
    partial, finished = folder / name.partial, folder / name.finished
    write_file(partial, content)
    with writing(folder):
        partial.replace(finished)
        sync_folder(folder)
        return stamp(finished)


def take_over_partials(folder: Path, index: int, count: int) -> list[Path]:
    """Rename what dead writers left to names of share ``index`` of ``count``, whose lock protects it then.

    The caller holds the set's lock and that of the share.

    Returns:
        The partial files under their new names.

    Raises:
        OutputError: the folder can't be written.
    """
    taken = []
    with writing(folder):
        for path in _left_behind(folder, PARTIAL_SUFFIX + TEMPORARY_SUFFIX, index, count):
            path.unlink()
        for path in _left_behind(folder, PARTIAL_SUFFIX, index, count):
            mine = folder / ShardName(next_sequence(folder), index, count).partial
            path.replace(mine)
            taken.append(mine)
    return taken


def salvage(partial: Path, fingerprint: str) -> tuple[Path, Stamp] | None:
    """Make a finished shard of the sound records in a partial one, and remove the partial one.

    Returns:
        The finished shard, with its stamp; None where there is nothing sound in it. A file that can't be
        opened is kept, as ``*.damaged``.

    Raises:
        OutputError: disk full, read-only, ...; the partial file is still there then.
    """
    parsed = parse(partial.name)
    assert parsed is not None, partial
    folder, old = partial.parent, parsed[0]
    builder = ShardBuilder(fingerprint)
    try:
        try:
            with open_shard(partial, fingerprint) as images:
                sound, damaged = check_records(images)
                for image_id in sound:
                    builder.copy(images, image_id)
        except CacheFormatError as error:
            with writing(folder):
                partial.replace(folder / old.damaged)
            logger.warning("%s; what an interrupted run left is kept as %s", error, old.damaged)
            return None
        if damaged:
            logger.warning(
                "%d records that an interrupted run left are damaged, they are done again", len(damaged)
            )
        found = None
        if sound:
            name = ShardName(next_sequence(folder), old.index, old.count)
            found = folder / name.finished, finish_shard(folder, name, builder.to_bytes())
            logger.info("%d images of an interrupted run were salvaged into %s", len(sound), name.finished)
        with writing(folder):
            partial.unlink()
        return found
    finally:
        builder.close()


def _left_behind(folder: Path, suffix: str, index: int, count: int) -> Iterator[Path]:
    """Files of writers that are dead, or of this share, whose lock the caller has."""
    for path in shard_files(folder, suffix):
        parsed = parse(path.name)
        assert parsed is not None, path
        owner = parsed[0]
        if (owner.index, owner.count) == (index, count) or is_free(folder, owner.index, owner.count):
            yield path
