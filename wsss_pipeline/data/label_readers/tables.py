"""Labels in the columns of a table: CSV with any usual separator, or records in JSON."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.vectors import are_vectors, classes_in_vector, may_be_indices
from wsss_pipeline.errors import LabelError

# columns by their names in small letters, without spaces, hyphens and underscores
IMAGE_COLUMNS = frozenset(
    [
        *("image", "imageid", "imageindex", "imagename", "imagepath", "imagefile", "img"),
        *("file", "filename", "filepath", "path", "fname", "id"),
    ]
)
ONE_LABEL_COLUMNS = frozenset(
    ["label", "labelname", "class", "classname", "category", "categoryname", "tag"]
)  # a row for each label
LABELS_COLUMNS = frozenset(
    ["labels", "classes", "categories", "tags", "findinglabels", "objects"]
)  # a row for each image
# how sure the label of a row is; OpenImages lists with 0 what an image was looked through for in vain
CONFIDENCE_COLUMNS = frozenset(["confidence", "score", "probability"])
LABEL_COLUMNS = ONE_LABEL_COLUMNS | LABELS_COLUMNS
BITS = {text: bit for bit, texts in enumerate(("0 0.0 false", "1 1.0 true")) for text in texts.split()}
NO_LABEL_COLUMN = "unlabeled"  # of Roboflow's: 1 where no other column is

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
MOST_COLUMNS = 10_000
_DELIMITERS = ",\t;|"


def plain_name(column: str) -> str:
    """Name of a column in small letters, without spaces, hyphens and underscores."""
    return re.sub("[ _-]", "", column.strip().casefold())


class CsvTable:
    """Rows of a CSV file, whose cells are separated by that of comma, tab, semicolon and bar that its header fits.

    Attributes:
        header: cells of the first line.
        is_known: True where the header names the columns of an image and of labels.
        file: where it came from.
    """

    def __init__(self, text: str, file: Path, classes: ClassSet) -> None:
        self.file, self._text = file, text
        headers = {}
        for delimiter in _DELIMITERS:
            try:
                headers[delimiter] = next(self._rows(delimiter), (1, []))[1]
            except LabelError:
                headers[delimiter] = []
        if (most := max(map(len, headers.values()))) > MOST_COLUMNS:
            raise LabelError(f"{file} line 1: {most:,} columns; at most {MOST_COLUMNS:,} are read")
        fitting = [
            mark for mark, header in headers.items() if has_names(header) or has_onehot(header, classes)
        ]
        self.is_known = bool(fitting)
        if len(fitting) > 1:
            marks = " or ".join(map(repr, fitting))
            raise LabelError(f"{file} line 1: its cells may be separated by {marks}; use one of them alone")
        self._delimiter = (fitting or list(headers))[0]
        self.header = [cell.strip() for cell in headers[self._delimiter]]

    def rows(self, needed: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
        """File and line, and the cells, of each row below the header that isn't empty.

        Raises:
            LabelError: a row lacks one of the columns that are needed, or isn't CSV.
        """
        rows = self._rows(self._delimiter)
        next(rows, None)
        for number, row in rows:
            where = f"{self.file} line {number}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= max(needed):
                mark = {",": "a comma", "\t": "a tab"}.get(self._delimiter, repr(self._delimiter))
                raise LabelError(
                    f"{where}: {len(row)} cells where the header has {len(self.header)}; add {mark}"
                )
            yield where, row

    def _rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        # line by line, for a copy of a large text takes as much memory again
        lines = (line.group() for line in _LINE.finditer(self._text))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                if rows.line_num == 1 and row and re.fullmatch("sep=[,\t;|]?", row[0]):
                    continue  # by which a spreadsheet is told the separator
                yield rows.line_num, row
        except csv.Error as error:
            raise LabelError(f"{self.file} line {rows.line_num}: not valid CSV: {error}") from error


def has_names(header: Sequence[str]) -> bool:
    """Whether the columns are those of an image and of names."""
    plain = set(map(plain_name, header))
    return not plain.isdisjoint(IMAGE_COLUMNS) and not plain.isdisjoint(LABEL_COLUMNS)


def has_onehot(header: Sequence[str], classes: ClassSet) -> bool:
    """Whether a column is that of an image, and another is called like a class."""
    images = [column for column in header if plain_name(column) in IMAGE_COLUMNS]
    named = [column for column in header if classes.find(column.strip())]
    return bool(images and named and (len(images) > 1 or images != named))


def is_csv(content: CsvTable, classes: ClassSet) -> bool:
    """Whether a CSV file has a column for the image and one for labels."""
    return has_names(content.header)


def is_onehot_csv(content: CsvTable, classes: ClassSet) -> bool:
    """Whether a CSV file has a column for the image, and another that is called like a class."""
    return has_onehot(content.header, classes)


def fill_from_csv(table: LabelTable, content: CsvTable, file: Path) -> None:
    """A column for the image and one for its labels.

    Under ``labels`` and other plurals a row stands for an image, under ``label`` and other singulars rows of the
    same image add up. Labels in a cell are joined by ``;``, ``|`` or ``,``, under ``tags`` also by spaces. An
    empty cell, and NIH's ``No Finding``, add no label. Of rows with one label those count whose ``confidence`` is 1,
    where there is such a column. Further columns are passed over.
    """
    header = content.header
    if not has_names(header):
        cells = ",".join(header)
        raise LabelError(
            f"{file} line 1: expected the header image,labels, or image and a column a class; found {cells!r:.80}"
        )
    image_at = column_of("the image", header, IMAGE_COLUMNS, table.classes, f"{file} line 1")
    labels_at = column_of("its labels", header, LABEL_COLUMNS, table.classes, f"{file} line 1")
    column = plain_name(header[labels_at])
    sure_at = [at for at, name in enumerate(header) if plain_name(name) in CONFIDENCE_COLUMNS]
    sure_at = sure_at if column in ONE_LABEL_COLUMNS else []
    for where, row in content.rows((image_at, labels_at, *sure_at)):
        cell = row[labels_at].strip()
        if not all(_is_sure(row[at].strip(), header[at], where) for at in sure_at):
            cell = ""
        if column == "findinglabels" and cell == "No Finding":
            cell = ""
        names = names_in_cell(table.classes, cell, spaces=column == "tags")
        table.add_record(row[image_at].strip(), names, where, adds_up=column in ONE_LABEL_COLUMNS)


def fill_from_onehot_csv(table: LabelTable, content: CsvTable, file: Path) -> None:
    """A column for the image and one for each class, with 1 where it is present, else 0.

    A column that isn't called like a class, but holds nothing else than 0 and 1 either, is an unknown class; other
    columns are passed over.
    """
    header, classes = content.header, table.classes
    if not has_onehot(header, classes):
        cells = ",".join(header)
        raise LabelError(
            f"{file} line 1: expected a column for the image and one for each class; found {cells!r:.80}"
        )
    image_at = column_of("the image", header, IMAGE_COLUMNS, classes, f"{file} line 1")
    others = [at for at, column in enumerate(header) if at != image_at and column]
    named = [at for at in others if classes.find(header[at])]
    unnamed = {at for at in others if at not in named and plain_name(header[at]) != NO_LABEL_COLUMN}
    for where, row in content.rows((image_at, *named)):
        names = []
        for at in named:
            bit = BITS.get(row[at].strip().lower())
            if bit is None:
                raise LabelError(f"{where}: {header[at]!r:.60} is {row[at].strip()!r:.60}; it takes 0 or 1")
            if bit:
                names.append(header[at])
        unnamed = {at for at in unnamed if at < len(row) and row[at].strip().lower() in BITS}
        table.add_record(row[image_at].strip(), names, where)
    for at in sorted(unnamed):
        table.class_named(header[at], f"{file} line 1")


def is_records(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content is a list of objects, with a key for labels, or none called like a class."""
    return _are_objects(content) and (
        has_names(list(content[0])) or not has_onehot(list(content[0]), classes)
    )


