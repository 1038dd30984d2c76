"""Gathers what the HTML report of an evaluation shows: the scores, and the pictures worth looking at."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.cache import MaskCache, PseudoMask
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.errors import CacheRecordError, EvaluationError, ImageError
from wsss_pipeline.evaluation.html_report import (
    Cell,
    ImageRow,
    ReportPage,
    Section,
    class_entries,
    confusion_texts,
    data_uri,
    row_percentages,
    settings_text,
    write_report,
)
from wsss_pipeline.evaluation.metrics import Scores
from wsss_pipeline.evaluation.report import EvaluationResult
from wsss_pipeline.stages.overlays import CONFIDENCE_MAP, Rgb, coloured, heat_over_image, mask_over_image

logger = logging.getLogger(__name__)

SHOWN = 12  # images a section
SIDE = 320  # of a picture on the page, at most

Mask = NDArray[np.uint8]


@dataclass
class ReportImages:
    """Where the pictures come from, and how each image did; filled while an evaluation runs.

    Attributes:
        images: image id to picture.
        class_names: of mask values 1..C.
        cache: pseudo masks, where there are some.
        predict: a network's or folder's mask of an image, where there is one.
        truth: image id to index mask; empty without ground truth.
        matrix: sum of all images' confusion matrices, int64 (1+C, 2+C).
        image_scores: image id to a number, the lower the worse.
    """

    images: Mapping[str, ImageFile]
    class_names: tuple[str, ...]
    cache: MaskCache | None = None
    predict: Callable[[str], Mask] | None = None
    truth: Mapping[str, ImageFile] = field(default_factory=dict)
    matrix: NDArray[np.int64] | None = None
    image_scores: dict[str, float] = field(default_factory=dict)

    def add(self, image_id: str, matrix: NDArray[np.int64]) -> None:
        """One image's confusion matrix; its score is the mIoU over its own classes."""
        self.matrix = matrix if self.matrix is None else self.matrix + matrix
        if matrix.any():
            names = [str(index) for index in range(len(matrix))]
            self.image_scores[image_id] = Scores.from_matrix(matrix, names).miou


def report_with_truth(
    file: Path, result: EvaluationResult, images: ReportImages, settings: dict[str, Any]
) -> None:
    """The page of an evaluation against ground truth: scores, confusions, worst and random images.

    Raises:
        ConfigError: the file can't be written.
    """
    assert images.matrix is not None
    worst = sorted(images.image_scores, key=images.image_scores.__getitem__)[:SHOWN]
    rest = sorted(set(images.image_scores) - set(worst))
    chance = sorted(random.Random(0).sample(rest, min(SHOWN, len(rest))))

    def note(image_id: str) -> str:
        return f"mIoU over its own classes {100 * images.image_scores[image_id]:.1f} %"

    names = ("background", *images.class_names)
    lines = [line.split(": ", 1) for line in result.origin_lines() if ": " in line]
    page = ReportPage(
        title=f"Evaluation on {result.split}",
        score=f"{100 * result.scores.miou:.2f} %",
        summary=[
            ("Images", f"{result.images:,} of split {result.split} (ids {result.id_digest})"),
            *((name, value) for name, value in lines),
            ("Pixel accuracy", f"{100 * result.scores.pixel_accuracy:.2f} %"),
            ("Mean accuracy", f"{100 * result.scores.mean_accuracy:.2f} %"),
            ("Frequency-weighted IoU", f"{100 * result.scores.frequency_weighted_iou:.2f} %"),
        ],
        warnings=result.warnings,
        classes=class_entries(result.scores, images.class_names),
        confusions=confusion_texts(images.matrix, images.class_names),
        matrix_heads=(*names, "no label"),
        matrix_rows=[
            (name, row.tolist()) for name, row in zip(names, row_percentages(images.matrix), strict=True)
        ],
        sections=[
            Section("Worst images", [_row(images, image_id, note(image_id)) for image_id in worst]),
            Section("Random images", [_row(images, image_id, note(image_id)) for image_id in chance]),
        ],
        settings=settings_text(settings),
    )
    write_report(file, page)


