"""Labels from Label Studio: JSON, JSON-MIN and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.image_ids import without_image_suffix
from wsss_pipeline.data.label_readers.label_table import LabelTable, parse_json
from wsss_pipeline.data.label_readers.tables import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    CsvTable,
    column_of,
    plain_name,
)
from wsss_pipeline.errors import LabelError

# of an annotation, not of what is annotated
_OWN = frozenset(("id", "annotator", "annotationid", "createdat", "updatedat", "leadtime", "agreement"))
_CHOICES = ("choice", "choices")


def is_tasks(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content is a list of tasks with annotations."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and "data" in task for task in content)
        and ("annotations" in content[0] or "completions" in content[0])
    )


def is_json_min(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content is a list of annotations, each with the data of its task."""
    return (
        isinstance(content, list) and bool(content) and isinstance(content[0], dict) and _is_min(content[0])
    )


def is_csv(content: CsvTable, classes: ClassSet) -> bool:
    """Whether a CSV file has the columns of annotations."""
    return _is_min(content.header)


def _is_min(keys: Any) -> bool:
    return {"annotation_id", "lead_time"} <= set(keys)


def fill_from_tasks(table: LabelTable, content: Any, file: Path) -> None:
    """Tasks: choices and labels of shapes, in any annotation that wasn't cancelled; predictions are none."""
    if not isinstance(content, list):
        raise LabelError(f"{file}: expected a list of tasks, found {type(content).__name__}")
    for number, task in enumerate(content, start=1):
        where = f"{file}, task {number}"
        data = task.get("data") if isinstance(task, dict) else None
        annotations = task.get("annotations", task.get("completions")) if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise LabelError(f"{where}: expected an object with 'data' and 'annotations'; export it as JSON")
        names: list[str] = []
        for annotation in annotations:
            results = annotation.get("result") if isinstance(annotation, dict) else None
            if not isinstance(results, list):  # of exports that hold the numbers of annotations alone
                raise LabelError(f"{where}: an annotation without 'result'; export it as JSON")
            if annotation.get("was_cancelled") is not True:
                for result in results:
                    value = result.get("value") if isinstance(result, dict) else None
                    names += _labels(value, where) if isinstance(value, dict) else []
        table.add_record(_image(data, where), names, where)


def fill_from_json_min(table: LabelTable, content: Any, file: Path) -> None:
    """Annotations as JSON-MIN; those of the same image add up."""
    if not isinstance(content, list):
        raise LabelError(f"{file}: expected a list of annotations, found {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        where = f"{file}, annotation {number}"
        if not isinstance(record, dict):
            raise LabelError(f"{where}: expected an object, found {type(record).__name__}")
        _fill(table, record, where)


def fill_from_csv(table: LabelTable, content: CsvTable, file: Path) -> None:
    """Annotations as CSV, several labels as JSON in a cell; those of the same image add up."""
    for where, row in content.rows(range(len(content.header))):
        record: dict[str, Any] = dict(zip(content.header, row, strict=False))
        for key, cell in record.items():
            if cell.startswith(("{", "[")):
                record[key] = parse_json(cell, f"{where}, {key!r:.60}")
        _fill(table, record, where)


def _fill(table: LabelTable, record: dict[str, Any], where: str) -> None:
    names: list[str] = []
    for key, value in record.items():
        plain = plain_name(key)
        if isinstance(value, dict):
            names += _labels(value, where)
        elif isinstance(value, list):
            for part in value:
                if isinstance(part, dict):
                    names += _labels(part, where)
        elif isinstance(value, str) and value and (plain in LABEL_COLUMNS or plain in _CHOICES):
            names.append(value)
    data = {key: value for key, value in record.items() if plain_name(key) not in _OWN}
    table.add_record(_image(data, where), names, where, adds_up=True)


def _labels(value: dict[str, Any], where: str) -> list[str]:
    """Names under the keys ``choices``, ``labels``, ``rectanglelabels``, ``brushlabels`` and the like."""
    names: list[str] = []
    for key, labels in value.items():
        if key == "choices" or key.endswith("labels"):
            if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
                raise LabelError(f"{where}: {key!r:.60} is {labels!r:.60}; it takes a list of names")
            names += labels
    return names


def _image(data: dict[str, Any], where: str) -> str:
    """The one path of an image in the data of a task; else what stands under a key such as ``image``."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    paths = [text for text in texts.values() if without_image_suffix(text) != text]
    if len(paths) != 1:
        keys = list(texts)
        paths = [texts[keys[column_of("the image", keys, IMAGE_COLUMNS, None, where)]]]
    return paths[0]
