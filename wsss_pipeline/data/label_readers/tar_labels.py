"""Labels that lie beside the images in WebDataset shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsss_pipeline.data.image_files import TarMember
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB, check_machine, parse_json

MOST_BYTES = MIB  # for the labels of one image


def fill_from_tar(table: LabelTable, labels: Mapping[str, TarMember]) -> None:
    """Image id to the ``NAME.json`` or ``NAME.cls`` beside its ``NAME.jpg``.

    ``.json``: a list of class names, or an object with such a list under ``labels``. ``.cls``: a class name or
    0-based index on each line.
    """
    for image, member in labels.items():
        if member.size > MOST_BYTES:
            raise LabelError(f"{member}: {member.size:,} bytes are too many for the labels of one image")
        try:
            text = member.read_bytes().decode("utf-8-sig")
            names: Any = [line for line in text.splitlines() if line.strip()]
            if member.name.endswith(".json"):
                content = parse_json(text)
                names = content.get("labels") if isinstance(content, dict) else content
        except (OSError, UnicodeDecodeError) as error:
            check_machine(error)
            raise LabelError(f"{member}: can't be read as UTF-8 text: {error}") from error
        except ValueError as error:
            raise LabelError(f"{member}: not valid JSON: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LabelError(f'{member}: expected ["cat", "sofa"] or {{"labels": ["cat", "sofa"]}}')
        table.add_record(image, names, str(member), or_numbered=True)
