"""Labels from Create ML's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.tables import text_of
from wsss_pipeline.errors import LabelError

_IMAGES = ("image", "imagefilename", "imageURL", "filename")
_ANNOTATIONS = ("annotations", "annotation")


def is_createml(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content is a list of objects with an image and its annotations."""
    first = content[0] if isinstance(content, list) and content else None
    return (
        isinstance(first, dict) and _key(first, _IMAGES) is not None and _key(first, _ANNOTATIONS) is not None
    )


def fill_from_createml(table: LabelTable, content: Any, file: Path) -> None:
    """``[{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": {...}}]}]``."""
    if not isinstance(content, list):
        raise LabelError(f"{file}: expected a list of images, found {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        where = f"{file}, record {number}"
        image = _key(record, _IMAGES) if isinstance(record, dict) else None
        annotations = _key(record, _ANNOTATIONS) if isinstance(record, dict) else None
        if image is None or annotations is None or not isinstance(record[annotations], list):
            raise LabelError(f"{where}: expected an object with 'image' and a list of 'annotations'")
        if not all(isinstance(annotation, dict) for annotation in record[annotations]):
            raise LabelError(f"{where}: an annotation that is no object")
        names = [text_of(annotation, "label", where) for annotation in record[annotations]]
        table.add_record(text_of(record, image, where), names, where)


def _key(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in record), None)
