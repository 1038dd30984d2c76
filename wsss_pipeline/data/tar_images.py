"""Images in WebDataset shards: uncompressed tar archives, read where they are and never unpacked.

Headers are walked through here, one block at a time: ``tarfile`` reads long names of any size into memory, and where
a size is negative it never ends. What is damaged costs itself alone.
"""

from __future__ import annotations

import glob
import io
import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import MOST_ARCHIVE_BYTES, TarMember
from wsss_pipeline.errors import ImageError
from wsss_pipeline.files import MIB, check_machine, open_plain
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

MOST_ARCHIVES = 1_000_000
LABEL_SUFFIXES = (".json", ".cls")  # what WebDataset files call a sample's labels
MOST_NAME_BYTES = (
    MIB  # of what stands before a header because it doesn't fit into it: a long name and the like
)
MOST_SEARCHED_BYTES = 256 * MIB  # of an archive, for the next sound header behind damaged ones

_BLOCK = tarfile.BLOCKSIZE
_NO_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# "LENGTH KEY=VALUE" and a line feed, where the length counts all of it
_RECORD = re.compile(rb"(\d{1,7}) ([^=]{1,1000})=")
_ABOUT_OTHERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_EXTENDED)


def is_tar_pattern(images: Path) -> bool:
    """Whether ``--images`` names archives: ``shards/a.tar``, ``shards/{000..127}.tar``, ``shards/*.tar``."""
    try:
        return images.suffix == ".tar" and not images.is_dir()
    except OSError:  # longer than a name may be, which what it stands for needn't be
        return True


def tar_images(pattern: Path, suffixes: tuple[str, ...]) -> Iterator[TarMember]:
    """The images of all archives that a pattern stands for, each with its labels, in the order of what holds them.

    An archive that can't be read is left out with a warning where there are others.

    Args:
        pattern: a path, in which ``{000..127}`` and ``{a,b}`` are expanded as WebDataset does, then ``*``, ``?``
            and ``[...]`` as a shell does.
        suffixes: lower case, of the files that count as images.

    Raises:
        ImageError: braces that don't close, more than a million archives, none, or none that can be read.
    """
    archives = _archives(pattern)
    with FewWarnings(logger, "archives that can't be read") as unreadable:
        for archive in archives:
            try:
                members = _members(archive, suffixes)
            except ImageError as error:
                if unreadable.count + 1 == len(archives):
                    raise
                unreadable.warn("%s; its images are left out", error)
                continue
            for name, member in members.items():
                if _suffix(name) in suffixes:
                    beside = (members.get(name[: name.rindex(".")] + suffix) for suffix in LABEL_SUFFIXES)
                    yield replace(member, labels=next(filter(None, beside), None))


def _archives(pattern: Path) -> list[Path]:
    shown = f"--images {one_line(pattern, 200)}"
    try:
        if _at_most(str(pattern)) > MOST_ARCHIVES:
            raise ImageError(f"{shown}: stands for over {MOST_ARCHIVES:,} archives; name fewer")
        names = list(islice(braceexpand(str(pattern)), MOST_ARCHIVES + 1))
    except (ValueError, RecursionError) as error:
        raise ImageError(
            f"{shown}: {one_line(error, 200)}; write it like 'shards/{{000..127}}.tar'"
        ) from error
    paths = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]  # noqa: PTH207
    archives = [Path(path) for path in dict.fromkeys(paths)]
    if not archives:
        raise ImageError(f"{shown}: there are no such archives")
    return archives


def _at_most(pattern: str) -> int:
    """A number that the names of a pattern don't exceed; to expand nested braces takes memory for all at once."""
    count = 1
    while braces := re.search(r"\{([^{}]*)\}", pattern):
        numbers = re.match(r"(-?\d+)\.\.(-?\d+)", braces[1])
        count *= abs(int(numbers[1]) - int(numbers[2])) + 1 if numbers else braces[1].count(",") + 1
        pattern = pattern[: braces.start()] + pattern[braces.end() :]
    return count


def _suffix(name: str) -> str:
    _, dot, ending = name.rpartition(".")
    return f"{dot}{ending}".lower()


