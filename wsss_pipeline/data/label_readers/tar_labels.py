"""Labels that lie beside the pictures in WebDataset shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.label_readers.plain_files import named_or_numbered
from wsss_pipeline.errors import LabelError

MOST_BYTES = 2**20


def has_labels(images: Mapping[str, ImageFile]) -> bool:
    """Whether any picture has labels beside it in its archive."""
    return any(isinstance(file, TarMember) and file.labels for file in images.values())


def fill_from_tar(table: LabelTable, images: Mapping[str, ImageFile]) -> None:
    """``NAME.json`` or ``NAME.cls`` of ``NAME.jpg``; a picture without either has no entry.

    ``.json``: a list of class names, or an object with such a list under ``labels``. ``.cls``: a class name or
    0-based index on each line.

    Raises:
        LabelError: another structure, or an unknown class.
    """
    for image_id, file in images.items():
        if isinstance(file, TarMember) and file.labels is not None:
            table.add_image(image_id, str(file))
            where = str(file.labels)
            for name in _names(file.labels, _text(file.labels)):
                table.add_class(image_id, named_or_numbered(table, name, where))


def _text(member: TarMember) -> str:
    if member.size > MOST_BYTES:
        raise LabelError(f"{member}: {member.size:,} bytes are too many for the labels of one image")
    try:
        return member.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{member}: can't be read as UTF-8 text: {error}") from error


def _names(member: TarMember, text: str) -> list[str]:
    if member.name.endswith(".cls"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"{member}: not valid JSON: {error}") from error
    names = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LabelError(f'{member}: expected ["cat", "sofa"] or {{"labels": ["cat", "sofa"]}}')
    return [name.strip() for name in names]