def report_without_truth(file: Path, images: ReportImages, settings: dict[str, Any]) -> int:
    """The page where nobody knows what is right: least sure pseudo masks, and largest disagreement.

    Returns:
        The number of images that were looked at.

    Raises:
        EvaluationError: neither cache nor pictures with a mask in it.
        ConfigError: the file can't be written.
    """
    if images.cache is None:
        raise EvaluationError("without --gt a report needs the pseudo masks: give --cache")
    confidence: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for image_id in images.cache:
        if image_id not in images.images:
            continue
        try:
            record = images.cache[image_id]
            confidence[image_id] = float(record.confidence.mean()) / 2
            if images.predict is not None:
                mask = images.predict(image_id)
                if mask.shape == record.mask.shape:
                    agreement[image_id] = 100 * float((mask == record.mask).mean())
        except (CacheRecordError, ImageError) as error:
            logger.warning("%s: left out: %s", image_id, error)
    if not confidence:
        raise EvaluationError(
            "no image of the folder has a pseudo mask in the cache: do they belong together?"
        )
    sections = [
        Section("Lowest mean confidence", _lowest(images, confidence, "mean confidence {:.1f} %")),
    ]
    if agreement:
        title = "Largest disagreement between pseudo mask and prediction"
        sections.append(Section(title, _lowest(images, agreement, "{:.1f} % of the pixels agree")))
    page = ReportPage(
        title="Masks without ground truth",
        summary=[
            ("Images", f"{len(confidence):,}"),
            ("Mask set", str(images.cache.path)),
            ("Mean confidence", f"{np.mean(list(confidence.values())):.1f} %"),
            *([("Mean agreement", f"{np.mean(list(agreement.values())):.1f} %")] if agreement else []),
        ],
        sections=sections,
        legend=class_entries(None, images.class_names),
        settings=settings_text(settings),
    )
    write_report(file, page)
    return len(confidence)


def _lowest(images: ReportImages, values: Mapping[str, float], text: str) -> list[ImageRow]:
    chosen = sorted(values, key=values.__getitem__)[:SHOWN]
    return [_row(images, image_id, text.format(values[image_id])) for image_id in chosen]


def _row(images: ReportImages, image_id: str, note: str) -> ImageRow:
    """What there is of an image; a part that can't be read is left out."""
    if image_id not in images.images:
        return ImageRow(image_id, f"{note}; no picture of this id", [])
    try:
        picture = read_image(images.images[image_id])
    except ImageError as error:
        return ImageRow(image_id, f"{note}; {error}", [])
    masks: list[tuple[str, Mask]] = []
    cells = [("Image", _small(picture))]
    try:
        record = images.cache[image_id] if images.cache is not None and image_id in images.cache else None
        if record is not None:
            cells += _record_cells(record, picture)
            masks.append(("Pseudo mask", record.mask))
        if images.predict is not None:
            masks.append(("Prediction", images.predict(image_id)))
        if image_id in images.truth:
            masks.append(("Ground truth", read_mask(images.truth[image_id])))
    except (CacheRecordError, ImageError) as error:
        note = f"{note}; {error}"
    palette = voc_palette()
    for name, mask in masks:
        if mask.shape == picture.shape[:2]:
            small = np.asarray(Image.fromarray(mask).resize(_size(mask), Image.Resampling.NEAREST))
            present = [
                images.class_names[value - 1]
                for value in np.unique(mask)
                if 0 < value <= len(images.class_names)
            ]
            caption = f"{name}: {', '.join(present) or 'background'}"
            cells.append((caption, mask_over_image(_small(picture), small, palette)))
    return ImageRow(image_id, note, [Cell(caption, data_uri(pixels)) for caption, pixels in cells])


def _record_cells(record: PseudoMask, picture: Rgb) -> list[tuple[str, Rgb]]:
    cells: list[tuple[str, Rgb]] = []
    if record.cams is not None and len(record.cams):
        cam = Image.fromarray(record.cams.astype(np.float32).max(axis=0))
        heat = np.asarray(cam.resize(_size(record.mask), Image.Resampling.BILINEAR))
        if record.mask.shape == picture.shape[:2]:
            cells.append((f"CAM: {', '.join(record.labels)}", heat_over_image(_small(picture), heat)))
    sure = Image.fromarray(record.confidence.astype(np.float32) / np.float32(200))
    shade = coloured(np.asarray(sure.resize(_size(record.mask), Image.Resampling.BILINEAR)), CONFIDENCE_MAP)
    cells.append((f"Confidence: mean {record.confidence.mean() / 2:.0f} %", shade))
    return cells


def _size(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _small(picture: Rgb) -> Rgb:
    return np.asarray(Image.fromarray(picture).resize(_size(picture), Image.Resampling.LANCZOS))