def _is_sure(value: str, column: str, where: str) -> bool:
    """Whether a row's label counts; a LabelError where its confidence is neither 0 nor 1."""
    bit = BITS.get(value.lower())
    if bit is None:
        raise LabelError(
            f"{where}: {column!r:.60} is {value!r:.60}; keep the rows whose labels are to count, without that column"
        )
    return bool(bit)


def is_onehot_records(content: Any, classes: ClassSet) -> bool:
    """Whether JSON content is a list of objects with a key for the image and one that is called like a class."""
    return _are_objects(content) and has_onehot(list(content[0]), classes)


def fill_from_records(table: LabelTable, content: Any, file: Path) -> None:
    """``[{"file_name": "a.jpg", "labels": ["cat", "sofa"]}]``, keys as the columns of ``fill_from_csv``.

    Labels: a name or several in one text, a list of names, a list of zeros and ones, ``{"cat": 1}``, or objects, each
    with a label: ``{"objects": {"category": ["cat"]}}`` or ``[{"label": "cat"}]``.
    """
    records = _objects(content, file)
    keys = list(dict.fromkeys(key for _, record in records for key in record))
    if not has_names(keys):
        raise LabelError(
            f'{file}: expected records like {{"file_name": "a.jpg", "labels": ["cat"]}}; found {",".join(keys)!r:.80}'
        )
    image = keys[column_of("the image", keys, IMAGE_COLUMNS, table.classes, str(file))]
    labels = keys[column_of("its labels", keys, LABEL_COLUMNS, table.classes, str(file))]
    values = [record.get(labels) for _, record in records]
    is_onehot = are_vectors(values, table.classes)
    if is_onehot and may_be_indices(values, table.classes):  # type: ignore[arg-type]  # vectors, each a list
        raise LabelError(
            f"{file}: its lists of numbers may be indices of classes, or have a number a class; write names"
        )
    sure = [key for key in keys if plain_name(key) in CONFIDENCE_COLUMNS]
    sure = sure if plain_name(labels) in ONE_LABEL_COLUMNS else []
    for where, record in records:
        if labels not in record:
            raise LabelError(f"{where}: no {labels!r:.60}; write [] where there is none")
        if is_onehot:
            names = classes_in_vector(record[labels], table.classes, where)
        else:
            names = _names(record[labels], table.classes, where, spaces=plain_name(labels) == "tags")
        if not all(_is_sure(str(record.get(key)), key, where) for key in sure):
            names = []
        adds_up = plain_name(labels) in ONE_LABEL_COLUMNS
        table.add_record(text_of(record, image, where), names, where, adds_up=adds_up)


