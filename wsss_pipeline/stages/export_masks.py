"""Masks for other programs: PNG, PASCAL VOC, NumPy, COCO."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_ids import check_image_id
from wsss_pipeline.data.masks import IGNORE, half_percent_threshold, ignore_value
from wsss_pipeline.errors import CacheRecordError, ConfigError, LabelError, MaskError, MissingDependencyError
from wsss_pipeline.pictures.overlays import index_png
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import MARK, check_apart, check_replaceable, keep_file, writing
from wsss_pipeline.runtime.progress import Progress

ExportFormat = Literal["png", "voc", "npz", "coco"]
COCO_FILE = "annotations.json"
MAX_COMPONENT_BYTES = 255  # of a file name, on the usual file systems
_REMEDY = "replace it with --overwrite, or choose another folder"

logger = logging.getLogger(__name__)


@dataclass
class ExportReport:
    """What ``export_masks`` did: images written, there already and equal, and failed ones with the reason.

    ``interrupted``: a request to stop came, and some are left.
    """

    written: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def export_masks(
    masks: MaskCache,
    out_dir: Path,
    format: ExportFormat,
    min_confidence: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write every mask below ``out_dir``; an image id ``a/b`` becomes folder ``a``, file ``b``. Shows how far it is.

    Args:
        masks: the mask set.
        out_dir: folder, made where it isn't there. Files that hold the same already are left alone.
        format: ``png``: class indices, mode L, with more than 254 classes of 16 bits. ``voc``: the same with PASCAL
            VOC's palette, mode P, for up to 254 classes. ``npz``:
            ``mask``, ``confidence``, ``labels`` and, where stored, ``cams``. ``coco``: ``annotations.json``,
            one for all, with a run-length encoding for each class of each image; the categories have the ids
            that the mask set's class set knows, else 1..C.
        min_confidence: threshold; pixels under it become 255, of 16 bits 65,535 (in COCO: belong to no class);
            None leaves all.
        overwrite: choice to replace files of an earlier export that hold something else.

    Returns:
        Counts. A record that can't be exported is reported in the log and counted.

    Raises:
        CacheRecordError: the mask set is empty.
        ConfigError: ``min_confidence`` isn't between 0 and 1, there is no such format, or ``out_dir`` and the
            mask set lie in each other.
        MissingDependencyError: ``coco`` needs pycocotools.
        OutputError: ``out_dir`` can't be written, or a file there holds something else.
    """
    check_apart(out_dir, "--out", {"--cache": masks.path})
    if not len(masks):
        raise CacheRecordError(f"cache {masks.path} holds no image yet; run generate-masks on it first")
    if min_confidence is not None:
        half_percent_threshold(min_confidence)  # refuses what isn't between 0 and 1, before any work
    if format not in get_args(ExportFormat):
        raise ConfigError(f"export format is '{format}'; choose one of {', '.join(get_args(ExportFormat))}")
    ignore = ignore_value(1 + len(masks.class_names))
    if format == "voc" and ignore != IGNORE:
        raise ConfigError(
            f"--format voc: a palette has 256 colours, and there are {len(masks.class_names):,} classes; "
            "--format png writes 16 bits"
        )
    if format == "coco":
        try:
            import pycocotools.mask
        except ImportError as error:
            raise MissingDependencyError(
                'format coco needs pycocotools; install it with: pip install "wsss-pipeline[export]"'
            ) from error
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    suffix = ".npz" if format == "npz" else ".png"
    if format == "coco":
        check_replaceable(out_dir / COCO_FILE)
    there = set()
    for image_id in masks if format != "coco" else ():
        with suppress(LabelError):
            target = _target(masks, image_id, out_dir, suffix)
            if os.path.lexists(target):
                check_replaceable(target)
                there.add(image_id)
    report = ExportReport()
    category_ids = masks.manifest.mask_set.category_ids or {}
    numbers = [category_ids.get(name, value) for value, name in enumerate(masks.class_names, start=1)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with StopRequest() as stop, Progress(len(masks)) as progress:
        # what is there comes first, so that nothing is written where some of it holds something else
        for image_id in sorted(masks, key=lambda image_id: image_id not in there):
            if stop.requested:
                report.interrupted = True
                return report
            try:
                target = _target(masks, image_id, out_dir, suffix)
                record = masks[image_id]
            except (LabelError, MaskError) as error:
                report.failed[image_id] = str(error)
                logger.warning("%s", error)
                progress.advance(failed=1)
                continue
            mask = record.mask if min_confidence is None else record.with_ignore(min_confidence)
            if format == "coco":
                height, width = mask.shape
                number = len(images) + 1
                images.append({"id": number, "file_name": image_id, "width": width, "height": height})
                for value in np.unique(mask[(mask != 0) & (mask != ignore)]):
                    region = pycocotools.mask.encode(np.asfortranarray(mask == value, dtype=np.uint8))
                    counts = region["counts"].decode("ascii")
                    annotation = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                    annotation["category_id"] = numbers[value - 1]
                    annotations.append(
                        annotation
                        | {
                            "segmentation": {"size": [height, width], "counts": counts},
                            "area": int(pycocotools.mask.area(region)),
                            "bbox": [float(side) for side in pycocotools.mask.toBbox(region)],
                        }
                    )
            else:
                content = index_png(mask, with_palette=format == "voc")
                if format == "npz":
                    arrays: dict[str, Any] = {"mask": mask, "confidence": record.confidence}
                    arrays["labels"] = np.array(record.labels, dtype=np.str_)
                    if record.cams is not None:
                        arrays["cams"] = record.cams
                    buffer = io.BytesIO()
                    np.savez_compressed(buffer, allow_pickle=False, **arrays)
                    with zipfile.ZipFile(buffer, "a") as archive:
                        archive.comment = MARK.encode()
                    content = buffer.getvalue()
                is_written = keep_file(target, content, out_dir, overwrite=overwrite, remedy=_REMEDY)
                report.written += is_written
                report.unchanged += not is_written
            progress.advance()
    if format == "coco":
        categories = [{"id": n, "name": name} for n, name in zip(numbers, masks.class_names, strict=True)]
        info = {"description": "pseudo masks", "contributor": MARK, "fingerprint": masks.identity}
        document = {"info": info, "images": images, "categories": categories, "annotations": annotations}
        content = json.dumps(document).encode("ascii")
        is_written = keep_file(out_dir / COCO_FILE, content, out_dir, overwrite=overwrite, remedy=_REMEDY)
        report.written, report.unchanged = (len(images), 0) if is_written else (0, len(images))
    return report


def _target(masks: MaskCache, image_id: str, out_dir: Path, suffix: str) -> Path:
    """The file of an image; a LabelError where its id makes none."""
    check_image_id(image_id, masks.description)
    if any(len(part.encode()) > MAX_COMPONENT_BYTES for part in f"{image_id}{suffix}".split("/")):
        raise LabelError(f"{masks.description}: image id '{image_id[:80]}...' is too long for a file name")
    return out_dir / f"{image_id}{suffix}"
