"""Labels from the lists of PASCAL VOC: ``ImageSets/Main``, a text file for each class and split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import MOST_BYTES, LabelTable, begins_with, read_text
from wsss_pipeline.errors import LabelError

_LINE = re.compile(r"\s*(\S+)\s+(-1|0|1)\s*")


def is_voc_lists(files: Sequence[Path], classes: ClassSet) -> bool:
    """Whether the first text file that is called like a list of one class begins like one."""
    file = next((file for file in files if file.suffix.lower() == ".txt" and "_" in file.stem), None)
    return file is not None and begins_with(_LINE, file, MOST_BYTES)


def fill_from_voc_lists(table: LabelTable, files: Sequence[Path], folder: Path) -> None:
    """Lines ``image_id 1`` in ``cat_train.txt``: present; 0, present but difficult, counts too; -1, absent.

    Files without ``_`` in their names list a whole split, and are passed over.
    """
    said: dict[tuple[str, str], tuple[bool, str]] = {}
    for file in files:
        name, underscore, _ = file.stem.rpartition("_")
        if not underscore or file.suffix.lower() != ".txt":
            continue
        table.class_named(name, str(file))
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if line.strip():
                where = f"{file} line {number}"
                found = _LINE.fullmatch(line)
                if found is None:
                    raise LabelError(f"{where}: expected an image id and -1, 0 or 1; found {line!r:.60}")
                is_present = found[2] != "-1"
                before, first = said.setdefault((name, found[1]), (is_present, where))
                if before != is_present:
                    raise LabelError(
                        f"{first} and {where}: '{name:.60}' is present in one and absent in the other"
                    )
                table.add_record(found[1], [name] if is_present else [], where, adds_up=True)
