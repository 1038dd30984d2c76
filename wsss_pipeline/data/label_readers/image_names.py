"""Which known image a text of a label file means, where the text isn't the image's id itself.

Annotation tools write file names as they saw them: with the folders of another machine, a server's address,
backslashes, percent signs for blanks, a number of their own before the name, or letters in another Unicode form.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from functools import cached_property
from urllib.parse import parse_qs, unquote

from wsss_pipeline.data.image_ids import without_image_suffix
from wsss_pipeline.errors import LabelError
from wsss_pipeline.runtime.output import one_line

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LONGEST_END = 8  # components
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an uploaded file
_SERVED = ("/data/upload/", "/data/local-files/")  # how its server's paths begin


def normalised(text: str) -> str:
    """The text in Unicode's composed form (NFC): macOS writes file names decomposed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def written_path(text: str) -> str:
    """The path in a text, ``/`` between components, without a server's address and query, composed (NFC).

    ``images\\a.jpg`` -> ``images/a.jpg``, ``https://host/b/a%20b.jpg?x=1`` -> ``b/a b.jpg``.
    """
    path = normalised(text).replace("\\", "/")
    scheme = _SCHEME.match(path)
    if scheme is None and not path.startswith(_SERVED):
        return re.sub(r"\A(?:\./+)+", "", path)
    if scheme is not None:
        path = path[scheme.end() :].partition("/")[2]
    path, _, query = path.partition("?")
    if of_local_files := parse_qs(query).get("d"):  # Label Studio's /data/local-files/?d=folder/a.jpg
        path = of_local_files[0].replace("\\", "/")
    else:
        path = unquote(path.partition("#")[0])
    return normalised(path).strip("/")


class ImageNames:
    """The known images by their paths and the ends of these; looked through once a name is none of their ids.

    Args:
        images: their ids.
    """

    def __init__(self, images: Collection[str]) -> None:
        self._images = images

    @cached_property
    def _by_path(self) -> dict[str, tuple[str, ...]]:
        """Composed id to the first ids of that form, two at most, which is one too many."""
        found: dict[str, tuple[str, ...]] = {}
        for image_id in self._images:
            path = normalised(image_id)
            found[path] = (*found.get(path, ())[:1], image_id)
        return found

    @cached_property
    def _by_end(self) -> dict[str, tuple[str, ...]]:
        """The same of what is left of a composed id without some of its first folders."""
        found: dict[str, tuple[str, ...]] = {}
        for path, ids in self._by_path.items():
            parts = path.split("/")
            for length in range(1, min(len(parts) - 1, _LONGEST_END) + 1):
                end = "/".join(parts[-length:])
                found[end] = (*found.get(end, ()), *ids)[:2]
        return found

    def find(self, path: str, where: str) -> str | None:
        """The one image that a path can mean: same file name, and of the folders one side's end the other's.

        So ``images/1/a`` means ``a``, and ``a`` means ``train/a``; but ``val/a`` doesn't mean ``train/a``. Where
        several fit, those that share most folders. A name that Label Studio gave (``8f3c2b1a-a``) says nothing of
        folders.

        Args:
            path: path as of ``written_path``.
            where: file and line, for messages.

        Returns:
            The id; None where no image has that name.

        Raises:
            LabelError: several images fit equally well.
        """
        written: list[list[str]] = []
        for spelled in dict.fromkeys((path, normalised(unquote(path)))):
            *folders, last = spelled.split("/")
            if ".." in folders:
                return None  # it leads out of the image folder, whatever it ends in
            names = dict.fromkeys((last, without_image_suffix(last)))
            written += [[*folders, name] for name in names]
        written += [[_UPLOADED.sub("", name)] for *_, name in written if _UPLOADED.match(name)]
        for parts in written:
            ends = ["/".join(parts[first:]) for first in range(len(parts))]
            found = self._by_path.get(ends[0]) or self._by_end.get(ends[0])
            found = found or next((self._by_path[end] for end in ends[1:] if end in self._by_path), ())
            if len(found) > 1:
                pair = " or ".join(f"'{one_line(image_id, 100)}'" for image_id in found)
                raise LabelError(
                    f"{where}: {one_line(path, 100)!r} can mean {pair}; write the path below the image folder"
                )
            if found:
                return found[0]
        return None
