"""Masks for other programs: PNG, PASCAL VOC, NumPy, COCO."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.image_ids import check_image_id
from wsss_pipeline.data.masks import IGNORE, MaskSource, PseudoMask, half_percent_threshold
from wsss_pipeline.errors import ConfigError, ImageError, LabelError, MaskError, MissingDependencyError
from wsss_pipeline.pictures.overlays import index_png
from wsss_pipeline.runtime.output import write_file, writing
from wsss_pipeline.runtime.progress import Progress

ExportFormat = Literal["png", "voc", "npz", "coco"]
COCO_FILE = "annotations.json"
MAX_COMPONENT_BYTES = 255  # of a file name, on the usual file systems

logger = logging.getLogger(__name__)


class ListedMasks(MaskSource, Protocol):
    """Masks by image id, whose ids are known: a ``MaskCache``."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...


@dataclass
class ExportReport:
    """What ``export_masks`` did: images written, found equal already, and failed ones with the reason."""

    written: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def export_masks(
    masks: ListedMasks,
    out_dir: Path,
    format: ExportFormat,
    min_confidence: float | None = None,
    category_ids: Mapping[str, int] | None = None,
) -> ExportReport:
    """Write every mask below ``out_dir``; an image id ``a/b`` becomes folder ``a``, file ``b``. Shows how far it is.

    Args:
        masks: where they come from.
        out_dir: folder, made where it isn't there. Files that hold the same already are left alone.
        format: ``png``: class indices, mode L. ``voc``: the same with PASCAL VOC's palette, mode P. ``npz``:
            ``mask``, ``confidence``, ``labels`` and, where stored, ``cams``. ``coco``: ``annotations.json``,
            one for all, with a run-length encoding for each class of each image.
        min_confidence: pixels under it become 255 (in COCO: belong to no class); None leaves all.
        category_ids: class name to its id in COCO's file; None numbers the classes 1..C.

    Returns:
        Counts. A record that can't be exported is reported in the log and counted.

    Raises:
        ConfigError: ``min_confidence`` isn't between 0 and 1, or there is no such format.
        MissingDependencyError: ``coco`` needs pycocotools.
        OutputError: ``out_dir`` can't be written.
    """
    if min_confidence is not None:
        half_percent_threshold(min_confidence)  # refuses what isn't between 0 and 1, before any work
    if format not in ("png", "voc", "npz", "coco"):
        raise ConfigError(f"export format is '{format}'; choose one of png, voc, npz, coco")
    if format == "coco":
        try:
            import pycocotools.mask
        except ImportError as error:
            raise MissingDependencyError(
                'format coco needs pycocotools; install it with: pip install "wsss-pipeline[export]"'
            ) from error
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    report = ExportReport()
    numbers = [category_ids[name] if category_ids else n for n, name in enumerate(masks.class_names, 1)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with Progress(len(masks)) as progress:
        for image_id in masks:
            try:
                check_image_id(image_id, masks.description)
                name = f"{image_id.rpartition('/')[2]}.png"
                if any(len(part.encode()) > MAX_COMPONENT_BYTES for part in (*image_id.split("/"), name)):
                    raise LabelError(
                        f"{masks.description}: image id '{image_id[:80]}...' is too long for a file name"
                    )
                pseudo_mask = masks[image_id]
            except (LabelError, MaskError, ImageError) as error:
                report.failed[image_id] = str(error)
                logger.warning("%s", error)
                progress.advance(failed=1)
                continue
            mask = pseudo_mask.mask if min_confidence is None else pseudo_mask.with_ignore(min_confidence)
            if format == "coco":
                height, width = mask.shape
                number = len(images) + 1
                images.append({"id": number, "file_name": image_id, "width": width, "height": height})
                for value in np.unique(mask[(mask != 0) & (mask != IGNORE)]):
                    encoded = pycocotools.mask.encode(np.asfortranarray(mask == value, dtype=np.uint8))
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": numbers[value - 1],
                            "segmentation": {
                                "size": [height, width],
                                "counts": encoded["counts"].decode("ascii"),
                            },
                            "area": int(pycocotools.mask.area(encoded)),
                            "bbox": [float(side) for side in pycocotools.mask.toBbox(encoded)],
                            "iscrowd": 0,
                        }
                    )
            else:
                content = _npz(pseudo_mask, mask) if format == "npz" else index_png(mask, format == "voc")
                is_written = _write(out_dir / f"{image_id}.{'npz' if format == 'npz' else 'png'}", content)
                report.written += is_written
                report.unchanged += not is_written
            progress.advance()
    if format == "coco":
        document = {
            "info": {"description": "pseudo masks", "fingerprint": masks.identity},
            "images": images,
            "categories": [
                {"id": n, "name": name} for n, name in zip(numbers, masks.class_names, strict=True)
            ],
            "annotations": annotations,
        }
        is_written = _write(out_dir / COCO_FILE, json.dumps(document).encode("ascii"))
        report.written, report.unchanged = (len(images), 0) if is_written else (0, len(images))
    return report


def _npz(pseudo_mask: PseudoMask, mask: NDArray[np.uint8]) -> bytes:
    arrays: dict[str, NDArray[Any]] = {
        "mask": mask,
        "confidence": pseudo_mask.confidence,
        "labels": np.array(pseudo_mask.labels, dtype=np.str_),
    }
    if pseudo_mask.cams is not None:
        arrays["cams"] = pseudo_mask.cams
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> bool:
    """Write a file; False where it holds that already."""
    with writing(path.parent):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
    write_file(path, content, durable=False)
    return True
