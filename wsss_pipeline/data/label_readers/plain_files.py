"""Labels as JSON, CSV and plain text."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from wsss_pipeline.data.label_readers.label_table import LabelTable, read_text
from wsss_pipeline.errors import LabelError

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def fill_from_json(table: LabelTable, content: Any, file: Path) -> None:
    """``{"image_id": ["cat", "sofa"]}``."""
    form = 'expected {"image_id": ["cat", "sofa"], ...}'
    if not isinstance(content, dict):
        raise LabelError(f"{file}: {form}, found {type(content).__name__}")
    for image, names in content.items():
        where = f"{file}, image {image!r:.80}"
        image_id = table.add_image(image, where)
        if not isinstance(names, list):
            raise LabelError(f"{where}: {form}; its value is of type {type(names).__name__}, not a list")
        for name in names:
            if not isinstance(name, str):
                raise LabelError(f"{where}: {form}; {name!r:.60} in its list isn't text")
            table.add_class(image_id, table.class_named(name, where))


def fill_from_csv(table: LabelTable, file: Path) -> None:
    """Header ``image,labels``, labels joined by ``;``; or header ``image,label``, one label a row.

    Rows of the same image add up. An empty cell adds no label. Further columns are passed over.
    """
    # line by line, for a copy of a large text takes as much memory again
    lines = (line.group() for line in _LINE.finditer(read_text(file)))
    rows = csv.reader(lines, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        column = next((name for name in ("labels", "label") if name in header), None)
        if "image" not in header or column is None:
            cells = ",".join(header)
            raise LabelError(f"{file} line 1: expected the header image,labels; found {cells!r:.80}")
        image_at, labels_at = header.index("image"), header.index(column)
        for row in rows:
            where = f"{file} line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= max(image_at, labels_at):
                raise LabelError(f"{where}: {len(row)} cells where the header has {len(header)}; add a comma")
            image_id = table.add_image(row[image_at].strip(), where)
            for name in row[labels_at].split(";"):
                if name.strip():
                    table.add_class(image_id, table.class_named(name, where))
    except csv.Error as error:
        raise LabelError(f"{file} line {rows.line_num}: not valid CSV: {error}") from error


def fill_from_txt(table: LabelTable, file: Path) -> None:
    """Lines ``image_id name name``, separated by white space; lines of the same image add up.

    A whole number stands for the class of that index, counted from 0 as the published lists of CLIP-ES
    do, unless a class has that very name. Image ids and class names with spaces can't be written in this
    form.
    """
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        image, *names = line.split()
        image_id = table.add_image(image, where)
        for name in names:
            table.add_class(image_id, table.class_named(name, where, or_numbered=True))