def _members(archive: Path, suffixes: tuple[str, ...]) -> dict[str, TarMember]:
    """Name to file of an archive's images and labels, in its order; only headers are read.

    Names that begin with a dot or ``__`` are passed over; of two files of one name the later counts, as where it is
    unpacked. An image that the archive ends in the midst of is kept, so that reading it fails and is reported.

    Raises:
        ImageError: it isn't an uncompressed tar archive, or can't be read.
    """
    members: dict[str, TarMember] = {}
    twice: dict[str, None] = {}
    others: dict[str, None] = {}
    wanted = (*suffixes, *LABEL_SUFFIXES)
    try:
        with open_plain(archive, MOST_ARCHIVE_BYTES) as file:
            headers = _Headers(file)
            for entry in headers:
                name = entry.name.removeprefix("./")
                is_hidden = any(part.startswith((".", "__")) for part in name.split("/") if part != "..")
                if _suffix(name) not in wanted or is_hidden:
                    continue
                if not entry.is_file:
                    others[name] = None
                elif entry.offset + entry.size <= headers.end or _suffix(name) in suffixes:
                    if members.pop(name, None):
                        twice[name] = None
                    members[name] = TarMember(archive, name, entry.offset, entry.size)
            if not headers.sound and (headers.damaged or not headers.end):
                raise ValueError("it holds no sound header" if headers.end else "it is empty")
    except (OSError, ValueError) as error:
        check_machine(error)
        reason = getattr(error, "strerror", None) or error
        if not members:
            raise ImageError(
                f"{one_line(archive, 200)}: can't be read as an uncompressed tar archive: {reason}; "
                "replace or remove it"
            ) from error
        logger.warning(
            "%s can't be read behind %s: %s; the rest is left out", archive, [*members][-1], reason
        )
    if headers.damaged:
        left_out = "the rest" if headers.is_cut else "what begins there"
        where = f"behind {headers.first} (damaged places: {headers.damaged})"
        logger.warning("%s is damaged %s; %s is left out", archive, where, left_out)
    for names, what in (
        (others, "left out are links, devices and sparse files"),
        (twice, "of files of one name the later counts"),
    ):
        if names:
            logger.warning("%s: %s, such as %s, %d in all", archive, what, next(iter(names)), len(names))
    return members


@dataclass(frozen=True)
class _Entry:
    """What a header says, with those before it that are about it; ``offset`` is the byte behind it."""

    name: str
    is_file: bool
    offset: int
    size: int


class _Headers:
    """What an archive holds, in its order; behind a damaged header it goes on at the next sound one.

    Attributes:
        end: bytes of the archive.
        sound: number of sound headers so far.
        damaged: number of damaged places so far.
        first: name before the first of them.
        is_cut: the search for sound headers took too long and was given up.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.end = file, file.seek(0, io.SEEK_END)
        self.sound, self.damaged, self.first, self.is_cut = 0, 0, "its beginning", False
        self._last, self._left_to_search = self.first, MOST_SEARCHED_BYTES

    def __iter__(self) -> Iterator[_Entry]:
        """The entries; an OSError where the archive can't be read."""
        at = 0
        about: dict[str, str] = {}  # of the next header, from those before it
        is_usable = True
        while at < self.end:
            self._file.seek(at)
            block = self._file.read(_BLOCK)
            header = _header(block)
            if header is None:
                # two blocks of zeros are the end, one is damage
                if not any(block) and not any(self._file.read(_BLOCK)):
                    return
                at = self._search(at + _BLOCK)
                continue
            self.sound += 1
            said = about.get("size", "")
            size = int(said) if said.isdecimal() and header.type not in _ABOUT_OTHERS else header.size
            offset = at + _BLOCK
            behind = offset if header.type in _NO_DATA else offset + size
            is_whole = size >= 0 and behind <= self.end
            at = offset + -(-(behind - offset) // _BLOCK) * _BLOCK if is_whole else self._search(offset)
            if header.type in _ABOUT_OTHERS:
                if is_whole and size <= MOST_NAME_BYTES:
                    about |= _said(header.type, self._file.read(size))
                else:
                    is_usable = False  # the header that it is about is of no use without it
                    if is_whole:
                        self._note_damage()
                continue
            name = about.get("GNU.sparse.name") or about.get("path") or header.name
            is_gnu_sparse = header.type == tarfile.GNUTYPE_SPARSE
            is_sparse = is_gnu_sparse or any(key.startswith("GNU.sparse") for key in about)
            if size >= 0 and is_usable and not header.isdir() and not name.endswith("/"):
                yield _Entry(name, header.isreg() and not is_sparse, offset, size)
                self._last = name
            if is_gnu_sparse and is_whole:
                # blocks about its holes may have stood before its data
                at = self._search(at, is_damage=False)
            about, is_usable = {}, True

    def _note_damage(self) -> None:
        self.first = self.first if self.damaged else self._last
        self.damaged += 1

    def _search(self, start: int, *, is_damage: bool = True) -> int:
        """Where the next sound header lies; the archive's end where there is none."""
        if is_damage:
            self._note_damage()
        stop = min(self.end, start + self._left_to_search)
        found = _next_header(self._file, start, stop)
        self._left_to_search -= found - start
        self.is_cut = found == stop < self.end
        return self.end if self.is_cut else found


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None


def _next_header(file: BinaryIO, start: int, end: int) -> int:
    """Where the next block lies that is a header with the mark of one; ``end`` where there is none."""
    for at in range(start, end, MIB):
        file.seek(at)
        content = file.read(min(MIB, end - at))
        # a byte of each block, so that nothing is looked at more closely that can't be one
        for number, first in enumerate(content[257::_BLOCK]):
            block = content[number * _BLOCK : (number + 1) * _BLOCK]
            if first == ord("u") and block[257:262] == b"ustar" and _header(block) is not None:
                return at + number * _BLOCK
    return end


def _said(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header about the next one says: its name, its size, whether it is sparse."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in _EXTENDED:
        return {}
    said: dict[str, str] = {}
    at = 0
    while match := _RECORD.match(content, at):
        stop = at + int(match[1])
        if stop <= match.end():
            break
        value = content[match.end() : stop - 1]
        said[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = stop
    return said
