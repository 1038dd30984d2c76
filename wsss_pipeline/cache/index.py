"""What the finished shards of a mask set hold, and ``index.h5``: external links to all images, so that any HDF5 tool
sees one file.

The index also remembers size and modification time of the shards whose records have all been checked, as git's
index does, so that the next run needn't check them again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
from pydantic import TypeAdapter

from wsss_pipeline.cache.records import escape_id, image_ids, own_member
from wsss_pipeline.cache.shards import IMAGES, ShardBuilder, open_shard, shard_files
from wsss_pipeline.errors import CacheFormatError
from wsss_pipeline.runtime.output import write_file, writing

INDEX = "index.h5"
NOTES = "checked-*-of-*.json"

Stamp = tuple[int, int]  # size in bytes, modification time in nanoseconds
_NOTE = TypeAdapter(dict[str, Stamp])  # stamps by shard

logger = logging.getLogger(__name__)


@dataclass
class Listing:
    """What the finished shards of a mask set hold.

    Attributes:
        shard_of: image id to the name of the shard that holds its record; where several do, of the latest.
        stamps: stamps of those that could be opened, taken before reading.
        superseded: number of records that a later one of the same image replaces.
        unreadable: shard to the error, for those that can't be opened.
    """

    shard_of: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    superseded: int = 0
    unreadable: dict[str, Exception] = field(default_factory=dict)


def list_records(folder: Path, fingerprint: str) -> Listing:
    """List the finished shards; one that can't be opened is reported in the log and left out."""
    listing = Listing()
    for path in shard_files(folder):
        try:
            before = stamp(path)
            with open_shard(path, fingerprint) as file:
                found = image_ids(file[IMAGES])
        except (CacheFormatError, OSError) as error:
            listing.unreadable[path.name] = error
            logger.warning("the images in it count as missing: %s", error)
            continue
        listing.stamps[path.name] = before
        for image_id in found:
            listing.superseded += image_id in listing.shard_of
            listing.shard_of[image_id] = path.name
    return listing


def stamp(path: Path) -> Stamp:
    """What tells whether a file has changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_trusted(folder: Path) -> dict[str, Stamp]:
    """Shards that were checked in full, with their stamp then, by index and notes."""
    trusted: dict[str, Stamp] = {}
    path = folder / INDEX
    try:
        if path.is_file():
            with h5py.File(path, "r", locking="best-effort") as file:
                shards = own_member(file, "shards", h5py.Group)
                for name in shards:
                    attributes = own_member(shards, name, h5py.Group).attrs
                    if "mtime_ns" in attributes:
                        trusted[str(name)] = int(attributes["size"]), int(attributes["mtime_ns"])
    except Exception as error:  # a damaged file makes HDF5 raise almost anything; the index can be made anew
        logger.warning("%s can't be read (%s); it is made anew", path, error)
        trusted = {}
    for path in sorted(folder.glob(NOTES)):
        trusted |= _read_note(path)
    return trusted


def note_checked(folder: Path, index: int, count: int, checked: Mapping[str, Stamp]) -> None:
    """Leave a note of shards that were checked in full, for whoever writes the index next."""
    path = folder / f"checked-{index}-of-{count}.json"
    write_file(path, json.dumps(_read_note(path) | dict(checked)), durable=False)


def _read_note(path: Path) -> dict[str, Stamp]:
    try:
        return _NOTE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        logger.warning("%s can't be read; what it stood for is checked again", path)
        return {}


def write_index(folder: Path, fingerprint: str, checked: Mapping[str, Stamp]) -> Listing:
    """Write ``index.h5`` anew, and drop the notes that went into it; the caller holds the set's lock.

    Args:
        folder, fingerprint: those of the mask set.
        checked: shards that the caller has checked in full, with their stamp at that time.

    Returns:
        What the finished shards hold.
    """
    listing, trusted = list_records(folder, fingerprint), read_trusted(folder) | dict(checked)
    builder = ShardBuilder(fingerprint)
    try:
        for image_id, shard in listing.shard_of.items():
            name = escape_id(image_id)
            builder.images[name] = h5py.ExternalLink(shard, f"/{IMAGES}/{name}")
        shards = builder.file.create_group("shards")
        for shard in sorted(set(listing.shard_of.values())):
            item = shards.create_group(shard)
            if trusted.get(shard) == listing.stamps[shard]:
                item.attrs["size"], item.attrs["mtime_ns"] = listing.stamps[shard]
        write_file(folder / INDEX, builder.to_bytes())
        with writing(folder):
            for note in folder.glob(NOTES):
                note.unlink()
    finally:
        builder.close()
    return listing