def fill_from_onehot_records(table: LabelTable, content: Any, file: Path) -> None:
    """``[{"file_name": "a.jpg", "cat": 1, "sofa": 0}]``."""
    records = _objects(content, file)
    keys = list(dict.fromkeys(key for _, record in records for key in record))
    image = keys[column_of("the image", keys, IMAGE_COLUMNS, table.classes, str(file))]
    named = [key for key in keys if key != image and table.classes.find(key)]
    for where, record in records:
        for key in named:
            if not isinstance(record.get(key), (int, float)) or record[key] not in (0, 1):
                raise LabelError(f"{where}: {key!r:.60} is {record.get(key)!r:.60}; it takes 0 or 1")
        table.add_record(text_of(record, image, where), [key for key in named if record[key]], where)
    for key in keys:
        if key not in named and plain_name(key) != NO_LABEL_COLUMN and key != image:
            values = [record.get(key) for _, record in records]
            if all(isinstance(value, (int, float)) and value in (0, 1) for value in values):
                table.class_named(key, str(file))


def column_of(
    what: str, header: Sequence[str], known: frozenset[str], classes: ClassSet | None, where: str
) -> int:
    """Place of the one column whose name is known; one that is also called like a class only where it is alone.

    Raises:
        LabelError: none, or several.
    """
    found = [at for at, column in enumerate(header) if plain_name(column) in known]
    if len(found) > 1 and classes is not None:
        found = [at for at in found if not classes.find(header[at])] or found
    if not found:
        raise LabelError(f"{where}: no column for {what}; found {','.join(header)!r:.80}")
    if len(found) > 1:
        columns = " and ".join(f"{header[at]!r:.40}" for at in found[:3])
        raise LabelError(f"{where}: the columns {columns} may each hold {what}; keep one of them")
    return found[0]


def names_in_cell(
    classes: ClassSet, cell: str, *, spaces: bool = False, separators: str = ";|,"
) -> list[str]:
    """Names of classes in a text: all of it where that is one, else what stands between separators.

    A list in brackets and quotes, as programs print one, is taken for what is in it. White space separates only
    where ``spaces`` says so and each part is a class.
    """
    cell = cell.strip()
    if not cell:
        return []
    if classes.find(cell):
        return [cell]
    if cell[0] == "[" and cell[-1] == "]":
        parts = [part.strip().strip("'\"") for part in cell[1:-1].split(",")]
        return [part for part in parts if part]
    for at, separator in enumerate(separators):
        if separator in cell:
            parts = cell.split(separator)
            further = separators[at + 1 :]
            return [
                name
                for part in parts
                for name in names_in_cell(classes, part, spaces=spaces, separators=further)
            ]
    words = cell.split()
    return words if spaces and all(map(classes.find, words)) else [cell]


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """A value that has to be text; a LabelError where it isn't."""
    value = record.get(key)
    if not isinstance(value, str):
        raise LabelError(f"{where}: {key!r:.60} is {value!r:.60}; it takes text")
    return value


def _are_objects(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(item, dict) for item in content)


def _objects(content: Any, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each record of a list, and its place for messages."""
    if not isinstance(content, list):
        raise LabelError(f"{file}: expected a list of records, found {type(content).__name__}")
    objects = []
    for number, record in enumerate(content, start=1):
        if not isinstance(record, dict):
            raise LabelError(f"{file}, record {number}: expected an object, found {type(record).__name__}")
        objects.append((f"{file}, record {number}", record))
    return objects


def _names(value: Any, classes: ClassSet, where: str, *, spaces: bool = False) -> list[str]:
    """Names in a value of a record."""
    if value is None:
        return []
    if isinstance(value, str):
        return names_in_cell(classes, value, spaces=spaces)
    if isinstance(value, list):
        return [name for item in value for name in ([item] if isinstance(item, str) else _one(item, where))]
    if isinstance(value, dict):
        within = [key for key in value if plain_name(key) in LABEL_COLUMNS]
        if within:
            inner = value[within[0]]
            if len(within) == 1 and isinstance(inner, list) and all(isinstance(name, str) for name in inner):
                return inner
        elif all(isinstance(bit, (int, float)) and bit in (0, 1) for bit in value.values()):
            return [name for name, bit in value.items() if bit]
    raise LabelError(f"{where}: labels are {value!r:.60}, which don't say the names of classes; write names")


def _one(item: Any, where: str) -> list[str]:
    """The name in an object of a list."""
    names = (
        [item[key] for key in item if plain_name(key) in ONE_LABEL_COLUMNS] if isinstance(item, dict) else []
    )
    if len(names) != 1 or not isinstance(names[0], str):
        raise LabelError(
            f"{where}: {item!r:.60} among its labels doesn't say the name of a class; write names"
        )
    return names
