"""Images and labels of PASCAL VOC and MS COCO where their archives put them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import check_image_id, find_images, without_image_suffix
from wsss_pipeline.data.label_readers.label_table import LabelTable, read_text, reading
from wsss_pipeline.data.label_readers.voc_xml import fill_from_voc_files
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import LabelError


@dataclass(frozen=True)
class Inputs:
    """What a stage works on.

    Attributes:
        images: image id to file.
        labels: image id to class names; images without entry have no labels known.
        split: its name.
        ground_truth: folder of index masks, where the data set brings one.
    """

    images: dict[str, ImageFile]
    labels: dict[str, tuple[str, ...]]
    split: str
    ground_truth: Path | None


def voc_inputs(root: Path, split: str, classes: ClassSet | None = None) -> Inputs:
    """A split of PASCAL VOC.

    ``ROOT/JPEGImages``, the ids in ``ROOT/ImageSets/Segmentation/SPLIT.txt`` (or ``ImageSets/Main``), labels
    of ``ROOT/Annotations/*.xml``, or of ``ROOT/labels.json`` where that folder holds none. Ground truth is
    ``SegmentationClass``; for a split that ends in ``aug``, ``SegmentationClassAug`` where there is one.
    An id without a picture keeps the path where the picture should be, so that reading it is reported.

    Args:
        root: such as ``VOCdevkit/VOC2012``.
        split: such as ``train_aug``.
        classes: ``voc12`` where None.

    Raises:
        LabelError: no such split (the message has those that exist), no labels, or labels that can't be read.
        ImageError: ``JPEGImages`` can't be read.
    """
    classes = classes or load_class_set("voc12")
    with reading(root):
        return _voc_inputs(root, split, classes)


def _voc_inputs(root: Path, split: str, classes: ClassSet) -> Inputs:
    ids = read_split(_voc_split_file(root, split, classes))
    folder = root / "JPEGImages"
    found = find_images(folder)
    images = {image_id: found.get(image_id, folder / f"{image_id}.jpg") for image_id in ids}
    ground_truth = root / "SegmentationClass"
    if split.endswith("aug") and (root / "SegmentationClassAug").is_dir():
        ground_truth = root / "SegmentationClassAug"
    return Inputs(
        images, _voc_labels(root, images, classes), split, ground_truth if ground_truth.is_dir() else None
    )


def coco_inputs(root: Path, split: str, classes: ClassSet | None = None) -> Inputs:
    """A split of MS COCO.

    All pictures in ``ROOT/SPLIT`` (or ``ROOT/images/SPLIT``), labels of
    ``ROOT/annotations/instances_SPLIT.json``. COCO brings no index masks, so ``ground_truth`` is None.

    Args:
        root: the folder that holds ``annotations``.
        split: such as ``train2014``.
        classes: ``coco14`` where None.

    Raises:
        LabelError: no such split (the message has those that exist), or labels that can't be read.
        ImageError: the picture folder can't be read.
    """
    with reading(root):
        return _coco_inputs(root, split, classes or load_class_set("coco14"))


def _coco_inputs(root: Path, split: str, classes: ClassSet) -> Inputs:
    _check_split_name(split)
    labels = root / "annotations" / f"instances_{split}.json"
    folders = [folder for folder in (root / split, root / "images" / split) if folder.is_dir()]
    if not labels.is_file():
        files = sorted((root / "annotations").glob("instances_*.json"))
        raise _no_split(labels, [file.stem.removeprefix("instances_") for file in files])
    if not folders:
        raise LabelError(
            f"no pictures for split '{split}': neither {root / split} nor {root / 'images' / split}"
        )
    images = find_images(folders[0])
    return Inputs(images, read_labels(labels, images, classes), split, None)


def read_split(path: Path) -> list[str]:
    """Image ids from a list, one a line, in its order; duplicates and empty lines dropped.

    An id may carry the suffix of its picture. Lines of VOC's augmented lists, as many code bases pass them
    on (``/JPEGImages/ID.jpg /SegmentationClassAug/ID.png``), stand for the id in them.

    Raises:
        LabelError: the file can't be read, holds no id or an unsafe one.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    ids = dict.fromkeys(
        check_image_id(_listed_id(line.strip()), f"{path} line {number}")
        for number, line in lines
        if line.strip()
    )
    if not ids:
        raise LabelError(f"{path}: holds no image id; write one a line")
    return list(ids)


def _listed_id(line: str) -> str:
    folder = "/JPEGImages/"
    if line.startswith(folder):
        line = line.split()[0].removeprefix(folder)
    return without_image_suffix(line)


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


def _voc_labels(root: Path, images: dict[str, ImageFile], classes: ClassSet) -> dict[str, tuple[str, ...]]:
    annotations = root / "Annotations"
    files = [(image_id, annotations / f"{image_id}.xml") for image_id in images]
    files = [(image_id, file) for image_id, file in files if file.is_file()]
    if files:
        table = LabelTable(images, classes)
        fill_from_voc_files(table, files)
        return table.labels()
    if (root / "labels.json").is_file():
        labels = read_labels(root / "labels.json", images, classes)
        return {image_id: names for image_id, names in labels.items() if image_id in images}
    raise LabelError(
        f"no labels for this split: neither {annotations}/*.xml nor {root / 'labels.json'}; give --labels"
    )


def _check_split_name(split: str) -> None:
    if not re.fullmatch(r"[\w.-]+", split) or split.strip(".") == "":
        raise LabelError(f"split {split!r} isn't the name of a list; write it like train or train2014")


def _no_split(file: Path, existing: list[str]) -> LabelError:
    known = (
        f"there are: {', '.join(existing)}"
        if existing
        else "no other split is there either; check the folder"
    )
    return LabelError(f"no split list {file}; {known}")
