"""Labels as one JSON object with an entry for each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.vectors import are_vectors, classes_in_vector, may_be_indices
from wsss_pipeline.errors import LabelError

_FORM = 'expected {"image_id": ["cat", "sofa"], ...}'


def is_json(content: Any, classes: ClassSet) -> bool:
    """Whether an entry holds names, or numbers that may be those of classes."""
    if not is_json_onehot(content, classes):
        return isinstance(content, dict)
    return may_be_indices(content.values(), classes)


def is_json_onehot(content: Any, classes: ClassSet) -> bool:
    """Whether each entry is a vector."""
    return isinstance(content, dict) and are_vectors(content.values(), classes)


def fill_from_json(table: LabelTable, content: Any, file: Path) -> None:
    """``{"image_id": ["cat", "sofa"]}``; for the list also one name, or ``{"cat": 1, "sofa": 0}``."""
    if not isinstance(content, dict):
        raise LabelError(f"{file}: {_FORM}, found {type(content).__name__}")
    listed = [value for value in content.values() if isinstance(value, list)]
    if listed and all(map(table.classes.find, content)) and not any(map(table.has_image, content)):
        names = [name for value in listed for name in value if isinstance(name, str)]
        if names and not any(map(table.classes.find, names)):
            raise LabelError(f"{file}: {_FORM}; here each key is a class, turn it round")
    for image, value in content.items():
        where = f"{file}, image {image!r:.80}"
        names = [value] if isinstance(value, str) else value
        if isinstance(value, dict):
            names = [name for name, is_present in value.items() if _is_present(is_present, name, where)]
        if not isinstance(names, list):
            raise LabelError(f"{where}: {_FORM}; its value is of type {type(names).__name__}, not a list")
        for name in names:
            if not isinstance(name, str):
                raise LabelError(f"{where}: {_FORM}; {name!r:.60} in its list isn't text")
        table.add_record(image, names, where)


def fill_from_json_onehot(table: LabelTable, content: Any, file: Path) -> None:
    """``{"image_id": [0, 1, 0]}``: for each class of the class set, in its order, 1 where it is present."""
    if not isinstance(content, dict):
        raise LabelError(f'{file}: expected {{"image_id": [0, 1, 0], ...}}, found {type(content).__name__}')
    for image, vector in content.items():
        where = f"{file}, image {image!r:.80}"
        table.add_record(image, classes_in_vector(vector, table.classes, where), where)


def _is_present(value: Any, name: str, where: str) -> bool:
    if value not in (0, 1) or isinstance(value, str):
        raise LabelError(
            f"{where}: {name!r:.60} is {value!r:.60}; write a list of names, or 1 for each class"
        )
    return bool(value)
