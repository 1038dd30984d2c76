"""Class sets: built in, from a YAML file, or named on the command line.

Mask values: 0 background, 1..C classes in class-set order, 255 ignore.
"""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.class_entries import MAX_CLASSES, ClassEntry, ClassSet, Fusion, overlapping
from wsss_pipeline.data.class_set_yaml import (
    DEFAULT_TEMPLATE,
    check_classes,
    check_template,
    parse_class_set,
)
from wsss_pipeline.errors import ClassSetError

__all__ = [
    "DEFAULT_TEMPLATE",
    "MAX_CLASSES",
    "ClassEntry",
    "ClassSet",
    "Fusion",
    "builtin_class_sets",
    "check_template",
    "load_class_set",
    "voc_palette",
]

_logger = logging.getLogger("wsss_pipeline.data")


def load_class_set(text: str) -> ClassSet:
    """The class set that ``--classes`` names.

    Args:
        text: name of a built-in set (``voc12``, ``coco14``); a YAML file (ends in ``.yaml`` or ``.yml``, or
            holds a path separator); else class names with commas between them (``cat,dog``; a set of one
            class that is spelled like a built-in set needs a comma behind it).

    A set that says nothing about its background gets the words of ``voc12``; ``background: []`` means none.
    Either way, words that also stand in a name, alias, prompt or synonym of a class are removed, with a
    logged warning. (That rule turns the published words for VOC into those published for COCO.)

    Raises:
        ClassSetError: unknown set, unreadable file, or a set that contradicts itself.
    """
    text = text.strip()
    if not text:
        raise ClassSetError(f"no classes; choose {_choices()}")
    if text in builtin_class_sets():
        return _builtin(text)
    if text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text:
        class_set, has_background = parse_class_set(_read(Path(text)), text, _as_set_name(Path(text).stem))
    else:
        class_set, has_background = _from_names(text), False
    if not has_background:
        class_set = replace(class_set, background=_builtin("voc12").background)
    return _without_overlaps(class_set)


def builtin_class_sets() -> list[str]:
    """Names of the class sets that come with the package."""
    folder = resources.files("wsss_pipeline.data") / "class_sets"
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def voc_palette() -> NDArray[np.uint8]:
    """uint8 (256, 3): the RGB colour of each mask value in PASCAL VOC's development kit.

    Bit ``7 - i`` of red, green and blue is bit ``3i``, ``3i + 1`` and ``3i + 2`` of the mask value.
    """
    values = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for channel in range(3):
        for i in range(3):
            bit = values >> (3 * i + channel) & 1
            palette[:, channel] |= (bit << (7 - i)).astype(np.uint8)
    return palette


@cache
def _builtin(name: str) -> ClassSet:
    text = (resources.files("wsss_pipeline.data") / "class_sets" / f"{name}.yaml").read_text("utf-8")
    return parse_class_set(text, f"class set {name}", name)[0]


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClassSetError(f"class set {file} isn't UTF-8 text: {error.reason}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ClassSetError(
            f"class set {str(file)!r} can't be read: {reason}; choose {_choices()}"
        ) from error


def _from_names(text: str) -> ClassSet:
    if close := difflib.get_close_matches(text, builtin_class_sets(), n=1, cutoff=0.7):
        raise ClassSetError(
            f"unknown class set '{text}'; did you mean '{close[0]}'? (for one class of that name: '{text},')"
        )
    names = [name.strip() for name in text.removesuffix(",").split(",")]
    for name in names:
        if not name or not name.isprintable():
            raise ClassSetError(
                f"class names '{text}': one is empty or holds a control character; write them as cat,dog"
            )
    classes = tuple(ClassEntry(name) for name in names)
    check_classes(classes, f"class names '{text}'")
    return ClassSet(_as_set_name("-".join(names)), (DEFAULT_TEMPLATE,), (), classes)


def _without_overlaps(class_set: ClassSet) -> ClassSet:
    overlaps = dict(overlapping(class_set.background, class_set.classes))
    if overlaps:
        _logger.warning(
            "class set '%s': removed from the background words, as they are also classes: %s",
            class_set.name,
            ", ".join(f"{word} (class '{name}')" for word, name in overlaps.items()),
        )
    kept = tuple(word for word in class_set.background if word not in overlaps)
    return replace(class_set, background=kept)


def _as_set_name(text: str) -> str:
    """Something fit for a file name out of any text."""
    name = re.sub("[^A-Za-z0-9_-]+", "-", text).strip("-")
    return name[:40].rstrip("-") or "classes"


def _choices() -> str:
    return f"{', '.join(builtin_class_sets())}, a YAML file, or names like cat,dog"
