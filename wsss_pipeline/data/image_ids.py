"""Image ids: which texts may be one, and which images of a folder carry which.

An image id is the path of the image below the image folder, without its suffix, with ``/`` between
components: ``a/b`` for ``a/b.jpg``. Ids come from files of the user's and end up in names of files that
this package writes, so every one goes through ``check_image_id``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.data.images import HAS_AVIF, HAS_HEIC, remedy_of
from wsss_pipeline.data.tar_images import is_tar_pattern, tar_images
from wsss_pipeline.errors import ConfigError, ImageError, LabelError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

_HEIC, _AVIF = (".heic", ".heif", ".hif"), (".avif", ".avifs")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".pgm", ".ppm", ".pnm", ".pbm"),
    *(_AVIF if HAS_AVIF else ()),
    *(_HEIC if HAS_HEIC else ()),
)
# Those of images that aren't read, each with what tells how to have them read: a folder that holds some isn't empty.
UNREAD_SUFFIXES = {
    suffix: remedy_of(name)
    for name, suffixes in {
        "HEIC": () if HAS_HEIC else _HEIC,
        "AVIF": () if HAS_AVIF else _AVIF,
        "JPEG 2000": (".jp2", ".j2k", ".jpf", ".jpx", ".jxr"),
        "others": (".jxl", ".psd", ".tga", ".exr", ".dcm"),
        "raw": (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    }.items()
    for suffix in suffixes
}
_NAMED = 3  # examples
# what masks are called that lie beside their images
_MASK_NAME = re.compile(
    r"(.*?)[_.-](?:mask|masks|segmentation|seg|gt|label|labels|groundtruth|ground_truth|annotation|alpha|matte)",
    re.IGNORECASE,
)
# and folders of them
_MASK_FOLDER = re.compile(
    r"(.*/)?(masks?|segmentation|segmentation_?class|segmentation_?object|annotations?|labels?|gt|ground_?truth)/(.+)",
    re.IGNORECASE,
)
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


def is_image_id(text: str) -> bool:
    """Whether ``check_image_id`` lets a text pass."""
    return _objection(text) is None


def _objection(image_id: str) -> str | None:
    if len(image_id) <= MAX_ID_LENGTH and _PLAIN.fullmatch(image_id):
        return None
    return next((reason for pattern, reason in _OBJECTIONS.items() if pattern.search(image_id)), None)


def without_image_suffix(path: str) -> str:
    """``path`` without its ending where that is one of an image (``a/b.jpg`` -> ``a/b``), read or not."""
    stem, dot, ending = path.rpartition(".")
    suffix = f"{dot}{ending}".lower()
    return stem if suffix in IMAGE_SUFFIXES or suffix in UNREAD_SUFFIXES else path


class FoundImages(Mapping[str, ImageFile]):
    """Image id to file, of which there may be millions: the path of a file of its own is made when it is asked for.

    Args:
        root: folder of the images that lie in no archive.

    Attributes:
        unread: image id to what is wrong with the format of its file, which lies there all the same.
        suffixes: number of files by suffix, lower case, that are no images.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, str | TarMember] = {}  # for a file of its own what its name has behind the id
        self.unread: dict[str, str] = {}
        self.suffixes: Counter[str] = Counter()

    def __getitem__(self, image_id: str) -> ImageFile:
        file = self._files[image_id]
        return file if isinstance(file, TarMember) else self._root / f"{image_id}{file}"

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def add(self, image_id: str, file: str | TarMember) -> None:
        """Add an image; ``file``: a member of an archive, or the path below the folder, which begins with the id."""
        self._files[image_id] = file if isinstance(file, TarMember) else sys.intern(file[len(image_id) :])

    def pop(self, image_id: str) -> ImageFile:
        """Take an image out; its file."""
        file = self[image_id]
        del self._files[image_id]
        return file

    def sort(self) -> None:
        """Put the images in the order of their ids."""
        self._files = {image_id: self._files[image_id] for image_id in sorted(self._files)}


