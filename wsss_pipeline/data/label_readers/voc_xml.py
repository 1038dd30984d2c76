"""Labels from PASCAL VOC annotation files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from wsss_pipeline.data.label_readers.label_table import LabelTable, read_text
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB

MOST_BYTES = 16 * MIB  # of the annotation of one image

# What a document type declares can make a parser blow up memory or read other files.
_DECLARATION = re.compile("<!(DOCTYPE|ENTITY)", re.IGNORECASE)


def fill_from_voc_folder(table: LabelTable, folder: Path) -> None:
    """All ``.xml`` files below the folder; the image id is the path of the file without its suffix."""
    try:
        files = sorted(file for file in folder.rglob("*.xml") if not file.name.startswith("."))
    except RecursionError as error:
        raise LabelError(
            f"{folder} holds folders that are nested too deep; name the one of the .xml files"
        ) from error
    if not files:
        raise LabelError(f"{folder} holds no .xml files; name a folder of VOC annotations or a label file")
    ids = (file.relative_to(folder).with_suffix("").as_posix() for file in files)
    fill_from_voc_files(table, zip(ids, files, strict=True))


def fill_from_voc_files(table: LabelTable, files: Iterable[tuple[str, Path]]) -> None:
    """Annotation files, each with the id of its image.

    Labels are the ``name`` of each ``object`` directly below the root, parts of objects not counted,
    objects marked difficult included, as the published code of CLIP-ES reads them.
    """
    for image, file in files:
        image_id = table.add_image(image, str(file))
        text = read_text(file, MOST_BYTES)
        if _DECLARATION.search(text):
            raise LabelError(f"{file}: declares a document type or entities, which isn't safe; remove that")
        try:
            root = ElementTree.fromstring(text)
        except (ElementTree.ParseError, ValueError) as error:
            raise LabelError(f"{file}: not valid XML: {error}") from error
        if root.tag != "annotation":
            raise LabelError(f"{file}: expected <annotation> as in PASCAL VOC, found <{root.tag:.40}>")
        for annotated in root.iterfind("object"):
            name = annotated.findtext("name", "").strip()
            if not name:
                raise LabelError(f"{file}: an <object> has no <name>; add it or remove the object")
            table.add_class(image_id, table.class_named(name, str(file)))
