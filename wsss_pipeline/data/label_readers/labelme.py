"""Labels from LabelMe: a JSON file for each image, with flags of the image and labelled shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsss_pipeline.data.class_lists import is_no_class
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.label_readers.label_table import LabelTable, parse_json, read_text
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB

MOST_BYTES = 256 * MIB  # of the labels of one image, which may lie in them as text
LOOKED_AT = 3  # files, for whether they are LabelMe's


def is_labelme(content: Any, classes: ClassSet) -> bool:
    """Whether the content of a JSON file has what LabelMe writes."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def is_labelme_folder(files: Sequence[Path], classes: ClassSet) -> bool:
    """Whether one of the first JSON files is LabelMe's."""
    for file in [file for file in files if file.suffix.lower() == ".json"][:LOOKED_AT]:
        try:
            if is_labelme(_content(file), classes):
                return True
        except LabelError:  # some other file, which is none of the labels
            continue
    return False


def fill_from_labelme_folder(table: LabelTable, files: Sequence[Path], folder: Path) -> None:
    """LabelMe's JSON files below a folder."""
    for file in files:
        if file.suffix.lower() == ".json":
            _fill(table, _content(file), file.relative_to(folder).parent, file)


def fill_from_labelme(table: LabelTable, content: Any, file: Path) -> None:
    """One of LabelMe's JSON files."""
    _fill(table, content, Path(), file)


def _content(file: Path) -> Any:
    return parse_json(read_text(file, MOST_BYTES), str(file))


def _fill(table: LabelTable, content: Any, folder: Path, file: Path) -> None:
    """Labels are the flags that are true, then those of the shapes; ``__ignore__`` and ``_background_`` are none.

    The image is the one that ``imagePath`` names, looked for beside the JSON file; or, where there is no such
    image, the one called like the JSON file.
    """
    if not is_labelme(content, table.classes):
        raise LabelError(
            f"{file}: not a file of LabelMe's, which have 'shapes' and 'imagePath'; give a label file itself"
        )
    path, flags = content["imagePath"], content.get("flags") or {}
    if not isinstance(path, str) or not isinstance(flags, dict):
        raise LabelError(f"{file}: 'imagePath' takes text and 'flags' an object")
    names = [name for name, is_set in flags.items() if is_set is True]
    for number, shape in enumerate(content["shapes"], start=1):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str):
            raise LabelError(f"{file}, shape {number}: 'label' is {label!r:.60}; it takes text")
        names.append(label)
    named = (folder / path.replace("\\", "/").rpartition("/")[2]).as_posix()
    beside = (folder / file.stem).as_posix()
    image = named if table.has_image(named) or not table.has_image(beside) else beside
    if image == named and table.has_image(beside) and Path(named).stem != Path(beside).name:
        raise LabelError(
            f"{file}: 'imagePath' is {path!r:.80}, but there is an image {beside!r:.80} too; rename one"
        )
    table.add_record(image, [name for name in names if not is_no_class(name)], str(file))
