"""What every label reader fills: image ids and class names, checked as they come."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from wsss_pipeline import files
from wsss_pipeline.data.classes import ClassEntry, ClassSet
from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_ids import check_image_id, is_image_id, without_image_suffix
from wsss_pipeline.data.label_readers.image_names import ImageNames, normalised, written_path
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB, check_machine
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

MOST_BYTES = 2048 * MIB  # of a label file: those of a million images take a twentieth


OtherClasses = Literal["error", "ignore"]

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 10_000  # characters of an image's name; signed addresses have thousands
_EXAMPLES = 3

_PLACE = re.compile(
    r"(.*?)([1-9][0-9]*)?", re.DOTALL
)  # a million texts that differ in a number take much memory
_ROOT = re.compile(r"\A(?:[A-Za-z]:)?/+")


class LabelTable:
    """Image id to class names, both in order of first appearance.

    Args:
        images: the known image ids. An id of the file may carry the suffix of the image; what fits no
            known image is kept all the same.
        classes: the classes that may occur, by name or alias.
        other_classes: what becomes of labels that are none of the classes: an error, or they are passed over and
            counted.

    Attributes:
        repeated: warnings of records that say again what an earlier one said; to be entered by who fills the table.
    """

    def __init__(
        self, images: Collection[str], classes: ClassSet, other_classes: OtherClasses = "error"
    ) -> None:
        self.classes = classes
        self._images, self._names = images, ImageNames(images)
        self._find = cache(classes.find)  # a file may name the same few classes a million times
        self._labels: dict[str, tuple[str, ...]] = {}
        self._shared: dict[
            tuple[str, ...], tuple[str, ...]
        ] = {}  # of a million images many have the same labels
        # image id to where its one record stands: a text, or the number in it where the rest is ``_file``
        self._records: dict[str, str | int] = {}
        self._file = ""
        self.repeated = FewWarnings(logger, "records of images that have one already")
        self._other_classes = other_classes
        self._others: Counter[str] = Counter()
        self._written: dict[str, str] = {}  # id of an image that is written with other folders to that path
        self._absolute: tuple[str, str] | None = None  # the first absolute path of no known image, and where

    def add_image(self, text: str, where: str) -> str:
        """Makes an entry for an image, without labels so far, and gives its id.

        A known id, with or without the suffix of an image, is that image. Any other text is the known image that it
        can mean (see ``ImageNames.find``), without one an id of its own.

        Args:
            text: the image as the file names it.
            where: file and line, for messages.

        Raises:
            LabelError: an unsafe id, several images that it can mean, or entries that name one image in two folders.
        """
        image_id = text if text in self._images else without_image_suffix(text)
        path = image_id
        if image_id not in self._images:
            if len(text) > _LONGEST_TEXT:
                check_image_id(text, where)
            written = written_path(text)
            path = without_image_suffix(written)
            if found := self._names.find(written, where):
                image_id = found
            elif is_image_id(image_id):
                path = image_id
            else:
                image_id = _ROOT.sub("", path)
                if image_id != path:
                    self._absolute = self._absolute or (path, where)
                path = image_id
        check_image_id(image_id, where)
        in_other_folders = path != image_id and normalised(path) != normalised(image_id)
        if in_other_folders or image_id in self._written:
            path = path if in_other_folders else image_id
            other = self._written.get(image_id, image_id if image_id in self._labels else path)
            if other != path:
                pair = f"'{one_line(other, 100)}' and '{one_line(path, 100)}'"
                raise LabelError(
                    f"{where}: {pair} come to mean one image, '{one_line(image_id, 100)}'; write the paths below the "
                    "image folder, or remove one of them"
                )
            self._written[image_id] = path
        self._labels.setdefault(image_id, ())
        return image_id

    def add_class(self, image_id: str, entry: ClassEntry) -> None:
        """Adds a class to an image that has an entry."""
        names = self._labels[image_id]
        if entry.name not in names:
            names = (*names, entry.name)
            self._labels[image_id] = self._shared.setdefault(names, names)

    def add_record(
        self,
        image: str,
        names: Iterable[str],
        where: str,
        *,
        adds_up: bool = False,
        or_numbered: bool = False,
    ) -> None:
        """Adds all that a source says of an image in one place.

        Args:
            image: id or path of the image.
            names: names or aliases of its classes.
            where: file and line, for messages.
            adds_up: True in forms with a record for each label. Else an image has one record: the same again is
                passed over with a warning.
            or_numbered: as in ``class_named``.

        Raises:
            LabelError: an unsafe id, an unknown class, or other classes than an earlier record of the image has.
        """
        image_id = self.add_image(image, where)
        entries: list[ClassEntry] = []
        for name in names:
            if entry := self.class_named(name, where, or_numbered=or_numbered):
                entries.append(entry)
            else:
                self._others[name.strip()] += 1
        if adds_up or image_id not in self._records:
            for entry in entries:
                self.add_class(image_id, entry)
            if image_id not in self._records:
                file, number = _PLACE.fullmatch(where).groups()  # type: ignore[union-attr]  # anything fits
                self._file = self._file or file
                self._records[image_id] = int(number) if number and file == self._file else where
            return
        place = self._records[image_id]
        first = f"{self._file}{place}" if isinstance(place, int) else place
        before, now = self._labels[image_id], {entry.name for entry in entries}
        shown = one_line(image_id, 100)
        if set(before) != now:
            said = " and ".join(f"{', '.join(sorted(known)) or 'no class':.60}" for known in (before, now))
            raise LabelError(
                f"{first} and {where}: image '{shown}' has two records, {said}; keep the right one"
            )
        self.repeated.warn(
            "%s: image '%s' again, with the same labels as in %s; passed over", where, shown, first
        )

    def has_image(self, text: str) -> bool:
        """Whether an image of that id is known; the text may carry the image's suffix."""
        return text in self._images or without_image_suffix(text) in self._images

    def images_numbered(self, number: int) -> list[str]:
        """Ids of the known images whose name holds this number: in all its digits together, or in the last group.

        Code bases keep ``2007_000032`` as 2007000032, and ``COCO_train2014_000000000009`` as 9.
        """
        return self._numbered.get(number, [])

    @cached_property
    def _numbered(self) -> dict[int, list[str]]:
        numbered: dict[int, list[str]] = defaultdict(list)
        for image_id in self._images:
            if groups := re.findall("[0-9]{1,100}", image_id.rpartition("/")[2]):
                for number in {int("".join(groups)[:100]), int(groups[-1])}:
                    numbered[number].append(image_id)
        return numbered

    def class_named(self, name: str, where: str, *, or_numbered: bool = False) -> ClassEntry | None:
        """The class of that name or alias; ``or_numbered``, without one, of that index, counted from 0.

        Returns:
            The class; None where there is none and other classes are passed over.

        Raises:
            LabelError: there is none; the message has the nearest names, or the indices that there are.
        """
        name, classes = name.strip(), self.classes.classes
        if entry := self._find(name):
            return entry
        hint = ""
        if or_numbered and re.fullmatch("[0-9]{1,9}", name):
            if self._other_classes == "ignore":
                raise LabelError(
                    f"{where}: class index {name}: with --other-classes ignore labels must be names, since indices "
                    "count in a list of all classes"
                )
            if int(name) < len(classes):
                return classes[int(name)]
            raise LabelError(
                f"{where}: class index {name}; the {len(classes)} classes of '{self.classes.name}' have "
                f"the indices 0 to {len(classes) - 1}"
            )
        if self._other_classes == "ignore":
            self._others[name] += 0  # told, even where no image is said to have it
            return None
        if or_numbered and any(name in entry.name.split() for entry in classes if " " in entry.name):
            hint = "; names with spaces need a .csv or .json file"
        if not hint:
            hint = "; to leave such labels out, add --other-classes ignore"
        raise LabelError(f"{where}: {self.classes.unknown(name)} (class set '{self.classes.name}'){hint}")

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Image id to class names; warns of all that was read in another way than it was written.

        Raises:
            LabelError: all labels were passed over as other classes, or absolute paths lead to no known image.
        """
        if (
            self._absolute and not self._written
        ):  # where some lead to images, others are of images that are missing
            check_image_id(*self._absolute)
        if self._others:
            listed = _counted(self._others)
            if not any(self._labels.values()):
                raise LabelError(
                    f"labels: none is a class of '{self.classes.name}', all are others ({listed}); check --classes"
                )
            logger.warning(
                "labels outside the class set '%s' are passed over, so their objects become background: %s",
                self.classes.name,
                listed,
            )
        if self._written:
            count, pairs = len(self._written), islice(self._written.items(), _EXAMPLES)
            examples = ", ".join(f"'{one_line(path, 100)}' is '{one_line(i, 100)}'" for i, path in pairs)
            logger.warning(
                "labels: %d images are named with other folders and were found by file name: %s%s",
                count,
                examples,
                f" and {count - _EXAMPLES} more" if count > _EXAMPLES else "",
            )
        return self._labels


def _counted(names: Counter[str]) -> str:
    shown = [
        f"{one_line(name, 60)} ({count})" if count else one_line(name, 60)
        for name, count in names.most_common(10)
    ]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the file system refuses below ``path`` (permission, too long a name) into a LabelError."""
    try:
        yield
    except OSError as error:
        check_machine(error)
        raise LabelError(
            f"{one_line(error.filename or path, 200)!r} can't be read: {error.strerror or error}; check the path"
        ) from error


