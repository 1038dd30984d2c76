"""Image ids: which texts may be one, and which images of a folder carry which.

An image id is the path of the image below the image folder, without its suffix, with ``/`` between
components: ``a/b`` for ``a/b.jpg``. Ids come from files of the user's and end up in names of files that
this package writes, so every one goes through ``check_image_id``.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.data.tar_images import is_tar_pattern, tar_images
from wsss_pipeline.errors import ImageError, LabelError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MAX_ID_LENGTH = 1000

# what makes a text unfit to be an id, the first that applies
_OBJECTIONS = {
    re.compile(pattern, re.DOTALL): objection
    for pattern, objection in {
        r"\A\s*\Z": "is empty",
        f"\\A.{{{MAX_ID_LENGTH + 1}}}": f"is longer than {MAX_ID_LENGTH} characters",
        # controls, Unicode line separators and the surrogates of names that aren't valid UTF-8
        "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]": "holds a control character or isn't UTF-8",
        r"\\": "holds a backslash",
        r"\A(/|[A-Za-z]:)": "is an absolute path",
        r"(\A|/)(/|\Z)": "has an empty path component",
        r"(\A|/)\.\.?(/|\Z)": "has a '.' or '..' path component",
    }.items()
}


_PLAIN = re.compile(r"[A-Za-z0-9_-]+(?:[./][A-Za-z0-9_-]+)*")  # what nearly all ids are, and has no objection


def check_image_id(image_id: str, origin: str) -> str:
    """``image_id`` as it came, where it is safe to use below any folder.

    Args:
        image_id: text from a label file, a list of ids or a folder.
        origin: file and line of the id, for the message.

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
    if len(image_id) <= MAX_ID_LENGTH and _PLAIN.fullmatch(image_id):
        return None
    return next((reason for pattern, reason in _OBJECTIONS.items() if pattern.search(image_id)), None)


def without_image_suffix(path: str) -> str:
    """``path`` without its ending where that is one of an image (``a/b.jpg`` -> ``a/b``)."""
    stem, dot, ending = path.rpartition(".")
    return stem if f"{dot}{ending}".lower() in IMAGE_SUFFIXES else path


def find_images(root: Path) -> dict[str, ImageFile]:
    """Image id to file for all images below ``root``, sorted by id; empty where there are none.

    ``root`` may also stand for tar archives, see ``tar_images``: ids are then names in the archives, in the
    order of archives and of what is in them.

    An image is a file with one of ``IMAGE_SUFFIXES``, in any case. Names that begin with a dot are passed
    over. Symbolic links are followed; a folder that several of them lead to is visited once, under its
    own path where it lies below ``root``. A link to a file that doesn't exist counts as an image, so
    that reading it fails and is reported instead of the image vanishing. A file whose name can't be an
    id is left out with a warning, and so are those in archives that share one.

    Raises:
        ImageError: a folder or an archive can't be read, two images of a folder have the same id, or all in
            archives share theirs.
    """
    in_tar = is_tar_pattern(root)
    images: dict[str, ImageFile] = {}
    shared: dict[str, ImageFile] = {}  # id of several in archives to the first of them
    with (
        FewWarnings(logger, "files whose image ids can't be used") as unfit,
        FewWarnings(logger, "files that share an image id") as twins,
    ):
        for file in tar_images(root, IMAGE_SUFFIXES) if in_tar else _images_below(root):
            name = file.name if isinstance(file, TarMember) else file.relative_to(root).as_posix()
            image_id = without_image_suffix(name)
            if reason := _objection(image_id):
                unfit.warn("%r is left out: its image id %s; rename the file", one_line(file, 200), reason)
            elif image_id in images or image_id in shared:
                first = shared[image_id] if image_id in shared else images.pop(image_id)
                pair = f"{one_line(first, 200)} and {one_line(file, 200)}"
                same = f"have the same image id '{one_line(image_id, 200)}'"
                if not in_tar:
                    raise ImageError(f"{pair} {same}; rename one of them")
                shared[image_id] = first
                twins.warn("%s %s; both are left out", pair, same)
            else:
                images[image_id] = file
    if shared and not images:
        raise ImageError(f"no image is left: {pair} {same}, all others too; name each archive once")
    return images if in_tar else dict(sorted(images.items()))


def _images_below(root: Path) -> Iterator[Path]:
    """Images of ``root`` and all folders below it, each real folder once; linked folders after all others."""
    try:
        # A link to a folder around the root would bring in everything that lies beside it.
        seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
        pending = deque([root])
        while pending:
            folder = pending.popleft()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (pending.append if entry.is_symlink() else pending.appendleft)(path)
                # A pipe or a socket with the suffix of an image would block whoever opens it.
                elif path.suffix.lower() in IMAGE_SUFFIXES and (
                    entry.is_file() or (entry.is_symlink() and not path.exists())
                ):
                    yield path
    except OSError as error:
        check_machine(error)
        raise ImageError(
            f"image folder {one_line(error.filename or root, 200)!r} can't be read: {error.strerror}; "
            "name a folder that holds images"
        ) from error
