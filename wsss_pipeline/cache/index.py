"""What the finished shards of a mask set hold, who has checked them, and ``index.h5``: external links to all images,
so that any HDF5 tool sees one file.

``checked.json`` says, in a line for each shard whose records have all been found sound, which ids it holds, its
SHA-256, and its size and times then, as git's index does. The time of change can't be chosen: files that were
changed, or handed over together with such notes, are looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import h5py
from pydantic import BaseModel, RootModel

from wsss_pipeline.cache.inspection import Inspection, inspect
from wsss_pipeline.cache.records import RecordKind, escape_id
from wsss_pipeline.cache.shards import (
    IMAGES,
    MAX_SHARD_BYTES,
    ShardBuilder,
    UnreadableShardError,
    is_plain,
    open_shard,
    shard_files,
)
from wsss_pipeline.files import check_machine, open_plain
from wsss_pipeline.runtime.output import append_line, replacing, write_file, writing

INDEX = "index.h5"
CHECKED = "checked.json"
NOTES = "checked-*-of-*.json"
MAX_NOTES_BYTES = 2**32

Stamp = tuple[int, int, int]  # size in bytes; times of modification and of change in nanoseconds

logger = logging.getLogger(__name__)


class SoundShard(BaseModel):
    """A shard in which every record was found sound.

    Attributes:
        stamp: size and times of the file then.
        sha256: SHA-256 of its bytes, hexadecimal.
        images: ids of its records.
        unlabelled: those of them without a label.
    """

    stamp: Stamp
    sha256: str
    images: list[str]
    unlabelled: list[str] = []


class _Note(RootModel[dict[str, SoundShard]]):
    """A line of ``checked.json``: shards by name."""


Line = TypeVar("Line", bound=BaseModel)


@dataclass
class Listing:
    """What the finished shards of a mask set hold.

    Attributes:
        shard_of: image id to the name of the shard that holds its record; where several do, of the latest.
        stamps: stamps of those that could be opened, taken before reading.
        sound: those of them that were checked in full, and haven't changed since.
        noted: shards of which the folder has a note, whether or not they are still there.
        superseded: number of records that a later one of the same image replaces.
        unreadable: shard to the error, for those that can't be opened.
    """

    shard_of: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    sound: dict[str, SoundShard] = field(default_factory=dict)
    noted: frozenset[str] = frozenset()
    superseded: int = 0
    unreadable: dict[str, UnreadableShardError] = field(default_factory=dict)


def list_records(
    folder: Path,
    fingerprint: str,
    kind: RecordKind[Any],
    checked: Mapping[str, SoundShard] | None = None,
) -> Listing:
    """List the finished shards; one that can't be opened is reported in the log and left out.

    Args:
        folder, fingerprint, kind: those of the mask set.
        checked: shards that the caller knows to be sound, and that needn't be noted in the folder yet.
    """
    known = read_checked(folder)
    listing = Listing(noted=frozenset(known))
    known |= checked or {}
    waiting, seen = shard_files(folder), set[Path]()
    while waiting:
        path = waiting.pop(0)
        seen.add(path)
        try:
            before = stamp(path)
            if (sound := known.get(path.name)) is not None and sound.stamp == before:
                listing.sound[path.name] = sound
                found = sound.images
            else:
                found = inspect(path, fingerprint, kind, "ids").ids
        except (OSError, UnreadableShardError) as error:
            if not os.path.lexists(path):  # `wsss cache gc` has put its records into a later one
                waiting = [other for other in shard_files(folder) if other not in seen]
                continue
            if isinstance(error, OSError):
                error = UnreadableShardError(f"{path} can't be opened ({error.strerror})", False)
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
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def checked_shard(before: Stamp, inspection: Inspection) -> SoundShard | None:
    """The note of a shard that was inspected with all of its records; None where one of them is damaged."""
    if inspection.damaged:
        return None
    unlabelled = [image_id for image_id, info in inspection.infos.items() if not info.labels]
    return SoundShard(
        stamp=before, sha256=inspection.sha256, images=list(inspection.infos), unlabelled=unlabelled
    )


def open_checked(path: Path, fingerprint: str, kind: RecordKind[Any], sound: SoundShard | None) -> h5py.File:
    """A shard, open in this process, once it is known that HDF5 comes to an end with it.

    Args:
        path: the file.
        fingerprint, kind: those of the mask set.
        sound: note of it; it holds as long as the file's bytes are those of then.

    Raises:
        UnreadableShardError: as ``inspect``.
    """
    try:
        is_as_then = sound is not None and stamp(path) == sound.stamp and _digest(path) == sound.sha256
    except OSError as error:
        check_machine(error)
        raise UnreadableShardError(f"{path} can't be opened ({error.strerror})", False) from error
    if not is_as_then:
        inspect(path, fingerprint, kind, "records")
    return open_shard(path, fingerprint)


def _digest(path: Path) -> str:
    with open_plain(path, MAX_SHARD_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checked(folder: Path) -> dict[str, SoundShard]:
    """Shards that were checked in full, by their names, as they were then."""
    checked: dict[str, SoundShard] = {}
    for path in [folder / CHECKED, *sorted(folder.glob(NOTES))]:
        for note in read_lines(path, _Note, "what it stood for is checked again"):
            checked |= note.root
    return checked


def note_checked(folder: Path, index: int, count: int, checked: Mapping[str, SoundShard]) -> None:
    """Leave a note of shards that were checked in full, for whoever writes the index next."""
    add_lines(folder / f"checked-{index}-of-{count}.json", _lines(checked))


def _lines(checked: Mapping[str, SoundShard]) -> Iterator[str]:
    for name, sound in checked.items():
        yield json.dumps({name: sound.model_dump()}, separators=(",", ":"))


def read_lines(path: Path, kind: type[Line], otherwise: str) -> Iterator[Line]:
    """Notes that may be anybody's, a line of JSON each: what can't be understood costs itself alone, and a warning.

    Args:
        path: the file; none is an empty one.
        kind: content of a line.
        otherwise: end of the warning.
    """
    is_damaged = False
    try:
        with open_plain(path, MAX_NOTES_BYTES) as file:
            for line in file:
                if line.strip():
                    try:
                        content = kind.model_validate_json(line, strict=True)
                    except ValueError:
                        is_damaged = True
                    else:
                        yield content
    except FileNotFoundError:
        return
    except OSError as error:
        check_machine(error)
        is_damaged = True
    if is_damaged:
        logger.warning("%s can't be read; %s", path, otherwise)


def add_lines(path: Path, lines: Iterable[str]) -> None:
    """Put lines behind those of a note; what is no plain file is replaced."""
    # where a killed process left half a line, that ends here
    content = "\n".join(["", *lines])
    if is_plain(path):
        append_line(path, content)
    else:
        write_file(path, f"{content}\n", durable=False)


def write_index(
    folder: Path, fingerprint: str, kind: RecordKind[Any], checked: Mapping[str, SoundShard]
) -> Listing:
    """Write ``index.h5`` and ``checked.json`` anew, and drop the notes that went into it; the caller holds the set's
    lock.

    Args:
        folder, fingerprint, kind: those of the mask set.
        checked: shards that the caller has checked in full.

    Returns:
        What the finished shards hold.
    """
    listing = list_records(folder, fingerprint, kind, checked)
    builder = ShardBuilder(fingerprint)
    try:
        for image_id, shard in listing.shard_of.items():
            name = escape_id(image_id)
            builder.images[name] = h5py.ExternalLink(shard, f"/{IMAGES}/{name}")
        write_file(folder / INDEX, builder.to_bytes())
        with replacing(folder / CHECKED, durable=False) as file:
            file.writelines(f"{line}\n".encode() for line in _lines(listing.sound))
        for note in folder.glob(NOTES):
            with writing(note):
                note.unlink()
    finally:
        builder.close()
    return listing