def read_text(file: Path, at_most: int = MOST_BYTES) -> str:
    """The text of a label file; a LabelError: unreadable, too large, not UTF-8, or with a NUL character."""
    try:
        with reading(file):
            text = files.read_text(file, at_most)
    except UnicodeDecodeError as error:
        raise LabelError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise LabelError(f"{file} line {line}: NUL character; the file is damaged or not text")
    return text


def begins_with(pattern: re.Pattern[str], file: Path, at_most: int) -> bool:
    """Whether the first line of a file fits; a file that can't be read, such as one that isn't text, fits nothing."""
    try:
        return pattern.fullmatch(read_text(file, at_most).split("\n", 1)[0]) is not None
    except LabelError:
        return False


def read_json(file: Path) -> Any:
    """The content of a JSON file, see ``parse_json``; a LabelError: as ``read_text`` too."""
    return parse_json(read_text(file), str(file))


def parse_json(text: str, where: str) -> Any:
    """JSON text; a LabelError: it isn't JSON, or a key occurs twice in one object."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)  # which silently keeps the last of two
        if len(values) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise LabelError(f"{where}: key {twice!r:.60} occurs twice in one object; merge the two entries")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise LabelError(f"{where}: not valid JSON: nested too deep") from error
    except ValueError as error:
        raise LabelError(f"{where}: not valid JSON: {error}") from error
