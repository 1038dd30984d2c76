"""Names of the files in a mask set's folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
INDEX = "index.h5"
PARTIAL_SUFFIX = ".partial"
DAMAGED_SUFFIX = ".damaged"

_PATTERN = re.compile(r"shard-(\d{1,9})of(\d{1,9})-(\d{1,9})\.h5(\..+)?")


@dataclass(frozen=True, order=True)
class ShardName:
    """File ``sequence`` in the folder, by writer ``index`` of ``count``; the order is that of writing."""

    sequence: int
    index: int
    count: int

    @property
    def finished(self) -> str:
        """For example ``shard-0of4-00012.h5``; such a file never changes."""
        return f"shard-{self.index}of{self.count}-{self.sequence:05}.h5"

    @property
    def partial(self) -> str:
        """The name while the file is being filled."""
        return self.finished + PARTIAL_SUFFIX

    @property
    def damaged(self) -> str:
        """The name of a file that couldn't be opened."""
        return self.finished + DAMAGED_SUFFIX


def parse(file_name: str) -> tuple[ShardName, str] | None:
    """A shard's name and what stands behind ``.h5`` (empty for a finished one); None for another file."""
    match = _PATTERN.fullmatch(file_name)
    if match is None:
        return None
    return ShardName(sequence=int(match[3]), index=int(match[1]), count=int(match[2])), match[4] or ""


def shard_files(folder: Path, suffix: str = "") -> list[Path]:
    """Files of shards with this suffix, in order of writing: what a later one says holds."""
    found = []
    for path in folder.iterdir():
        parsed = parse(path.name)
        if parsed is not None and parsed[1] == suffix:
            found.append((parsed[0], path))
    return [path for _, path in sorted(found)]


def next_sequence(folder: Path) -> int:
    """One more than the largest number that any shard file in the folder has, whatever its state."""
    names = (parse(path.name) for path in folder.iterdir())
    return 1 + max((parsed[0].sequence for parsed in names if parsed is not None), default=0)
