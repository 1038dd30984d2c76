"""Labels as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.vectors import are_vectors, classes_in_vector, may_be_indices
from wsss_pipeline.errors import LabelError

_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def is_onehot_text(text: str, classes: ClassSet) -> bool:
    """Whether the image of each line is followed by a vector."""
    return are_vectors(_vectors(text), classes)


def is_text(text: str, classes: ClassSet) -> bool:
    """Whether the lines may hold names or indices: all but vectors that can't be indices."""
    return not is_onehot_text(text, classes) or may_be_indices(_vectors(text), classes)


def fill_from_text(table: LabelTable, text: str, file: Path) -> None:
    """Lines ``image_id name name``, separated by white space.

    A whole number stands for the class of that index, counted from 0 as the published lists of CLIP-ES
    do, unless a class has that very name. Image ids and class names with spaces can't be written in this
    form. Where no line has more than one name, lines of the same image add up.
    """
    adds_up = all(len(words) <= 2 for _, words in _lines(text))
    for number, (image, *names) in _lines(text):
        where = f"{file} line {number}"
        if "-1" in names and table.classes.find("-1") is None:
            raise LabelError(
                f"{where}: -1 and 1 are how VOC lists the images of one class; give the folder ImageSets/Main"
            )
        if not names and any(map(table.classes.find, image.split(",")[1:])):
            raise LabelError(
                f"{where}: {image!r:.60} has commas; write spaces, or a .csv with header image,labels"
            )
        table.add_record(image, names, where, adds_up=adds_up, or_numbered=True)


def fill_from_onehot_text(table: LabelTable, text: str, file: Path) -> None:
    """Lines ``image_id 0 1 0``: for each class of the class set, in its order, 1 where it is present."""
    for number, (image, *cells) in _lines(text):
        where = f"{file} line {number}"
        names = classes_in_vector([_BITS.get(cell, cell) for cell in cells], table.classes, where)
        table.add_record(image, names, where)


def _vectors(text: str) -> Iterator[list[Any]]:
    return ([_BITS.get(cell, cell) for cell in cells] for _, (_, *cells) in _lines(text))


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that isn't empty."""
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.split():
            yield number, words
