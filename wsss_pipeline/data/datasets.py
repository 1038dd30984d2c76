"""Images and labels of PASCAL VOC and MS COCO where their archives put them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import (
    IMAGE_SUFFIXES,
    MAX_ID_LENGTH,
    check_image_id,
    find_images,
    without_image_suffix,
)
from wsss_pipeline.data.label_readers.image_names import ImageNames, normalised, written_path
from wsss_pipeline.data.label_readers.label_table import (
    LabelTable,
    OtherClasses,
    parse_json,
    read_text,
    reading,
)
from wsss_pipeline.data.label_readers.voc_xml import fill_from_voc_files
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import LabelError
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

_LONGEST_LINE = 4 * MAX_ID_LENGTH  # of a list of images
_SUFFIX = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_TWO_PATHS = re.compile(rf"(.+?(?:{_SUFFIX}))(?:\s*,\s*|\s+)\S.*(?:{_SUFFIX})", re.IGNORECASE)

ImagesAndLabels = tuple[Mapping[str, ImageFile], dict[str, tuple[str, ...]]]


def voc_inputs(
    root: Path, split: str, classes: ClassSet | None = None, other_classes: OtherClasses = "error"
) -> ImagesAndLabels:
    """A split of PASCAL VOC: image id to file, and image id to class names where labels are known.

    ``ROOT/JPEGImages``, the ids in ``ROOT/ImageSets/Segmentation/SPLIT.txt`` (or ``ImageSets/Main``), labels
    of ``ROOT/Annotations/*.xml``; where that folder holds none, of ``ROOT/labels.json``, or of the lists
    ``ImageSets/Main/CLASS_SPLIT.txt``. An id without an
    image keeps the path where the image should be, so that reading it is reported.

    Args:
        root: such as ``VOCdevkit/VOC2012``.
        split: such as ``train_aug``.
        classes: ``voc12`` where None.
        other_classes: what becomes of other labels, see ``LabelTable``.

    Raises:
        LabelError: no such split (the message has those that exist), no labels, or labels that can't be read.
        ImageError: ``JPEGImages`` can't be read.
    """
    classes = classes or load_class_set("voc12")
    with reading(root):
        ids = read_split(_voc_split_file(root, split, classes))
        files = find_images(root / "JPEGImages")
        images = {image_id: files.get(image_id, root / "JPEGImages" / f"{image_id}.jpg") for image_id in ids}
        annotations = {image_id: root / "Annotations" / f"{image_id}.xml" for image_id in ids}
        if annotated := [(image_id, file) for image_id, file in annotations.items() if file.exists()]:
            table = LabelTable(images, classes, other_classes)
            fill_from_voc_files(table, annotated)
            return images, table.labels()
        source, lists = root / "labels.json", root / "ImageSets" / "Main"
        if not source.is_file():
            source = lists
            if not any((lists / f"{name}_{split}.txt").is_file() for name in classes.names):
                tried = f"{root / 'Annotations'}/*.xml, {root / 'labels.json'} nor {lists}/CLASS_{split}.txt"
                raise LabelError(f"no labels for this split: neither {tried}; give --labels")
        labels = read_labels(source, images, classes, other_classes=other_classes)
        return images, {image_id: names for image_id, names in labels.items() if image_id in images}


def coco_inputs(
    root: Path, split: str, classes: ClassSet | None = None, other_classes: OtherClasses = "error"
) -> ImagesAndLabels:
    """A split of MS COCO: image id to file, and image id to class names where labels are known.

    All images in ``ROOT/SPLIT`` (or ``ROOT/images/SPLIT``), labels of
    ``ROOT/annotations/instances_SPLIT.json``.

    Args:
        root: the folder that holds ``annotations``.
        split: such as ``train2014``.
        classes: ``coco14`` where None.
        other_classes: what becomes of other labels, see ``LabelTable``.

    Raises:
        LabelError: no such split (the message has those that exist), or labels that can't be read.
        ImageError: the image folder can't be read.
    """
    with reading(root):
        _check_split_name(split)
        labels = root / "annotations" / f"instances_{split}.json"
        if not labels.is_file():
            files = sorted((root / "annotations").glob("instances_*.json"))
            raise _no_split(labels, [file.stem.removeprefix("instances_") for file in files])
        folders = [folder for folder in (root / split, root / "images" / split) if folder.is_dir()]
        if not folders:
            tried = f"{root / split} nor {root / 'images' / split}"
            raise LabelError(f"no images for split '{split}': neither {tried}")
        images = find_images(folders[0])
        class_set = classes or load_class_set("coco14")
        return images, read_labels(labels, images, class_set, other_classes=other_classes)


def read_split(path: Path, known: Collection[str] = ()) -> list[str]:
    """Image ids from a list, in its order; duplicates and empty lines dropped.

    One a line, or a JSON list. An id may carry the suffix of its image; ``./`` before it is dropped, a backslash read
    as ``/``. Of two paths in a line, an image's and a mask's with a space or a comma between them, the first counts.
    A path that is none of the known ids stands for the one that it can mean, as in labels (``ImageNames.find``:
    ``data/images/a.jpg`` for ``a``); such lines are warned of.

    Args:
        path: the list.
        known: ids of the images that there are.

    Raises:
        LabelError: the file can't be read, holds no id, an unsafe one, a path that can mean two images, or paths in
            two folders that mean one.
    """
    text = read_text(path)
    if re.match(r'\s*\[\s*"', text):
        content = parse_json(text, str(path))
        if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
            raise LabelError(f"{path}: expected a list of image ids, each a text")
        lines = content
    else:
        lines = text.splitlines()
    ids: dict[str, str] = {}
    names = ImageNames(known)
    with FewWarnings(logger, "lines with folders that the images don't lie in") as longer:
        for number, line in enumerate(lines, start=1):
            where, line = f"{path} line {number}", line.strip()
            if not line:
                continue
            if len(line) > _LONGEST_LINE:
                check_image_id(line, where)
            pair = None if without_image_suffix(line) in known else _TWO_PATHS.fullmatch(line)
            first_word, _, last_word = line.rpartition(" ")
            if last_word in ("-1", "0", "1") and line not in known and first_word.rstrip() in known:
                raise LabelError(
                    f"{where}: -1 and 1 are how VOC lists the images of one class; give the list of the split, "
                    "such as train.txt"
                )
            text = pair[1] if pair else line
            written = without_image_suffix(text)
            if written not in known:
                written = without_image_suffix(written_path(text).removeprefix("/JPEGImages/"))
            # of a list of the whole set, what lies elsewhere stays what it is
            image_id = written if written in known else names.find(written, where) or written
            check_image_id(image_id, where)
            first = ids.setdefault(image_id, written)
            if first != written:
                raise LabelError(
                    f"{where}: '{one_line(first, 100)}' and '{one_line(written, 100)}' come to mean one image, "
                    f"'{one_line(image_id, 100)}'; write the paths below the image folder"
                )
            if normalised(image_id) != normalised(written):
                longer.warn(
                    "%s: '%s' is taken for '%s'", where, one_line(written, 100), one_line(image_id, 100)
                )
    if not ids:
        raise LabelError(f"{path}: holds no image id; write one a line")
    return list(ids)


def split_line(image_id: str) -> str | None:
    """The line by which ``read_split`` reads an image id; None where there is none: it begins with a space."""
    if image_id != image_id.lstrip():
        return None
    # a suffix of its own keeps one that belongs to the id, and a space at its end
    is_plain = image_id == image_id.rstrip() and without_image_suffix(image_id) == image_id
    return image_id if is_plain else f"{image_id}.png"


def _voc_split_file(root: Path, split: str, classes: ClassSet) -> Path:
    _check_split_name(split)
    folders = [root / "ImageSets" / "Segmentation", root / "ImageSets" / "Main"]
    for folder in folders:
        if (folder / f"{split}.txt").is_file():
            return folder / f"{split}.txt"
    for inner in ("VOC2012", "VOCdevkit/VOC2012"):
        if (root / inner / "ImageSets").is_dir():
            raise LabelError(f"{root} isn't the folder of the data set; did you mean {root / inner}?")
    segmentation, main = ({file.stem for file in folder.glob("*.txt")} for folder in folders)
    # Main also has lists of one class each, such as cat_train, with a second column.
    of_one_class = {f"{name}_{whole}" for name in classes.names for whole in main}
    raise _no_split(folders[0] / f"{split}.txt", sorted(segmentation | (main - of_one_class)))


def _check_split_name(split: str) -> None:
    if not re.fullmatch(r"[\w.-]+", split) or split.strip(".") == "":
        raise LabelError(f"split {split!r} isn't the name of a list; write it like train or train2014")


def _no_split(file: Path, existing: list[str]) -> LabelError:
    known = f"there are: {', '.join(existing)}" if existing else "nor is there any other; check the folder"
    return LabelError(f"no split list {file}; {known}")
