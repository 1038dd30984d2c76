"""Image-level labels, in any of the forms that people have them in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.data.label_readers.coco_instances import fill_from_coco, is_coco_instances
from wsss_pipeline.data.label_readers.label_table import LabelTable, read_json, reading
from wsss_pipeline.data.label_readers.plain_files import fill_from_csv, fill_from_json, fill_from_txt
from wsss_pipeline.data.label_readers.tar_labels import fill_from_tar
from wsss_pipeline.data.label_readers.voc_xml import fill_from_voc_folder
from wsss_pipeline.errors import LabelError


def read_labels(
    path: Path | None, images: Mapping[str, ImageFile], classes: ClassSet
) -> dict[str, tuple[str, ...]]:
    """Image id to class names, in order of appearance, duplicates dropped.

    What the source says and no more: an image that it doesn't mention has no entry, an id without an
    image keeps its own, and an image that is listed without labels has an empty one.

    Args:
        path: ``.json`` (``{"image_id": ["cat", "sofa"]}`` or COCO instances), ``.csv`` (header
            ``image,labels`` or ``image,label``), ``.txt`` (lines ``image_id name name``), a folder of VOC
            XML files, or None: the labels beside the images in tar archives; without such the first folder
            below the image folder names the class of an image.
        images: image id to file, as ``find_images`` gives it. Ids in the source match them with or
            without the suffix of the image.
        classes: names and aliases that may occur.

    Raises:
        LabelError: the source can't be read, is empty, or holds an unsafe image id or an unknown class.
    """
    table = LabelTable(images, classes)
    if path is None:
        beside = {
            image_id: file.labels
            for image_id, file in images.items()
            if isinstance(file, TarMember) and file.labels is not None
        }
        fill_from_tar(table, beside)
        if not beside:
            for image_id, file in images.items():
                folder, slash, _ = image_id.partition("/")
                if not slash:
                    raise LabelError(
                        f"{file}: lies in no class folder; give --labels, or a folder for each class"
                    )
                table.add_class(table.add_image(image_id, str(file)), table.class_named(folder, str(file)))
        return table.labels()
    with reading(path):
        suffix = path.suffix.lower()
        if path.is_dir():
            fill_from_voc_folder(table, path)
        elif suffix == ".json":
            content = read_json(path)
            fill = fill_from_coco if is_coco_instances(content) else fill_from_json
            fill(table, content, path)
        elif suffix == ".csv":
            fill_from_csv(table, path)
        elif suffix == ".txt":
            fill_from_txt(table, path)
        elif path.exists():
            raise LabelError(f"{path}: labels are read from .json, .csv, .txt or a folder of VOC .xml files")
        else:
            raise LabelError(f"label file {str(path)!r} doesn't exist; check --labels")
    labels = table.labels()
    if not labels:
        raise LabelError(f"{path}: holds no image; check --labels")
    return labels
