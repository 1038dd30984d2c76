"""Lists of classes in the files of other tools, as what would stand in a class set.

A line each (labelme's ``labels.txt``, ``classes.txt``, Darknet's ``obj.names``), ``names`` of YOLO's ``data.yaml``,
CVAT's ``labelmap.txt``, or JSON: a list of names, names by index, or the categories of a COCO file.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsss_pipeline.errors import ClassSetError
from wsss_pipeline.files import MIB, check_machine, parse_json, read_text

_logger = logging.getLogger("wsss_pipeline.data")

# as label files of other tools call what is no class: background and "no label"
NO_CLASSES = ("background", "_background_", "__background__", "__ignore__", "_ignore_")

MOST_BYTES = 64 * MIB  # a COCO file with its annotations is no list of classes

Color = tuple[int, int, int]

_LABELMAP_LINE = re.compile(r"(?P<name>[^:]+):(?P<color>[^:]*):[^:]*:[^:]*")


class LabelmapEntry(NamedTuple):
    """A line of CVAT's ``labelmap.txt``.

    Attributes:
        name: the label.
        color: RGB of its pixels, 0..255 each; None where the file leaves it out.
    """

    name: str
    color: Color | None


def is_labelmap(text: str) -> bool:
    """Whether a text is CVAT's ``labelmap.txt``: ``name:r,g,b:parts:actions`` in each line but comments."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and re.match(r"#\s*label\s*:\s*color_rgb\s*:", lines[0]):
        return True
    return bool(lines) and all(_LABELMAP_LINE.fullmatch(line) for line in lines if not line.startswith("#"))


def labelmap_entries(text: str, origin: str) -> list[LabelmapEntry]:
    """The lines of CVAT's ``labelmap.txt`` in their order, background among them.

    Raises:
        ClassSetError: another form of line, a colour outside 0..255, or one that occurs twice.
    """
    entries: list[LabelmapEntry] = []
    colors: dict[Color, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LABELMAP_LINE.fullmatch(line.strip())
        numbers = match["color"].replace(" ", "") if match else ""
        if match is None or not re.fullmatch(r"(\d{1,3},\d{1,3},\d{1,3})?", numbers):
            raise ClassSetError(
                f"{origin} line {number}: {line.strip()!r:.80} isn't 'name:r,g,b:parts:actions'"
            )
        name, color = match["name"].strip(), None
        if numbers:
            red, green, blue = map(int, numbers.split(","))
            color = (red, green, blue)
            if max(color) > 255:
                raise ClassSetError(f"{origin} line {number}: colour {numbers} goes beyond 255")
            if color in colors:
                raise ClassSetError(
                    f"{origin} line {number}: {name!r:.60} has the colour {numbers} of {colors[color]!r:.60}; "
                    "give each its own"
                )
            colors[color] = name
        entries.append(LabelmapEntry(name, color))
    return entries


def read_class_list(path: Path) -> Mapping[str, Any]:
    """What a class set of a file's classes would hold, mask value 1 first; background and the like passed over.

    A JSON file may be a class set itself.

    Raises:
        ClassSetError: the file can't be read, is of another kind, or what it lists has gaps or no clear order.
    """
    origin = str(path)[:200]
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        check_machine(error)
        reason = getattr(error, "strerror", None) or error
        raise ClassSetError(f"{origin} can't be read as UTF-8 text: {reason}; check the path") from error
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ClassSetError(f"{origin}: not valid JSON: {error}") from error
        if isinstance(content, dict) and "classes" in content:
            return content
        return {"classes": named_classes(content, origin)}
    if suffix not in (".txt", ".names", ""):
        raise ClassSetError(
            f"{origin}: classes are read from .yaml, .json, .txt and .names, not from {suffix!r:.20}; for a class of "
            "that name put a comma behind it"
        )
    if is_labelmap(text):
        entries = [
            {"name": entry.name} | ({"color": list(entry.color)} if entry.color else {})
            for entry in labelmap_entries(text, origin)
        ]
        return {"classes": _without_background(entries, origin, anywhere=True)}
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line]
    for number, line in lines:
        if line.startswith("#"):
            raise ClassSetError(f"{origin} line {number}: {line!r:.60} isn't a name; a list has no comments")
        if not line.isprintable():
            raise ClassSetError(
                f"{origin} line {number}: {line!r:.60} holds a control character; write plain text"
            )
    if len(lines) > 1 and all(re.match(r"\d+\s*[\s:,;]\s*\S", line) for _, line in lines):
        raise ClassSetError(
            f"{origin}: each line begins with a number, like {lines[0][1]!r:.60}; write names alone"
        )
    if len(lines) == 1 and "," in lines[0][1]:
        raise ClassSetError(f"{origin}: one line with commas; write one name a line")
    return {"classes": _without_background([{"name": line} for _, line in lines], origin)}


