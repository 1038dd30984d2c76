"""Labels as vectors: a number for each class of the class set, in its order, 1 where the class is present."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.errors import LabelError


def are_vectors(values: Iterable[Any], classes: ClassSet) -> bool:
    """Whether all values are lists of zeros and ones, equally many: as many as classes, or with one of them twice.

    Of the second kind are vectors for other classes; lists of indices name none twice.
    """
    length, repeats = 0, False
    for value in values:
        if not isinstance(value, list) or not value or not all(map(_is_bit, value)):
            return False
        if length not in (0, len(value)):
            return False
        length, repeats = len(value), repeats or len(set(value)) < len(value)
    return length > 0 and (repeats or length == len(classes.classes))


def may_be_indices(vectors: Iterable[list[Any]], classes: ClassSet) -> bool:
    """Whether each vector may also be a list of indices of classes: none twice, none beyond the last."""
    count = len(classes.classes)
    return all(
        len(set(vector)) == len(vector) and all(number in range(count) for number in vector)
        for vector in vectors
    )


def classes_in_vector(vector: Any, classes: ClassSet, where: str) -> list[str]:
    """Names of the classes that a vector gives 1.

    Raises:
        LabelError: not a list of numbers, of another length than the class set, or other numbers than 0 and 1.
    """
    count = len(classes.classes)
    if not isinstance(vector, list):
        raise LabelError(f"{where}: expected {count} numbers, found {type(vector).__name__}")
    if len(vector) == count + 1:
        raise LabelError(
            f"{where}: {count + 1} numbers for the {count} classes of '{classes.name}': the first or the last may "
            "be the background's, or the classes are others; leave the background's out"
        )
    if len(vector) != count:
        raise LabelError(
            f"{where}: {len(vector)} numbers for the {count} classes of '{classes.name}'; check --classes"
        )
    if wrong := [number for number in vector if not _is_bit(number)]:
        raise LabelError(f"{where}: {wrong[0]!r:.60} among its numbers; each takes 0 or 1")
    return [name for name, number in zip(classes.names, vector, strict=True) if number]


def _is_bit(value: Any) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)
