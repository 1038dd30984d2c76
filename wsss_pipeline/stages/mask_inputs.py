"""From options and files to a stage's inputs: configuration, class set, images, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsss_pipeline.config import MaskConfig
from wsss_pipeline.methods import load_mask_config as load_config
from wsss_pipeline.data.classes import ClassSet, check_template, load_class_set
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.data.datasets import coco_inputs, voc_inputs
from wsss_pipeline.errors import ConfigError


@dataclass(frozen=True)
class MaskInputs:
    """Image id to file, image id to class names in order of appearance, and the class set of both."""

    images: Mapping[str, ImageFile]
    labels: Mapping[str, tuple[str, ...]]
    class_set: ClassSet


def read_inputs(
    *,
    images: Path | None = None,
    labels: Path | None = None,
    voc: Path | None = None,
    coco: Path | None = None,
    split: str | None = None,
    classes: str | None = None,
    templates: Sequence[str] = (),
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> tuple[MaskConfig, MaskInputs]:
    """Resolve the configuration and read the labels.

    ``voc`` and ``coco`` stand for images, labels and classes of a data set's own folder. ``flags``: dotted
    configuration key to value, as for ``load_config``.

    Raises:
        ConfigError: options that contradict each other or leave something out.
        ClassSetError, LabelError, ImageError: from reading the class set, the labels, the folder.
    """
    if sum(source is not None for source in (images, voc, coco)) != 1:
        raise ConfigError("give the images once: --images DIR, --voc ROOT or --coco ROOT")
    if (split is not None) == (images is not None):
        raise ConfigError("--split goes with --voc or --coco, and they need it, for example --split train")
    if labels is not None and images is None:
        raise ConfigError("--labels goes with --images; --voc and --coco bring their own labels")
    if preset is None and classes is None:
        classes = "voc12" if voc is not None else "coco14" if coco is not None else None
    config = load_config(
        preset,
        config_file,
        overrides,
        {"classes": classes, "templates": tuple(templates) or None, **(flags or {})},
    )
    for template in config.templates:
        check_template(template, "--template")
    if not config.classes:
        raise ConfigError("no classes given; use --classes cat,dog, --classes FILE.yaml or --preset NAME")
    class_set = load_class_set(config.classes)
    if images is not None:
        found = find_images(images)
        return config, MaskInputs(found, read_labels(labels, found, class_set), class_set)
    assert split is not None
    if voc is not None:
        return config, MaskInputs(*voc_inputs(voc, split, class_set), class_set)
    assert coco is not None
    return config, MaskInputs(*coco_inputs(coco, split, class_set), class_set)