def named_classes(content: Any, origin: str) -> list[dict[str, Any]]:
    """Classes out of a list of names, ``{index: name}``, ``{name: index}`` or COCO's ``categories``.

    Indices count from 0, or from 1, without gaps. Categories come in the order of their ids, which they may keep.

    Raises:
        ClassSetError: none of these.
    """
    if isinstance(content, Mapping) and isinstance(content.get("categories"), list):
        categories = content["categories"]
        if not all(
            isinstance(item, Mapping) and type(item.get("id")) is int and isinstance(item.get("name"), str)
            for item in categories
        ):
            raise ClassSetError(f"{origin}: each of 'categories' takes an 'id', a whole number, and a 'name'")
        ordered = sorted(categories, key=lambda item: int(item["id"]))
        return _without_background([{"name": item["name"]} for item in ordered], origin)
    if isinstance(content, Mapping) and "id2label" in content:
        content = content["id2label"]
    if isinstance(content, Mapping):
        pairs = list(content.items())
        if pairs and all(isinstance(name, str) and type(index) is int for name, index in pairs):
            pairs = [(index, name) for name, index in pairs]
        by_index = {int(index): name for index, name in pairs if re.fullmatch(r"\d{1,6}", str(index))}
        first = min(by_index, default=0)
        if not pairs or len(by_index) < len(pairs) or first > 1:
            raise ClassSetError(
                f'{origin}: expected names by index, like {{"0": "cat", "1": "dog"}}, or a list'
            )
        gap = next((i for i in range(first, first + len(by_index)) if i not in by_index), None)
        if gap is not None:
            raise ClassSetError(f"{origin}: the index {gap} has no name; mask values have no gaps")
        content = [by_index[index] for index in sorted(by_index)]
    if not isinstance(content, list):
        raise ClassSetError(f"{origin}: expected a list of names, found {type(content).__name__}")
    return _without_background([{"name": name} for name in content], origin)


def _without_background(
    entries: Sequence[dict[str, Any]], origin: str, *, anywhere: bool = False
) -> list[dict[str, Any]]:
    """The entries without those that are no class: the first ones, for the values of all behind count from there."""
    kept, passed_over = list[dict[str, Any]](), list[str]()
    for entry in entries:
        name = entry["name"]
        is_none = isinstance(name, str) and is_no_class(name)
        if is_none and (anywhere or not kept):
            passed_over.append(name)
        else:
            kept.append(entry)
    if passed_over:
        _logger.warning(
            "%s: %s passed over: no class, masks have 0 for background and 255 for 'no label'",
            origin,
            " and ".join(map(repr, passed_over[:3])),
        )
    if not kept:
        raise ClassSetError(f"{origin}: holds no class name")
    return kept


def is_no_class(name: str) -> bool:
    """Whether a name stands for background or "no label"."""
    return unicodedata.normalize("NFC", name).strip().casefold() in NO_CLASSES
