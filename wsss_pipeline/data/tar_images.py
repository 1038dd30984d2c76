"""Images in WebDataset shards: uncompressed tar archives, read where they are and never unpacked."""

from __future__ import annotations

import glob
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from wsss_pipeline.data.image_files import TarMember
from wsss_pipeline.errors import ImageError

logger = logging.getLogger(__name__)

MOST_ARCHIVES = 1_000_000
LABEL_SUFFIXES = (".json", ".cls")  # what WebDataset files call a sample's labels


def is_tar_pattern(images: Path) -> bool:
    """Whether ``--images`` names archives: ``shards/a.tar``, ``shards/{000..127}.tar``, ``shards/*.tar``."""
    return images.suffix == ".tar" and not images.is_dir()


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
    try:
        names = list(islice(braceexpand(str(pattern)), MOST_ARCHIVES + 1))
    except ValueError as error:
        raise ImageError(f"--images {pattern}: {error}; write it like 'shards/{{000..127}}.tar'") from error
    if len(names) > MOST_ARCHIVES:
        raise ImageError(f"--images {pattern}: stands for over {MOST_ARCHIVES:,} archives; name fewer")
    paths = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]  # noqa: PTH207
    archives = [Path(path) for path in dict.fromkeys(paths)]
    if not archives:
        raise ImageError(f"--images {pattern}: there are no such archives")
    unreadable = 0
    for archive in archives:
        try:
            members = _members(archive)
        except ImageError as error:
            unreadable += 1
            if unreadable == len(archives):
                raise
            logger.warning("%s; its images are left out", error)
            continue
        for name, member in members.items():
            if PurePosixPath(name).suffix.lower() in suffixes:
                beside = (members.get(name[: name.rindex(".")] + suffix) for suffix in LABEL_SUFFIXES)
                yield replace(member, labels=next(filter(None, beside), None))


def _members(archive: Path) -> dict[str, TarMember]:
    """Name to regular file of an archive, in its order; only headers are read.

    Names that begin with a dot or ``__`` are passed over. What follows a damaged header is left out with a
    warning.

    Raises:
        ImageError: it isn't an uncompressed tar archive, or can't be read.
    """
    members: dict[str, TarMember] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                name = header.name.removeprefix("./")
                is_hidden = any(part.startswith((".", "__")) for part in name.split("/") if part != "..")
                if header.isreg() and not header.issparse() and not is_hidden:
                    members[name] = TarMember(archive, name, header.offset_data, header.size)
    except (OSError, tarfile.TarError, ValueError) as error:
        if not members:
            reason = getattr(error, "strerror", None) or error
            raise ImageError(
                f"{archive}: can't be read as an uncompressed tar archive: {reason}; replace or remove it"
            ) from error
        logger.warning("%s is damaged behind %s: %s; the rest is left out", archive, [*members][-1], error)
    return members
