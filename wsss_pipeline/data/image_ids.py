"""Image ids: which texts may be one, and which pictures of a folder carry which.

An image id is the path of the picture below the image folder, without its suffix, with ``/`` between
components: ``a/b`` for ``a/b.jpg``. Ids come from files of the user's and end up in names of files that
this package writes, so every one goes through ``check_image_id``.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from pathlib import Path

from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.tar_images import archives, is_tar_pattern, members_of_all
from wsss_pipeline.errors import ImageError, LabelError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MAX_ID_LENGTH = 1000

# Control characters, Unicode line separators and the surrogates of names that aren't valid UTF-8.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")


def check_image_id(image_id: str, origin: str) -> str:
    """``image_id`` as it came, where it is safe to use below any folder.

    Args:
        image_id: text from a label file, a list of ids or a folder.
        origin: where it stands (file and line), for the message.

    Raises:
        LabelError: empty, longer than 1000 characters, absolute, with a drive, a backslash, a control
            character, a byte that isn't UTF-8, or a component that is empty, ``.`` or ``..``.
    """
    if reason := _objection(image_id):
        shown = image_id if len(image_id) <= 80 else f"{image_id[:80]}..."
        raise LabelError(
            f"{origin}: image id {shown!r} {reason}; write the path below the image folder, like 'a/b'"
        )
    return image_id


def _objection(image_id: str) -> str | None:
    if not image_id.strip():
        return "is empty"
    if len(image_id) > MAX_ID_LENGTH:
        return f"is longer than {MAX_ID_LENGTH} characters"
    if _FORBIDDEN.search(image_id):
        return "holds a control character or isn't UTF-8"
    if "\\" in image_id:
        return "holds a backslash"
    if image_id.startswith("/") or _DRIVE.match(image_id):
        return "is an absolute path"
    components = image_id.split("/")
    if "" in components:
        return "has an empty path component"
    if "." in components or ".." in components:
        return "has a '.' or '..' path component"
    return None


def without_image_suffix(path: str) -> str:
    """``path`` without its ending where that is one of a picture (``a/b.jpg`` -> ``a/b``)."""
    stem, dot, ending = path.rpartition(".")
    return stem if f"{dot}{ending}".lower() in IMAGE_SUFFIXES else path


def find_images(root: Path) -> dict[str, ImageFile]:
    """Image id to file for all pictures below ``root``, sorted by id; empty where there are none.

    ``root`` may also stand for tar archives, see ``tar_images``: ids are then names in the archives, in the
    order of archives and of what is in them.

    A picture is a file with one of ``IMAGE_SUFFIXES``, in any case. Names that begin with a dot are passed
    over. Symbolic links are followed; a folder that several of them lead to is visited once, under its
    own path where it lies below ``root``. A link to a file that doesn't exist counts as a picture, so
    that reading it fails and is reported instead of the picture vanishing. A file whose name can't be an
    id is left out with a warning.

    Raises:
        ImageError: a folder or an archive can't be read, or two pictures have the same id.
    """
    images: dict[str, ImageFile] = {}
    if is_tar_pattern(root):
        for member in members_of_all(archives(root), IMAGE_SUFFIXES):
            _register(images, member.name, member)
        return images
    try:
        for folder in _folders(root):
            for entry in _entries(folder):
                if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and _is_picture(entry):
                    _register(images, Path(entry.path).relative_to(root).as_posix(), Path(entry.path))
    except OSError as error:
        raise ImageError(
            f"image folder {str(error.filename or root)!r} can't be read: {error.strerror}; "
            "name a folder that holds pictures"
        ) from error
    return dict(sorted(images.items()))


def _folders(root: Path) -> list[Path]:
    """``root`` and all folders below it, each real folder once; linked ones after all others."""
    found: list[Path] = []
    # A link to a folder around the root would bring in everything that lies beside it.
    seen = {_identity(folder) for folder in root.resolve().parents}
    pending = deque([root])
    while pending:
        folder = pending.popleft()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        found.append(folder)
        below = [entry for entry in _entries(folder) if entry.is_dir()]
        pending.extendleft(Path(entry.path) for entry in below if not entry.is_symlink())
        pending.extend(Path(entry.path) for entry in below if entry.is_symlink())
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: entry.name)


def _is_picture(entry: os.DirEntry[str]) -> bool:
    # A pipe or a socket with the suffix of a picture would block whoever opens it.
    return entry.is_file() or (entry.is_symlink() and not entry.is_dir() and not Path(entry.path).exists())


def _register(images: dict[str, ImageFile], name: str, file: ImageFile) -> None:
    image_id = without_image_suffix(name)
    if reason := _objection(image_id):
        logger.warning("%r is left out: its image id %s; rename the file", str(file), reason)
        return
    if image_id in images:
        raise ImageError(
            f"{images[image_id]} and {file} have the same image id '{image_id}'; rename one of them"
        )
    images[image_id] = file
