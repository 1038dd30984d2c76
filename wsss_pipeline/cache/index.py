"""``index.h5``: external links to all images, so that any HDF5 tool sees one file.

It also remembers size and modification time of the shards whose records have all been checked, as git's
index does, so that the next run needn't check them again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from wsss_pipeline.cache.records import escape_id, unescape_id
from wsss_pipeline.cache.shard_names import INDEX, shard_files
from wsss_pipeline.cache.shards import FORMAT_VERSION, IMAGES, file_image, new_file_in_memory, open_shard
from wsss_pipeline.errors import CacheFormatError
from wsss_pipeline.runtime.output import write_file, writing

Stamp = tuple[int, int]  # size in bytes, modification time in nanoseconds

logger = logging.getLogger(__name__)

NOTES = "checked-*-of-*.json"


@dataclass
class Listing:
    """What the finished shards of a mask set hold.

    Attributes:
        places: image id to the file that holds its record; where several do, the latest.
        superseded: file name to the number of its records that a later file replaces.
        unreadable: file name to the reason, for shards that can't be opened.
    """

    places: dict[str, str] = field(default_factory=dict)
    superseded: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def list_records(folder: Path, fingerprint: str) -> Listing:
    """List the finished shards; one that can't be opened is reported in the log and left out."""
    listing = Listing()
    for path in shard_files(folder):
        try:
            with open_shard(path, fingerprint) as images:
                image_ids = [unescape_id(name) for name in images]
        except FileNotFoundError:
            continue
        except Exception as error:  # names of damaged groups make HDF5 raise almost anything
            listing.unreadable[path.name] = " ".join(str(error).split())
            logger.warning("the images in it count as missing: %s", listing.unreadable[path.name])
            continue
        for image_id in image_ids:
            earlier = listing.places.get(image_id)
            if earlier is not None:
                listing.superseded[earlier] = listing.superseded.get(earlier, 0) + 1
            listing.places[image_id] = path.name
    return listing


def stamp(path: Path) -> Stamp:
    """What tells whether a file has changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def note_checked(folder: Path, index: int, count: int, checked: Mapping[str, Stamp]) -> None:
    """Leave a note of shards that were checked in full, for whoever writes the index next.

    Raises:
        OutputError: disk full, read-only, ...
    """
    path = folder / f"checked-{index}-of-{count}.json"
    write_file(path, json.dumps(_read_note(path) | dict(checked)).encode(), durable=False)


def read_trusted(folder: Path) -> dict[str, Stamp]:
    """Shards that were checked in full, with their stamp then, by index and notes."""
    trusted = _read_index(folder)
    for path in sorted(folder.glob(NOTES)):
        trusted |= _read_note(path)
    return trusted


def _read_note(path: Path) -> dict[str, Stamp]:
    try:
        content = json.loads(path.read_bytes())
        return {str(name): (int(size), int(mtime)) for name, (size, mtime) in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        logger.warning("%s can't be read; what it stood for is checked again", path)
        return {}


def _read_index(folder: Path) -> dict[str, Stamp]:
    try:
        with h5py.File(folder / INDEX, "r", locking="best-effort") as file:
            return {
                str(name): (int(item.attrs["size"]), int(item.attrs["mtime_ns"]))
                for name, item in file["shards"].items()
                if "mtime_ns" in item.attrs
            }
    except FileNotFoundError:
        return {}
    except Exception as error:  # a damaged file makes HDF5 raise almost anything; the index can be made anew
        logger.warning("%s can't be read (%s); it is made anew", folder / INDEX, " ".join(str(error).split()))
        return {}


def write_index(folder: Path, fingerprint: str, listing: Listing, trusted: Mapping[str, Stamp]) -> None:
    """Write ``index.h5``, and drop the notes that went into it; the caller holds the set's lock.

    Args:
        folder: of the mask set.
        fingerprint: of the mask set.
        listing: of its finished shards.
        trusted: shards checked in full, by file name, with their stamp at that time.

    Raises:
        OutputError: disk full, read-only, ...
    """
    file = new_file_in_memory()
    try:
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["fingerprint"] = fingerprint
        images, shards = file.create_group(IMAGES), file.create_group("shards")
        for image_id, shard in listing.places.items():
            name = escape_id(image_id)
            images[name] = h5py.ExternalLink(shard, f"/{IMAGES}/{name}")
        for shard in sorted(set(listing.places.values())):
            item = shards.create_group(shard)
            try:
                now = stamp(folder / shard)
            except OSError as error:
                raise CacheFormatError(f"{folder / shard} vanished; run the same command again") from error
            if trusted.get(shard) == now:
                item.attrs["size"], item.attrs["mtime_ns"] = now
        write_file(folder / INDEX, file_image(file))
        with writing(folder):
            for note in folder.glob(NOTES):
                note.unlink()
    finally:
        file.close()
