"""Labels from YOLO and Darknet: a text file for each image, and a list of the names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wsss_pipeline.config import read_yaml, yaml_mapping
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable, begins_with, read_text
from wsss_pipeline.errors import ConfigError, LabelError
from wsss_pipeline.files import MIB

MOST_BYTES = 16 * MIB  # of the labels of one image
LOOKED_AT = 20  # files, for what form they are of
_LISTS = ("classes.txt", "obj.names", "_darknet.labels")
_LABELS_FOLDER = re.compile("((?:.*/)?)labels/(.*)")  # the last of that name
_SHAPE = re.compile(r"([0-9]{1,9})((?:\s+[-+.0-9eE]{1,40}){4,})\s*")


def is_yolo(files: Sequence[Path], classes: ClassSet) -> bool:
    """Whether one of the first text files begins with a class number and the numbers of a box or polygon."""
    return any(begins_with(_SHAPE, file, MOST_BYTES) for file in _label_files(files)[:LOOKED_AT])


def fill_from_yolo(table: LabelTable, files: Sequence[Path], folder: Path) -> None:
    """Lines ``class x y width height`` or ``class x y x y ...``; an empty file is an image without labels.

    Names come from ``names`` in ``data.yaml`` (or the one other ``.yaml``), or from ``classes.txt`` or ``obj.names``,
    in the folder or one of the two above it. The image is called like the text file; where that lies below
    ``labels``, below ``images`` or by itself. With folders called ``labels``, or ``obj_..._data``, text files
    elsewhere are passed over.
    """
    names, origin = _names(folder)
    for file in _label_files(files):
        image = file.relative_to(folder).with_suffix("").as_posix()
        if found := _LABELS_FOLDER.fullmatch(image):
            image = f"{found[1]}images/{found[2]}"
            if table.has_image(found[2]) and not table.has_image(image):
                image = found[2]
        present: dict[str, None] = {}
        for number, line in enumerate(read_text(file, MOST_BYTES).splitlines(), start=1):
            if not line.strip():
                continue
            found = _SHAPE.fullmatch(line)
            if found is None:
                raise LabelError(
                    f"{file} line {number}: expected a class number, then those of a box or polygon"
                )
            index = int(found[1])
            if index not in names:
                raise LabelError(
                    f"{file} line {number}: class number {index}; {origin} has {len(names)} names"
                )
            present[names[index]] = None
        table.add_record(image, present, str(file))


def _label_files(files: Sequence[Path]) -> list[Path]:
    texts = [
        file for file in files if file.suffix.lower() == ".txt" and not file.name.lower().startswith("readme")
    ]
    inside = [
        file for file in texts if any(re.fullmatch("labels|obj_.*data", part) for part in file.parts[:-1])
    ]
    return [file for file in inside or texts if file.name not in _LISTS]


def _names(folder: Path) -> tuple[dict[int, str], Path]:
    """Class number to name, and the file that says so."""
    for place in (folder, *list(folder.absolute().parents)[:2]):
        listed = [place / name for name in ("data.yaml", *_LISTS) if (place / name).is_file()]
        listed = listed or sorted(place.glob("*.yaml"))
        if len(listed) > 1:
            raise LabelError(
                f"{listed[0]} and {listed[1]} may both hold the names of YOLO's classes; keep one of them"
            )
        if listed:
            return _names_in(listed[0]), listed[0]
    raise LabelError(
        f"{folder}: no data.yaml, classes.txt or obj.names in it or above it that names YOLO's classes"
    )


def _names_in(file: Path) -> dict[int, str]:
    if file.suffix != ".yaml":
        lines = read_text(file, MOST_BYTES).splitlines()
        return {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    try:
        names = yaml_mapping(read_yaml(file, str(file)), str(file)).get("names")
    except ConfigError as error:
        raise LabelError(str(error)) from error
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not all(
        type(number) is int and isinstance(name, str) for number, name in numbered.items()
    ):
        raise LabelError(f"{file}: 'names' takes a list of names, or numbers with a name each")
    return numbered
