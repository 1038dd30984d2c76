"""The demo's scenes on disk, laid out as PASCAL VOC lays out its images, labels and ground truth."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.runtime.output import keep_file

JPEG_QUALITY = 95


def write_voc_folder(
    root: Path, seed: int, scenes: dict[str, int], size: tuple[int, int] = (160, 120)
) -> None:
    """Draws scenes to ``JPEGImages``, ``Annotations``, ``SegmentationClass`` and ``ImageSets/Segmentation``.

    Writing the same folder again gives the same bytes: these are left alone, and nothing else is written over.

    Args:
        root: made where it doesn't exist.
        seed: seed of the scenes; no scene of one split is in another.
        size: width and height of the images.
        scenes: numbers by split, such as ``{"train": 200, "val": 100}``.

    Raises:
        OutputError: the folder can't be written, or holds other files of these names.
    """
    for number, (split, count) in enumerate(scenes.items()):
        ids = [f"{split}_{index:05d}" for index in range(count)]
        keep_file(root / f"ImageSets/Segmentation/{split}.txt", "".join(f"{i}\n" for i in ids).encode(), root)
        for index, image_id in enumerate(ids):
            scene = draw_scene((seed, number, index), *size)
            image, mask, xml = io.BytesIO(), io.BytesIO(), io.BytesIO()
            Image.fromarray(scene.image).save(image, "JPEG", quality=JPEG_QUALITY)
            indices = Image.fromarray(scene.mask)
            indices.putpalette(voc_palette().tobytes())  # makes mode P of mode L, values as they are
            indices.save(mask, "PNG")
            annotation = ElementTree.Element("annotation")
            ElementTree.SubElement(annotation, "filename").text = f"{image_id}.jpg"
            sides = ElementTree.SubElement(annotation, "size")
            for name, value in (("width", size[0]), ("height", size[1]), ("depth", 3)):
                ElementTree.SubElement(sides, name).text = str(value)
            for label in scene.labels:
                ElementTree.SubElement(ElementTree.SubElement(annotation, "object"), "name").text = label
            ElementTree.indent(annotation)
            ElementTree.ElementTree(annotation).write(xml, encoding="utf-8")
            for name, buffer in (
                (f"JPEGImages/{image_id}.jpg", image),
                (f"SegmentationClass/{image_id}.png", mask),
                (f"Annotations/{image_id}.xml", xml),
            ):
                keep_file(root / name, buffer.getvalue(), root)
