"""Labels from a COCO file: instances, or panoptic segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.errors import LabelError

_Number = int | str  # some tools write text


def is_coco(content: Any, classes: ClassSet) -> bool:
    """Whether the content of a JSON file has the lists of a COCO file; one without annotations has two of them."""
    return (
        isinstance(content, dict)
        and "images" in content
        and not {"annotations", "categories"}.isdisjoint(content)
    )


def fill_from_coco(table: LabelTable, content: Any, file: Path) -> None:
    """Labels of an image are the categories of its annotations, in their order; crowds are included.

    A panoptic file's annotations hold ``segments_info`` with a category each. Images come in the order of
    ``images``, those without annotations too; the image id is ``file_name`` without its suffix. Categories go by
    name or alias; one without a name by its number, where the class set holds COCO ids. A category that no
    annotation uses may be unknown.
    """
    images: dict[_Number, tuple[str, str, dict[str, None]]] = {}
    for image, where in _objects(content, "images", str(file)):
        number = _number(image, "id", where)
        if number in images:
            raise LabelError(f"{where}: id {number!r:.60} occurs twice; keep one of the images")
        name = image.get("file_name")
        if not isinstance(name, str):
            raise LabelError(f"{where}: 'file_name' is {name!r:.60}; it takes text")
        images[number] = name, where, {}
    categories = {
        _number(item, "id", where): (item, where)
        for item, where in _objects(content, "categories", str(file))
    }
    by_number = {entry.coco_id: entry.name for entry in table.classes.classes if entry.coco_id}
    names: dict[_Number, str] = {}
    for annotation, where in _objects(content, "annotations", str(file)):
        image_number = _number(annotation, "image_id", where)
        if image_number not in images:
            raise LabelError(
                f"{where}: image_id {image_number!r:.60} isn't among 'images'; the file is incomplete"
            )
        parts = [(annotation, where)]
        if "segments_info" in annotation:
            parts = list(_objects(annotation, "segments_info", where))
        for part, place in parts:
            number = _number(part, "category_id", place)
            if number not in names:
                if number not in categories:
                    raise LabelError(f"{place}: category_id {number!r:.60} isn't among 'categories'")
                category, listed = categories[number]
                name = category.get("name", by_number.get(number))  # type: ignore[arg-type]  # text is none of them
                if name is None and "name" not in category:
                    known = f"no class of '{table.classes.name}' has the coco_id {number}"
                    raise LabelError(f"{listed}: no 'name', and {known}")
                if not isinstance(name, str):
                    raise LabelError(f"{listed}: 'name' is {name!r:.60}; it takes text")
                table.class_named(name, listed)  # an unknown one is told with the place where it is listed
                names[number] = name
            images[image_number][2][names[number]] = None
    for name, where, found in images.values():
        table.add_record(name, found, where)


def _objects(content: Any, key: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list):
        kind = type(items).__name__ if isinstance(content, dict) and key in content else "nothing"
        raise LabelError(f"{where}: '{key}' takes a list, not {kind}")
    for position, item in enumerate(items):
        place = f"{where}, {key}[{position}]"
        if not isinstance(item, dict):
            raise LabelError(f"{place}: expected an object, found {type(item).__name__}")
        yield item, place


def _number(item: dict[str, Any], key: str, where: str) -> _Number:
    value = item.get(key)
    if type(value) not in (int, str):  # True is no whole number
        raise LabelError(f"{where}: '{key}' is {value!r:.60}; it takes a whole number or text")
    return value  # type: ignore[return-value]
