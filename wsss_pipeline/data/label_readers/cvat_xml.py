"""Labels from CVAT's "for images" XML."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.voc_xml import check_undeclared
from wsss_pipeline.errors import LabelError


def is_cvat(text: str, classes: ClassSet) -> bool:
    """Whether XML begins as CVAT's does."""
    return (
        re.match(r"\s*(<\?xml[^>]*>)?\s*(<!--.*?-->\s*)*<annotations[\s>/]", text[:10_000], re.DOTALL)
        is not None
    )


def fill_from_cvat(table: LabelTable, text: str, file: Path) -> None:
    """Labels of an ``<image>`` are those of its tags, boxes, polygons, masks and so on; no tracks of videos."""
    check_undeclared(text, file)
    depth = 0
    root: ElementTree.Element | None = None
    try:
        for event, element in ElementTree.iterparse(io.StringIO(text), ("start", "end")):
            if event == "start":
                depth += 1
                if root is None:
                    root = element
                    if element.tag != "annotations":
                        raise LabelError(
                            f"{file}: expected <annotations> as in CVAT, found <{element.tag:.40}>"
                        )
                elif depth == 2 and element.tag == "track":
                    raise LabelError(f"{file}: holds tracks of a video; export it as 'CVAT for images'")
                continue
            depth -= 1
            if depth == 1:
                if element.tag == "image":
                    where = f"{file}, image {element.get('name') or element.get('id', '?')!r:.80}"
                    names = [shape.get("label", "") for shape in element if shape.get("label") is not None]
                    table.add_record(element.get("name", ""), names, where)
                if root is not None:
                    root.clear()  # or a million images stay in memory
    except (ElementTree.ParseError, ValueError) as error:
        raise LabelError(f"{file}: not valid XML: {error}") from error
