"""Image-level labels, in any of the forms that people have them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from wsss_pipeline.config import LabelFormat
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.data.label_readers import (
    coco_instances,
    createml,
    cvat_xml,
    fiftyone,
    json_object,
    label_studio,
    labelme,
    onehot_npy,
    tables,
    text_lines,
    voc_lists,
    voc_xml,
    yolo,
)
from wsss_pipeline.data.label_readers.label_table import (
    LabelTable,
    OtherClasses,
    parse_json,
    read_text,
    reading,
)
from wsss_pipeline.data.label_readers.tar_labels import fill_from_tar
from wsss_pipeline.errors import ConfigError, LabelError
from wsss_pipeline.files import GIT_LFS_POINTER

Kind = Literal["folder", "json", "csv", "text", "xml", "npy"]

_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".xml": "xml",
    ".npy": "npy",
}


class _Format(NamedTuple):
    """A form of labels.

    Attributes:
        name: name that ``--labels-format`` takes; several share it where one tool writes several.
        kind: kind of content that is recognised and read; of a folder, its ``.xml``, ``.json`` and ``.txt`` files.
        fits: answer to whether that content, with these classes, may be of this form.
        fill: reader that fills a table with the content of a path.
        is_general: True where the content has no mark of a tool's, so that forms that have one come first.
    """

    name: LabelFormat
    kind: Kind
    fits: Callable[[Any, ClassSet], bool]
    fill: Callable[[LabelTable, Any, Path], None]
    is_general: bool = False


# where none fits, the first of a kind says what is wrong
_FORMATS = (
    _Format("json", "json", json_object.is_json, json_object.fill_from_json, is_general=True),
    _Format(
        "json-onehot", "json", json_object.is_json_onehot, json_object.fill_from_json_onehot, is_general=True
    ),
    _Format("records", "json", tables.is_records, tables.fill_from_records, is_general=True),
    _Format(
        "records-onehot", "json", tables.is_onehot_records, tables.fill_from_onehot_records, is_general=True
    ),
    _Format("coco", "json", coco_instances.is_coco, coco_instances.fill_from_coco),
    _Format("createml", "json", createml.is_createml, createml.fill_from_createml),
    _Format("fiftyone", "json", fiftyone.is_fiftyone_labels, fiftyone.fill_from_fiftyone_labels),
    _Format("fiftyone", "json", fiftyone.is_fiftyone_samples, fiftyone.fill_from_fiftyone_samples),
    _Format("label-studio", "json", label_studio.is_tasks, label_studio.fill_from_tasks),
    _Format("label-studio", "json", label_studio.is_json_min, label_studio.fill_from_json_min),
    _Format("labelme", "json", labelme.is_labelme, labelme.fill_from_labelme),
    _Format("csv", "csv", tables.is_csv, tables.fill_from_csv, is_general=True),
    _Format("csv-onehot", "csv", tables.is_onehot_csv, tables.fill_from_onehot_csv, is_general=True),
    _Format("label-studio", "csv", label_studio.is_csv, label_studio.fill_from_csv),
    _Format("txt", "text", text_lines.is_text, text_lines.fill_from_text),
    _Format("txt-onehot", "text", text_lines.is_onehot_text, text_lines.fill_from_onehot_text),
    _Format("voc-xml", "xml", voc_xml.is_voc_xml, voc_xml.fill_from_voc_xml),
    _Format("cvat", "xml", cvat_xml.is_cvat, cvat_xml.fill_from_cvat),
    _Format("npy", "npy", lambda *_: True, onehot_npy.fill_from_npy),
    _Format("voc-xml", "folder", voc_xml.is_voc_folder, voc_xml.fill_from_voc_folder),
    _Format("labelme", "folder", labelme.is_labelme_folder, labelme.fill_from_labelme_folder),
    _Format("yolo", "folder", yolo.is_yolo, yolo.fill_from_yolo),
    _Format("voc-lists", "folder", voc_lists.is_voc_lists, voc_lists.fill_from_voc_lists),
)


def read_labels(
    path: Path | None,
    images: Mapping[str, ImageFile],
    classes: ClassSet,
    form: LabelFormat | None = None,
    other_classes: OtherClasses = "error",
) -> dict[str, tuple[str, ...]]:
    """Image id to class names, in order of appearance, duplicates dropped.

    What the source says and no more: an image that it doesn't mention has no entry, an id without an
    image keeps its own, and an image that is listed without labels has an empty one.

    Args:
        path: a file or folder in one of the forms that docs/inputs.md lists, or None: the labels beside the images in
            tar archives; without such the first folder below the image folder names the class of an image.
        images: image id to file, as ``find_images`` gives it. Ids in the source match them with or
            without the suffix of the image.
        classes: names and aliases that may occur.
        form: name of the form; None for the one that the content shows.
        other_classes: what becomes of other labels, see ``LabelTable``.

    Raises:
        LabelError: the source can't be read, is in no known form or may be in two, is empty, has no class for any
            image, holds an unsafe image id or an unknown class, or contradicts itself.
        ConfigError: a form without a path, or no such form.
    """
    table = LabelTable(images, classes, other_classes)
    if path is None:
        if form is not None:
            raise ConfigError("--labels-format goes with --labels")
        beside = {
            image_id: file.labels
            for image_id, file in images.items()
            if isinstance(file, TarMember) and file.labels is not None
        }
        fill_from_tar(table, beside)
        if not beside:
            for image_id, file in images.items():
                folder, slash, _ = image_id.partition("/")
                if not slash:
                    raise LabelError(
                        f"{file}: lies in no class folder; give --labels, or a folder for each class"
                    )
                table.add_record(image_id, [folder], str(file))
        return table.labels()
    if form is not None and form not in get_args(LabelFormat):
        raise ConfigError(f"no labels format {form!r:.60}; known: {', '.join(get_args(LabelFormat))}")
    with reading(path), table.repeated:
        kind, content = _content(path, classes, form)
        of_kind = [known for known in _FORMATS if known.kind == kind and form in (None, known.name)]
        if not of_kind:
            raise LabelError(
                f"{path}: a {kind if kind == 'folder' else f'{kind} file'} is never in the form {form}"
            )
        fitting = [known for known in of_kind if known.fits(content, classes)]
        fitting = [known for known in fitting if not known.is_general] or fitting
        if kind == "folder" and (not content or (form is None and not fitting)):
            forms = "no .xml files of VOC, .json of LabelMe, .txt of YOLO or lists of VOC's ImageSets/Main"
            raise LabelError(f"{path} holds {forms}; name a folder of labels or a label file")
        if len(fitting) > 1 and form is None:
            names = " or ".join(dict.fromkeys(known.name for known in fitting))
            raise LabelError(f"{path}: may be labels in the form {names}; say which with --labels-format")
        (fitting or of_kind)[0].fill(table, content, path)
    labels = table.labels()
    if not labels:
        raise LabelError(f"{path}: holds no image; check --labels")
    if not any(labels.values()):
        raise LabelError(
            f"{path}: names {len(labels):,} images and no class of any, as a list of images does; check --labels"
        )
    return labels


def _content(path: Path, classes: ClassSet, form: str | None) -> tuple[Kind, Any]:
    """Kind of a source, by its suffix and, where that says little, by how it begins; and what it holds."""
    if path.is_dir():
        return "folder", _files_below(path)
    suffix = path.suffix.lower()
    if suffix not in _KINDS and form is None:
        if not path.exists():
            raise LabelError(f"label file {str(path)!r} doesn't exist; check --labels")
        raise LabelError(
            f"{path}: labels are read from .json, .csv, .txt or a folder of .xml, .json or .txt files, and more that "
            f"docs/inputs.md lists; save it as one of {' '.join(_KINDS)}, or give --labels-format"
        )
    kind = _KINDS.get(suffix, "text")
    if kind == "npy" or form == "npy":
        return "npy", onehot_npy.read_npy(path)
    text = read_text(path)
    if text.startswith(GIT_LFS_POINTER):
        raise LabelError(f"{path}: a pointer of Git LFS in place of the file; fetch it with git lfs pull")
    if kind == "text":
        if re.match(r'\s*[\[{]\s*["\[{]', text):
            kind = "json"
        elif re.match(r"\s*<[?!a-z]", text):
            kind = "xml"
    if kind == "json":
        return kind, _json(text, path, suffix)
    if kind in ("text", "csv"):
        table = tables.CsvTable(text, path, classes)
        if kind == "csv" or table.is_known:
            return "csv", table
    return kind, text


def _json(text: str, path: Path, suffix: str) -> Any:
    """JSON; JSON lines as a list, by the suffix or where the first line is an object by itself."""
    is_lines = suffix in (".jsonl", ".ndjson")
    first, _, rest = text.strip().partition("\n")
    if not is_lines and rest:
        try:
            is_lines = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            is_lines = False
    if not is_lines:
        return parse_json(text, str(path))
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder that may hold labels, sorted; those whose names begin with a dot are passed over."""
    try:
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in (".xml", ".json", ".txt") and not file.name.startswith(".")
        )
    except RecursionError as error:
        raise LabelError(
            f"{folder} holds folders that are nested too deep; name the one of the labels"
        ) from error
    return files
