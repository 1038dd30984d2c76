"""What a row of a contact sheet, or of an evaluation's page, shows: an image and its masks side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import CERTAIN, MaskSource, PseudoMask, half_percent_threshold
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.pictures.overlays import (
    CONFIDENCE_MAP,
    HEAT_MAP,
    Rgb,
    coloured,
    heat_over_image,
    mask_over_image,
)

logger = logging.getLogger(__name__)

Pixels = TypeVar("Pixels", np.uint8, np.float32)
Colour = tuple[int, int, int]

PSEUDO_MASK, PREDICTION, GROUND_TRUTH = "Pseudo mask", "Prediction", "Ground truth"
MOST_CAMS = 4
CONFIDENT = 0.95  # the threshold of CLIP-ES's confidence-guided loss


@dataclass(frozen=True)
class Label:
    """A piece of caption; with a colour, a swatch of it stands before the text."""

    text: str
    colour: Colour | None = None


@dataclass(frozen=True)
class Cell:
    """One picture of a row.

    Attributes:
        title: what it shows.
        pixels: uint8 (h, w, 3) RGB, of the size that fits; None where ``problem`` stands in its place.
        colour_map: of OpenCV, where the colours are a scale from 0 to 1.
    """

    title: str
    pixels: Rgb | None
    caption: tuple[Label, ...] = ()
    problem: str = ""
    colour_map: int | None = None


@dataclass(frozen=True)
class Row:
    """``image_id`` and, less prominent, ``note`` stand over the cells."""

    image_id: str
    note: str
    cells: tuple[Cell, ...]


def make_row(
    image_id: str,
    image_file: ImageFile | None,
    masks: Mapping[str, MaskSource],
    box: tuple[int, int],
    note: str = "",
) -> Row:
    """The image, then what each source has of it; what can't be read is marked, and logged.

    Args:
        image_file: None where there is none of this id; masks are drawn over white then.
        masks: by title; ``PSEUDO_MASK`` is shown with its confidence and, where stored, its CAMs.
        box: largest (width, height) of a cell.
        note: to stand before the labels of the pseudo mask.
    """
    notes = [note] if note else []
    image: Rgb | None = None
    problem = "no image with this id in the images folder"
    try:
        if image_file is not None:
            image = read_image(image_file)
    except ImageError as error:
        problem = str(error)
    if image is None:
        logger.warning("%s: %s", image_id, problem)
        cells = [Cell("Image", None, problem=problem)]
    else:
        cells = [Cell("Image", _fitted(image, box, Image.Resampling.LANCZOS), (Label(_size(image)),))]
    for title, source in masks.items():
        if image_id not in source:
            continue
        try:
            record = source[image_id]
            if image is not None and record.mask.shape != image.shape[:2]:
                raise MaskError(
                    f"the image is {_size(image)}, its mask {_size(record.mask)}: they don't belong together"
                )
        except (ImageError, MaskError) as error:
            logger.warning("%s: %s", image_id, error)
            cells.append(Cell(title, None, problem=str(error)))
            continue
        backdrop = np.full((*record.mask.shape, 3), 255, np.uint8) if image is None else image
        backdrop = _fitted(backdrop, box, Image.Resampling.LANCZOS)
        cells.append(_mask_cell(title, record, source.class_names, backdrop, box))
        if title == PSEUDO_MASK:
            notes.append(", ".join(record.labels) if record.labels else "no labels")
            if record.cams is not None and len(record.cams) > MOST_CAMS:
                notes[-1] += f" (activation of the first {MOST_CAMS} only)"
            cells += _detail_cells(record, source.class_names, backdrop, box)
    return Row(image_id, "; ".join(notes), tuple(cells))


def _mask_cell(
    title: str, record: PseudoMask, class_names: Sequence[str], backdrop: Rgb, box: tuple[int, int]
) -> Cell:
    """The mask over the image; its caption is the share of each class, the largest first."""
    counts = np.bincount(record.mask.ravel(), minlength=256)
    present = {name for value, name in enumerate(class_names, start=1) if counts[value]}
    shares = {
        name: counts[class_names.index(name) + 1] / record.mask.size
        for name in class_names
        if name in present or name in record.labels
    }
    caption = [
        Label(f"{name} {100 * share:.0f} %", _colour(class_names, name))
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    overlay = mask_over_image(backdrop, _fitted(record.mask, box, Image.Resampling.NEAREST), voc_palette())
    return Cell(title, overlay, tuple(caption) or (Label("background only"),))


def _detail_cells(
    record: PseudoMask, class_names: Sequence[str], backdrop: Rgb, box: tuple[int, int]
) -> Iterator[Cell]:
    """Confidence and class activation maps."""
    confidence = record.confidence.astype(np.float32) / np.float32(CERTAIN)
    share = (record.confidence >= half_percent_threshold(CONFIDENT)).mean()
    caption = Label(f"mean {confidence.mean():.2f}, {100 * share:.0f} % from {CONFIDENT} up")
    shade = coloured(_fitted(confidence, box, Image.Resampling.BILINEAR), CONFIDENCE_MAP)
    yield Cell("Confidence", shade, (caption,), colour_map=CONFIDENCE_MAP)
    if record.cams is not None:
        for name, cam in list(zip(record.labels, record.cams, strict=True))[:MOST_CAMS]:
            heat = heat_over_image(backdrop, _fitted(cam.astype(np.float32), box, Image.Resampling.BILINEAR))
            labels = (Label(name, _colour(class_names, name)), Label(f"maximum {cam.max():.2f}"))
            yield Cell("Class activation", heat, labels, colour_map=HEAT_MAP)


def _colour(class_names: Sequence[str], name: str) -> Colour:
    red, green, blue = voc_palette()[class_names.index(name) + 1].tolist()
    return red, green, blue


def _fitted(pixels: NDArray[Pixels], box: tuple[int, int], method: Image.Resampling) -> NDArray[Pixels]:
    """(H, W) or (H, W, 3) at the largest size of the same shape that fits into ``box`` (width, height)."""
    height, width = pixels.shape[:2]
    scale = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, method), dtype=pixels.dtype)


def _size(pixels: NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"
