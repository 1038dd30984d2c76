"""Masks for other programs: PNG, PASCAL VOC, NumPy, COCO."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.cache.mask_cache import MaskCache
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_ids import check_image_id
from wsss_pipeline.data.masks import IGNORE, PseudoMask, half_percent_threshold
from wsss_pipeline.errors import (
    CacheRecordError,
    ConfigError,
    LabelError,
    MissingDependencyError,
)
from wsss_pipeline.runtime.output import write_file, writing

ExportFormat = Literal["png", "voc", "npz", "coco"]
COCO_FILE = "annotations.json"
MAX_COMPONENT_BYTES = 255  # of a file name, on the usual file systems

logger = logging.getLogger(__name__)


@dataclass
class ExportReport:
    """What ``export_masks`` did: images written, found equal already, and failed ones with the reason."""

    written: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def export_masks(
    cache: MaskCache,
    out_dir: Path,
    format: ExportFormat,
    min_confidence: float | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> ExportReport:
    """Write every mask of a cache below ``out_dir``; an image id ``a/b`` becomes folder ``a``, file ``b``.

    Args:
        cache: where the masks come from.
        out_dir: folder, made where it isn't there. Files that hold the same already are left alone.
        format: ``png``: class indices, mode L. ``voc``: the same with PASCAL VOC's palette, mode P. ``npz``:
            ``mask``, ``confidence``, ``labels`` and, where stored, ``cams``. ``coco``: ``annotations.json``,
            one for all, with a run-length encoding for each class of each image.
        min_confidence: pixels under it become 255 (in COCO: belong to no class); None leaves all.
        progress: gets the image ids and yields them while it shows how far the run is.

    Returns:
        Counts. A record that can't be exported is reported in the log and counted.

    Raises:
        ConfigError: ``min_confidence`` isn't between 0 and 1, or there is no such format.
        MissingDependencyError: ``coco`` needs pycocotools.
        OutputError: ``out_dir`` can't be written.
    """
    if min_confidence is not None:
        half_percent_threshold(min_confidence)  # refuses what isn't between 0 and 1, before any work
    if format == "coco":
        return _export_coco(cache, out_dir, min_confidence, progress)
    if format not in ("png", "voc", "npz"):
        raise ConfigError(f"export format is '{format}'; choose one of png, voc, npz, coco")
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    report = ExportReport()
    for image_id, pseudo_mask in _records(cache, progress, report):
        mask = _mask(pseudo_mask, min_confidence)
        content = _npz(pseudo_mask, mask) if format == "npz" else _png(mask, with_palette=format == "voc")
        path = out_dir / f"{image_id}.{'npz' if format == 'npz' else 'png'}"
        if _is_written(path, content):
            report.written += 1
        else:
            report.unchanged += 1
    return report


def _records(
    cache: MaskCache, progress: Callable[[Sequence[str]], Iterable[str]], report: ExportReport
) -> Iterator[tuple[str, PseudoMask]]:
    """Ids that can be paths, with their records; the others go into the report."""
    for image_id in progress(list(cache)):
        try:
            check_image_id(image_id, f"cache {cache.path}")
            name = f"{image_id.rpartition('/')[2]}.png"
            if any(len(part.encode()) > MAX_COMPONENT_BYTES for part in (*image_id.split("/"), name)):
                raise LabelError(
                    f"cache {cache.path}: image id '{image_id[:80]}...' is too long for a file name"
                )
            record = cache[image_id]
        except (LabelError, CacheRecordError) as error:
            report.failed[image_id] = str(error)
            logger.warning("%s", error)
            continue
        yield image_id, record


def _mask(pseudo_mask: PseudoMask, min_confidence: float | None) -> NDArray[np.uint8]:
    return pseudo_mask.mask if min_confidence is None else pseudo_mask.with_ignore(min_confidence)


def _png(mask: NDArray[np.uint8], *, with_palette: bool) -> bytes:
    image = Image.fromarray(mask)
    if with_palette:
        image.putpalette(voc_palette().tobytes(), "RGB")  # makes mode P of mode L, values as they are
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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


def _is_written(path: Path, content: bytes) -> bool:
    """Write a file; False where it holds that already."""
    with writing(path.parent):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content, durable=False)
    return True


def _export_coco(
    cache: MaskCache,
    out_dir: Path,
    min_confidence: float | None,
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> ExportReport:
    try:
        from pycocotools import mask as run_lengths
    except ImportError as error:
        raise MissingDependencyError(
            'format coco needs pycocotools; install it with: pip install "wsss-pipeline[export]"'
        ) from error
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    report = ExportReport()
    category_ids = _category_ids(cache)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, pseudo_mask in _records(cache, progress, report):
        mask = _mask(pseudo_mask, min_confidence)
        height, width = mask.shape
        images.append({"id": len(images) + 1, "file_name": image_id, "width": width, "height": height})
        for value in np.unique(mask):
            if value in (0, IGNORE) or value > len(category_ids):
                continue
            encoded = run_lengths.encode(np.asfortranarray(mask == value, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": category_ids[value - 1],
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                    "area": int(run_lengths.area(encoded)),
                    "bbox": [float(side) for side in run_lengths.toBbox(encoded)],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, cache.class_names, strict=True)
    ]
    document = {
        "info": {
            "description": f"pseudo masks, {cache.path.name}",
            "fingerprint": cache.manifest.fingerprint,
        },
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }
    content = json.dumps(document).encode("ascii")
    if _is_written(out_dir / COCO_FILE, content):
        report.written = len(images)
    else:
        report.unchanged = len(images)
    return report


def _category_ids(cache: MaskCache) -> list[int]:
    """Category id of mask values 1..C."""
    known = cache.manifest.mask_set.category_ids
    if known is None:
        return list(range(1, len(cache.class_names) + 1))
    return [known[name] for name in cache.class_names]
