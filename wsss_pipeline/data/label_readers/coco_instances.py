"""Labels from a COCO instances file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from wsss_pipeline.data.classes import ClassEntry
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.errors import LabelError

Value = TypeVar("Value", int, str)


def is_coco_instances(content: Any) -> bool:
    """Whether the content of a JSON file has the three lists of a COCO instances file."""
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def fill_from_coco(table: LabelTable, content: dict[str, Any], file: Path) -> None:
    """Labels of an image are the categories of its annotations, in their order; crowds are included.

    Images come in the order of ``images``, those without annotations too; the image id is ``file_name``
    without its suffix. Categories go by name or alias; one without a name by its number, where the class
    set holds COCO ids. A category that no annotation uses may be unknown.
    """
    image_ids: dict[int, str] = {}
    for image, where in _objects(content, "images", file):
        number = _value(image, "id", int, where)
        if number in image_ids:
            raise LabelError(f"{where}: id {number} occurs twice; keep one of the images")
        image_ids[number] = table.add_image(_value(image, "file_name", str, where), where)
    categories = {
        _value(item, "id", int, where): (item, where) for item, where in _objects(content, "categories", file)
    }
    by_number = {entry.coco_id: entry for entry in table.classes.classes}
    entries: dict[int, ClassEntry] = {}
    for annotation, where in _objects(content, "annotations", file):
        image_number = _value(annotation, "image_id", int, where)
        if image_number not in image_ids:
            raise LabelError(f"{where}: image_id {image_number} isn't among 'images'; the file is incomplete")
        number = _value(annotation, "category_id", int, where)
        if number not in entries:
            if number not in categories:
                raise LabelError(f"{where}: category_id {number} isn't among 'categories'")
            category, listed = categories[number]
            if "name" in category:
                entries[number] = table.class_named(_value(category, "name", str, listed), listed)
            elif number in by_number:
                entries[number] = by_number[number]
            else:
                known = f"no class of '{table.classes.name}' has the coco_id {number}"
                raise LabelError(f"{listed}: no 'name', and {known}")
        table.add_class(image_ids[image_number], entries[number])


def _objects(content: dict[str, Any], key: str, file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if not isinstance(content[key], list):
        raise LabelError(f"{file}: '{key}' takes a list, not {type(content[key]).__name__}")
    for position, item in enumerate(content[key]):
        where = f"{file}, {key}[{position}]"
        if not isinstance(item, dict):
            raise LabelError(f"{where}: expected an object, found {type(item).__name__}")
        yield item, where


def _value(item: dict[str, Any], key: str, kind: type[Value], where: str) -> Value:
    value = item.get(key)
    if type(value) is not kind:  # True is no whole number
        wanted = "text" if kind is str else "a whole number"
        raise LabelError(f"{where}: '{key}' is {value!r:.60}; it takes {wanted}")
    return value
