"""Class sets as YAML files, read strictly: what isn't understood is an error that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from wsss_pipeline.data.class_entries import MAX_CLASSES, ClassEntry, ClassSet
from wsss_pipeline.errors import ClassSetError

DEFAULT_TEMPLATE = "a clean origami {}."  # the one that CLIP-ES selected (arXiv 2212.09506, section 3.3)

_SET_KEYS = ("name", "template", "templates", "background", "classes")
_CLASS_KEYS = ("name", "prompt", "synonyms", "fuse", "aliases", "coco_id")
_SET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def parse_class_set(text: str, origin: str, default_name: str) -> tuple[ClassSet, bool]:
    """A class set from the text of a YAML file, and whether the file says what its background is.

    Args:
        text: the file.
        origin: its name, for messages.
        default_name: name of the set where the file gives none.

    Raises:
        ClassSetError: not YAML, an unknown or missing key, a value of the wrong type, a class that occurs
            twice, more than 254 classes.
    """
    values = _mapping(_load(text, origin), origin)
    _check_keys(values, _SET_KEYS, origin)
    name = _text(values.get("name", default_name), f"{origin}: 'name'")
    if not _SET_NAME.fullmatch(name):
        raise ClassSetError(
            f"{origin}: 'name' is {name!r}; a folder is named after it: use letters, digits, '_', '-', '.'"
        )
    if "classes" not in values:
        raise ClassSetError(f"{origin}: 'classes' is missing; list the classes under it")
    classes = tuple(
        _entry(item, f"{origin}: 'classes' item {number}")
        for number, item in enumerate(_items(values["classes"], f"{origin}: 'classes'"), start=1)
    )
    check_classes(classes, origin)
    background = _texts(values.get("background", []), f"{origin}: 'background'", empty_is_fine=True)
    return ClassSet(name, _templates(values, origin), background, classes), "background" in values


def check_classes(classes: tuple[ClassEntry, ...], origin: str) -> None:
    """Raises ClassSetError where there are more than 254 classes or two share a name, alias or COCO id."""
    if len(classes) > MAX_CLASSES:
        raise ClassSetError(
            f"{origin}: {len(classes)} classes; a mask holds {MAX_CLASSES} (0 is background, 255 ignore)"
        )
    taken: dict[str | int, str] = {}
    for entry in classes:
        keys: tuple[str | int, ...] = (
            entry.name,
            *entry.aliases,
            *([] if entry.coco_id is None else [entry.coco_id]),
        )
        for key in keys:
            if key in taken:
                raise ClassSetError(f"{origin}: {key!r} occurs twice (in '{taken[key]}' and '{entry.name}')")
            taken[key] = entry.name


def check_template(template: str, origin: str) -> str:
    """``template`` as it came, where it has exactly one ``{}`` and no other brace.

    Raises:
        ClassSetError: it doesn't.
    """
    if template.count("{}") != 1 or re.search("[{}]", template.replace("{}", "")):
        raise ClassSetError(
            f"{origin}: template {template!r} needs exactly one {{}}, where the class name goes, "
            "and no other brace; for example 'a photo of a {}.'"
        )
    return template


def _load(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ClassSetError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error


def _templates(values: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    if "template" in values and "templates" in values:
        raise ClassSetError(f"{origin}: both 'template' and 'templates'; keep one of them")
    if "templates" in values:
        templates = _texts(values["templates"], f"{origin}: 'templates'")
    else:
        templates = (_text(values.get("template", DEFAULT_TEMPLATE), f"{origin}: 'template'"),)
    return tuple(check_template(template, origin) for template in templates)


def _entry(item: Any, origin: str) -> ClassEntry:
    if not isinstance(item, Mapping):
        return ClassEntry(_text(item, origin))
    _check_keys(item, _CLASS_KEYS, origin)
    if "name" not in item:
        raise ClassSetError(f"{origin}: 'name' is missing")
    name = _text(item["name"], f"{origin}: 'name'")
    origin = f"{origin} ('{name}')"
    fuse = item.get("fuse", "sentence")
    if fuse not in ("sentence", "feature"):
        raise ClassSetError(f"{origin}: 'fuse' is {fuse!r}; choose sentence or feature")
    coco_id = item.get("coco_id")
    if coco_id is not None and (isinstance(coco_id, bool) or not isinstance(coco_id, int)):
        raise ClassSetError(f"{origin}: 'coco_id' is {coco_id!r}; it takes a whole number")
    return ClassEntry(
        name=name,
        prompt=_text(item["prompt"], f"{origin}: 'prompt'") if "prompt" in item else None,
        synonyms=_texts(item["synonyms"], f"{origin}: 'synonyms'") if "synonyms" in item else (),
        fuse=fuse,
        aliases=_texts(item["aliases"], f"{origin}: 'aliases'") if "aliases" in item else (),
        coco_id=coco_id,
    )


def _mapping(value: Any, origin: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else type(value).__name__
        raise ClassSetError(
            f"{origin}: expected 'key: value' lines with {', '.join(_SET_KEYS)}; found {found}"
        )
    return value


def _check_keys(values: Mapping[Any, Any], known: Collection[str], origin: str) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
            raise ClassSetError(f"{origin}: unknown key {key!r}; {hint}")


def _items(value: Any, origin: str, empty_is_fine: bool = False) -> list[Any]:
    if not isinstance(value, list):
        raise ClassSetError(f"{origin} takes a list, not {value!r:.60}")
    if not value and not empty_is_fine:
        raise ClassSetError(f"{origin} is an empty list; give at least one entry or leave the key out")
    return value


def _texts(value: Any, origin: str, empty_is_fine: bool = False) -> tuple[str, ...]:
    texts = tuple(_text(item, origin) for item in _items(value, origin, empty_is_fine))
    for text in texts:
        if texts.count(text) > 1:
            raise ClassSetError(f"{origin}: {text!r} occurs twice; keep one")
    return texts


def _text(value: Any, origin: str) -> str:
    # YAML reads no, on, 1 and the like as something else than text
    if not isinstance(value, str):
        raise ClassSetError(f"{origin}: {value!r:.60} isn't text; put it in quotes")
    text = value.strip()
    if not text or not text.isprintable():
        raise ClassSetError(f"{origin}: {value!r:.60} is empty or holds a control character")
    return text
