"""Labels from FiftyOne: ``labels.json`` of classification and detection data sets, ``samples.json`` of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.tables import text_of
from wsss_pipeline.errors import LabelError

# the key of the list in each kind of label that holds several
_LISTS = {"Classifications": "classifications", "Detections": "detections", "Polylines": "polylines"}
_LISTS |= {"Keypoints": "keypoints"}


def is_fiftyone_labels(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content has classes and the labels of images."""
    return (
        isinstance(content, dict)
        and {"classes", "labels"} == content.keys()
        and isinstance(content["labels"], dict)
    )


def is_fiftyone_samples(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content has samples, each with the path of a file."""
    samples = content.get("samples") if isinstance(content, dict) else None
    return isinstance(samples, list) and all(
        isinstance(item, dict) and "filepath" in item for item in samples
    )


def fill_from_fiftyone_labels(table: LabelTable, content: Any, file: Path) -> None:
    """``{"classes": ["cat"], "labels": {"image_id": ...}}``: classes by name, or by index among ``classes``."""
    if not is_fiftyone_labels(content, table.classes):
        raise LabelError(f"{file}: expected an object with 'classes' and 'labels', as FiftyOne writes it")
    classes = content["classes"] or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise LabelError(f"{file}: 'classes' takes a list of names")
    for image, value in content["labels"].items():
        where = f"{file}, image {image!r:.80}"
        names = []
        for target in value if isinstance(value, list) else [value]:
            label = target.get("label") if isinstance(target, dict) else target
            if type(label) is int:
                if label not in range(len(classes)):
                    raise LabelError(f"{where}: class {label!r:.40} isn't among the {len(classes)} 'classes'")
                names.append(classes[label])
            elif isinstance(label, str):
                names.append(label)
            elif label is not None or value is not None:
                raise LabelError(
                    f"{where}: a label is {label!r:.60}; it takes a name, or an index among 'classes'"
                )
        table.add_record(image, names, where)


def fill_from_fiftyone_samples(table: LabelTable, content: Any, file: Path) -> None:
    """``{"samples": [{"filepath": "data/a.jpg", "ground_truth": {"_cls": "Classification", "label": "cat"}}]}``.

    Labels lie in the one field of labels that the samples have; where they have several, nothing says which one.
    """
    if not is_fiftyone_samples(content, table.classes):
        raise LabelError(
            f"{file}: expected an object with 'samples', each with a 'filepath', as FiftyOne writes it"
        )
    samples = content["samples"]
    fields = dict.fromkeys(
        key
        for sample in samples
        for key, value in sample.items()
        if isinstance(value, dict) and _is_label(value)
    )
    if len(fields) != 1:
        found = " and ".join(f"{field!r:.40}" for field in list(fields)[:3]) or "none"
        raise LabelError(f"{file}: one field of labels is read, found {found}; export one with label_field")
    (field,) = fields
    for number, sample in enumerate(samples, start=1):
        where = f"{file}, sample {number}"
        value = sample.get(field) or {}
        if not isinstance(value, dict):
            raise LabelError(f"{where}: {field!r:.40} is {value!r:.60}")
        labels = value.get(_LISTS[value["_cls"]]) if value.get("_cls") in _LISTS else [value] if value else []
        if not isinstance(labels, list) or not all(isinstance(label, dict) for label in labels):
            raise LabelError(f"{where}: {field!r:.40} doesn't hold a list of labels")
        names = [text_of(label, "label", where) for label in labels]
        table.add_record(text_of(sample, "filepath", where), names, where)


def _is_label(value: dict[str, Any]) -> bool:
    return isinstance(value.get("_cls"), str) and value["_cls"] in {"Classification", *_LISTS}
