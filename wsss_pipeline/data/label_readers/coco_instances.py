"""Labels from a COCO instances file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassEntry
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.errors import LabelError


def is_coco_instances(content: Any) -> bool:
    """Whether the content of a JSON file has the three lists of a COCO instances file."""
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def fill_from_coco(table: LabelTable, content: dict[str, Any], file: Path) -> None:
    """Labels of an image are the categories of its annotations, in their order; crowds are included.

    Images come in the order of ``images``, those without annotations too; the image id is ``file_name``
    without its suffix. Categories go by name or alias; one without a name by its number, where the class
    set holds COCO ids. A category that no annotation uses may be unknown.

    Raises:
        LabelError: another structure, an unsafe id, a number that stands for nothing, an unknown class.
    """
    image_ids: dict[int, str] = {}
    for image, where in _objects(content, "images", file):
        number = _integer(image, "id", where)
        if number in image_ids:
            raise LabelError(f"{where}: id {number} occurs twice; keep one of the images")
        image_ids[number] = table.add_image(_text(image, "file_name", where), where)
    categories = {
        _integer(item, "id", where): (item, where) for item, where in _objects(content, "categories", file)
    }
    entries: dict[int, ClassEntry] = {}
    for annotation, where in _objects(content, "annotations", file):
        image_number = _integer(annotation, "image_id", where)
        if image_number not in image_ids:
            raise LabelError(f"{where}: image_id {image_number} isn't among 'images'; the file is incomplete")
        category = _integer(annotation, "category_id", where)
        if category not in entries:
            if category not in categories:
                raise LabelError(f"{where}: category_id {category} isn't among 'categories'")
            entries[category] = _entry(table, category, *categories[category])
        table.add_class(image_ids[image_number], entries[category])


def _entry(table: LabelTable, number: int, item: dict[str, Any], where: str) -> ClassEntry:
    if "name" in item:
        return table.class_named(_text(item, "name", where), where)
    for entry in table.classes.classes:
        if entry.coco_id == number:
            return entry
    raise LabelError(f"{where}: no 'name', and no class of '{table.classes.name}' has the coco_id {number}")


def _objects(content: dict[str, Any], key: str, file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if not isinstance(content[key], list):
        raise LabelError(f"{file}: '{key}' takes a list, not {type(content[key]).__name__}")
    for position, item in enumerate(content[key]):
        where = f"{file}, {key}[{position}]"
        if not isinstance(item, dict):
            raise LabelError(f"{where}: expected an object, found {type(item).__name__}")
        yield item, where


def _integer(item: dict[str, Any], key: str, where: str) -> int:
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise LabelError(f"{where}: '{key}' is {value!r:.60}; it takes a whole number")
    return value


def _text(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise LabelError(f"{where}: '{key}' is {value!r:.60}; it takes text")
    return value