def find_images(
    root: Path,
    suffix: str | None = None,
    *,
    option: str = "",
    strip: bool = False,
    may_be_empty: bool = False,
) -> FoundImages:
    """Image id to file for all images below ``root``, sorted by id.

    ``root`` may also stand for tar archives, see ``tar_images``: ids are then names in the archives, in the
    order of archives and of what is in them.

    An image is a file with one of ``IMAGE_SUFFIXES``, in any case. Names that begin with a dot are passed
    over. Symbolic links are followed; a folder that several of them lead to is visited once, under its
    own path where it lies below ``root``. A link to a file that doesn't exist counts as an image, so
    that reading it fails and is reported instead of the image vanishing. A file whose name can't be an
    id is left out with a warning, and so are those in archives that share one. Images of formats that aren't read
    are counted in one warning.

    Args:
        root: folder, or archives.
        suffix: choice of files: those whose names, or names without the suffix of an image, end in it (``.jpg``,
            ``_rgb``, ``_rgb.png``); with ``*``, ``?`` or ``[`` a pattern for the name or, with a slash, for the path
            below the folder; with ``!`` before it those that it doesn't fit.
        option: option that sets ``suffix``, for messages.
        strip: choice to take the suffix off the ids.
        may_be_empty: choice to give none where there are none.

    Raises:
        ImageError: a folder or an archive can't be read, there is no image in it, two images of a folder have the
            same id, or all in archives share theirs.
        ConfigError: a suffix that can't be taken off.
    """
    if strip and suffix and re.search(r"[*?\[/]|\A!", suffix):
        raise ConfigError(f"{option} {suffix:.60}: write what the names end in, like _mask, without * or !")
    in_tar = is_tar_pattern(root)
    found = FoundImages(root)
    passed_over = 0
    shared: dict[str, ImageFile] = {}  # id of several in archives to the first of them
    with (
        FewWarnings(logger, "files whose image ids can't be used") as unfit,
        FewWarnings(logger, "files that share an image id") as twins,
    ):
        of_tar = tar_images(root, (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))
        for file in of_tar if in_tar else _files_below(root):
            name = file.name if isinstance(file, TarMember) else file
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  # a million times
            if ending not in IMAGE_SUFFIXES:
                found.suffixes[ending] += 1
                if ending in UNREAD_SUFFIXES:
                    remedy = UNREAD_SUFFIXES[ending]
                    found.unread[without_image_suffix(name)] = f"there, but {ending} isn't read; {remedy}"
                continue
            image_id = without_image_suffix(name)
            if suffix and not _fits(name, suffix):
                passed_over += 1
                continue
            if strip and suffix:
                whole = name if name.lower().endswith(suffix.lower()) else image_id
                image_id = whole[: -len(suffix)]
            if reason := _objection(image_id):
                path = file if isinstance(file, TarMember) else root / file
                unfit.warn("%r is left out: its image id %s; rename the file", one_line(path, 200), reason)
            elif image_id in found or image_id in shared:
                first = shared[image_id] if image_id in shared else found.pop(image_id)
                second = file if isinstance(file, TarMember) else root / file
                pair = f"{one_line(first, 200)} and {one_line(second, 200)}"
                same = f"have the same image id '{one_line(image_id, 200)}'"
                if not in_tar:
                    choose = f", or say which are meant: {option} {Path(first.name).suffix}"
                    raise ImageError(f"{pair} {same}; rename one of them{choose if option else ''}")
                shared[image_id] = first
                twins.warn("%s %s; both are left out", pair, same)
            else:
                found.add(image_id, file)
    if shared and not found:
        raise ImageError(f"no image is left: {pair} {same}, all others too; name each archive once")
    if not found and not may_be_empty:
        if unfit.count:
            raise ImageError(f"{one_line(root, 200)}: holds no image whose name can be an id; rename them")
        raise _nothing_in(root, found, passed_over, f"{option} {suffix}" if suffix else "")
    _warn_of_others(root, found, option if not suffix else "")
    if not in_tar:
        found.sort()
    return found


