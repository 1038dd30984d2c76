"""Labels from PASCAL VOC annotation files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable, read_text
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB

MOST_BYTES = 16 * MIB  # of the annotation of one image

# What a document type declares can make a parser blow up memory or read other files.
_DECLARATION = re.compile("<!(DOCTYPE|ENTITY)", re.IGNORECASE)


def is_voc_xml(text: str, classes: ClassSet) -> bool:
    """Whether XML begins as VOC's does."""
    return re.match(r"\s*(<\?xml[^>]*>)?\s*<annotation[\s>/]", text[:1000]) is not None


def is_voc_folder(files: Sequence[Path], classes: ClassSet) -> bool:
    """Whether a folder holds XML."""
    return any(file.suffix.lower() == ".xml" for file in files)


def fill_from_voc_folder(table: LabelTable, files: Sequence[Path], folder: Path) -> None:
    """All ``.xml`` files below the folder; the image id is the path of the file without its suffix."""
    annotations = [file for file in files if file.suffix.lower() == ".xml"]
    ids = (file.relative_to(folder).with_suffix("").as_posix() for file in annotations)
    fill_from_voc_files(table, zip(ids, annotations, strict=True))


def fill_from_voc_files(table: LabelTable, files: Iterable[tuple[str, Path]]) -> None:
    """Annotation files, each with the id of its image."""
    for image, file in files:
        _fill(table, image, read_text(file, MOST_BYTES), file)


def fill_from_voc_xml(table: LabelTable, text: str, file: Path) -> None:
    """One annotation file, called like its image."""
    _fill(table, file.stem, text, file)


def _fill(table: LabelTable, image: str, text: str, file: Path) -> None:
    """Labels are the ``name`` of each ``object`` directly below the root, parts of objects not counted,
    objects marked difficult included, as the published code of CLIP-ES reads them.
    """
    check_undeclared(text, file)
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise LabelError(f"{file}: not valid XML: {error}") from error
    if root.tag != "annotation":
        hint = "; give CVAT's file itself" if root.tag == "annotations" else ""
        raise LabelError(f"{file}: expected <annotation> as in PASCAL VOC, found <{root.tag:.40}>{hint}")
    names = [annotated.findtext("name", "").strip() for annotated in root.iterfind("object")]
    if not all(names):
        raise LabelError(f"{file}: an <object> has no <name>; add it or remove the object")
    table.add_record(image, names, str(file))


def check_undeclared(text: str, file: Path) -> None:
    """A LabelError where XML declares a document type or entities."""
    if _DECLARATION.search(text):
        raise LabelError(f"{file}: declares a document type or entities, which isn't safe; remove that")
