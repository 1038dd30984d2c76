"""What the last run found out about each image, so that the next one needn't read it again.

As git's index does it: an image file whose size and times are as they were is believed to hold the bytes that it
held then, and a shard whose size and time are as they were to hold the same records. One file for each share
of the work, beside the shards; it may be deleted at any time, which costs no more than reading once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsss_pipeline.cache.index import stamp
from wsss_pipeline.data.image_files import ImageFile, Status, file_status
from wsss_pipeline.runtime.output import write_file

logger = logging.getLogger(__name__)

# A file may change twice within one tick of its clock: what was read so soon after a change isn't believed.
SETTLED_NS = 2 * 10**9


class KnownImages:
    """The images of one share of a mask set.

    Args:
        folder: of the mask set.
        index: 0-based share of the work.
        count: number of shares.
    """

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._folder = folder
        self._path = folder / f"known-{index}-of-{count}.json"
        self._images, shards = self._read()
        self._believed = {name for name, known in shards.items() if self._stamp(name) == known}
        self._noted: dict[str, list[Any]] = {}

    def is_done(self, image_id: str, file: ImageFile, labels: tuple[str, ...], need_cams: bool) -> bool:
        """Whether the set holds this image's mask for the bytes that ``file`` has and for these labels.

        False where that isn't known without reading. A file that isn't there is no done image.
        """
        entry = self._images.get(image_id)
        if entry is None:
            return False
        shard, status, known_labels, has_cams = entry
        if shard not in self._believed or known_labels != list(labels) or (need_cams and not has_cams):
            return False
        try:
            return bool(status == list(file_status(file)))
        except OSError:
            return False

    def note(self, image_id: str, status: Status, labels: tuple[str, ...], has_cams: bool) -> None:
        """The set holds the mask for the bytes that a file of this status had."""
        if time.time_ns() - max(status[1], status[2]) > SETTLED_NS:
            self._noted[image_id] = ["", list(status), list(labels), has_cams]

    def save(self, places: Mapping[str, str]) -> None:
        """Write what is known for the next run.

        Args:
            places: image id to the shard that holds its mask.

        Raises:
            OutputError: disk full, read-only, ...
        """
        if not self._noted:
            return
        images = {
            image_id: [places[image_id], *entry[1:]]
            for image_id, entry in (self._images | self._noted).items()
            if image_id in places
        }
        shards = {name: self._stamp(name) for name in sorted({entry[0] for entry in images.values()})}
        content = json.dumps({"shards": shards, "images": images}, separators=(",", ":"))
        write_file(self._path, content.encode("utf-8", "surrogatepass"), durable=False)

    def _read(self) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
        try:
            content = json.loads(self._path.read_bytes().decode("utf-8", "surrogatepass"))
            images, shards = content["images"], content["shards"]
            if all(map(_is_entry, images.values())) and all(map(_is_status, shards.values())):
                return dict(images), dict(shards)
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        logger.warning("%s can't be read; the images are looked at again", self._path)
        return {}, {}

    def _stamp(self, shard: str) -> list[int] | None:
        try:
            return list(stamp(self._folder / Path(shard).name))
        except (OSError, ValueError):  # a name with a NUL character
            return None


def _is_entry(entry: Any) -> bool:
    """Whether it is shard, status, labels and whether CAMs are stored, as ``note`` and ``save`` write them."""
    if not isinstance(entry, list) or len(entry) != 4:
        return False
    shard, status, labels, has_cams = entry
    return (
        isinstance(shard, str)
        and _is_status(status)
        and isinstance(labels, list)
        and isinstance(has_cams, bool)
    )


def _is_status(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