def _fits(name: str, suffix: str) -> bool:
    """Whether a path below the folder is among those that a suffix or pattern chooses."""
    if suffix.startswith("!"):
        return not _fits(name, suffix[1:])
    name, suffix = name.lower(), suffix.lower()
    if re.search(r"[*?\[]", suffix):
        return fnmatchcase(name if "/" in suffix else name.rpartition("/")[2], suffix)
    return name.endswith(suffix) or without_image_suffix(name).endswith(suffix)


def _nothing_in(root: Path, found: FoundImages, passed_over: int, chosen: str) -> ImageError:
    """An error that says what lies there instead of images."""
    shown = one_line(root, 200)
    if passed_over:
        return ImageError(
            f"{shown}: none of its {passed_over:,} images is of {one_line(chosen, 100)}; check it"
        )
    if not found.suffixes:
        return ImageError(f"{shown}: holds no image, nor any other file; check the folder")
    kinds = found.suffixes.most_common(8)
    listed = ", ".join(f"{count:,} {one_line(kind, 20) or 'without a suffix'}" for kind, count in kinds)
    remedy = next((UNREAD_SUFFIXES[kind] for kind, _ in kinds if kind in UNREAD_SUFFIXES), "check the folder")
    more = ", ..." if len(found.suffixes) > len(kinds) else ""
    return ImageError(f"{shown}: holds no image that is read, but {listed}{more}; {remedy}")


def _warn_of_others(root: Path, found: FoundImages, option: str) -> None:
    """One line for images of formats that aren't read, one for what looks like masks among the images."""
    kinds = [(kind, count) for kind, count in found.suffixes.most_common() if kind in UNREAD_SUFFIXES]
    if kinds:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        logger.warning(
            "%s: images of formats that aren't read are left out: %s; %s",
            one_line(root, 200),
            listed,
            UNREAD_SUFFIXES[kinds[0][0]],
        )
    if not option:
        return
    pairs = [
        image_id for image_id in found if (match := _MASK_NAME.fullmatch(image_id)) and match[1] in found
    ]
    remedy = ""
    if pairs:
        ending = re.search(r"[_.-][^_.-]+\Z", pairs[0])
        remedy = ending[0] if ending else ""
    else:
        in_folders = {image_id: match for image_id in found if (match := _MASK_FOLDER.fullmatch(image_id))}
        names = {image_id.rpartition("/")[2] for image_id in found if image_id not in in_folders}
        pairs = [image_id for image_id in in_folders if image_id.rpartition("/")[2] in names]
        remedy = "".join(f"{match[1] or ''}{match[2]}/*" for match in [in_folders[i] for i in pairs[:1]])
    if pairs:
        logger.warning(
            "%s: %d files look like masks of other images, such as %s, and are taken for images themselves; where "
            "they are masks, leave them out: %s '!%s'",
            one_line(root, 200),
            len(pairs),
            ", ".join(one_line(image_id, 100) for image_id in pairs[:_NAMED]),
            option,
            one_line(remedy, 100),
        )


def _files_below(root: Path) -> Iterator[str]:
    """Paths below ``root`` of its files and those of all folders in it; each real folder once, linked ones last."""
    try:
        # A link to a folder around the root would bring in everything that lies beside it.
        seen = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
        pending = deque([""])  # paths below the root, each with a slash behind it
        while pending:
            folder = pending.popleft()
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (pending.append if entry.is_symlink() else pending.appendleft)(f"{folder}{entry.name}/")
                # A pipe or a socket with the suffix of an image would block whoever opens it.
                elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
                    yield f"{folder}{entry.name}"
    except OSError as error:
        check_machine(error)
        raise ImageError(
            f"image folder {one_line(error.filename or root, 200)!r} can't be read: {error.strerror}; "
            "name a folder that holds images"
        ) from error
