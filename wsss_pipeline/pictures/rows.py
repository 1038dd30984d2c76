"""What a row of a contact sheet, or of an evaluation's page, shows: an image and its masks side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import CERTAIN, MaskSource, half_percent_threshold
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.pictures.overlays import (
    CONFIDENCE_MAP,
    HEAT_MAP,
    Colour,
    Rgb,
    class_colour,
    coloured,
    heat_over_image,
    mask_over_image,
)
from wsss_pipeline.runtime.device import is_out_of_memory

logger = logging.getLogger(__name__)

Pixels = TypeVar("Pixels", bound=np.generic)

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
    """One image of a row.

    Attributes:
        title: text over the picture.
        pixels: uint8 (h, w, 3) RGB, of the size that fits; None where ``problem`` is shown instead.
        colour_map: map of OpenCV, where the colours are a scale from 0 to 1.
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
        masks: masks by title; ``PSEUDO_MASK`` is shown with its confidence and, where stored, its CAMs.
        box: largest (width, height) of a cell.
        note: text before the labels of the pseudo mask.
    """
    notes = [note] if note else []
    cells: list[Cell] = []

    def mark(title: str, problem: str) -> None:
        logger.warning("%s: %s", image_id, problem)
        cells.append(Cell(title, None, problem=problem))

    image: Rgb | None = None
    try:
        if image_file is None:
            raise ImageError("no image with this id in the images folder")
        ranges = (getattr(source, "pixel_range", None) for source in masks.values())
        image = read_image(image_file, next(filter(None, ranges), None))
        cells.append(Cell("Image", _fitted(image, box, Image.Resampling.LANCZOS), (Label(_size(image)),)))
    except (ImageError, MemoryError) as error:
        mark("Image", str(error) or "this machine has too little memory for it")
    for title, source in masks.items():
        if image_id not in source:
            continue
        try:
            record = source[image_id]
        except (ImageError, MaskError) as error:
            mark(title, str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            mark(title, "this machine has too little memory for it")
            continue
        mask, labels, cams = record.mask, record.labels, record.cams
        if image is not None and mask.shape != image.shape[:2]:
            mark(title, f"the image is {_size(image)}, its mask {_size(mask)}: they don't belong together")
            continue
        backdrop = np.full((*mask.shape, 3), 255, np.uint8) if image is None else image
        backdrop = _fitted(backdrop, box, Image.Resampling.LANCZOS)
        counts = np.bincount(mask.ravel(), minlength=1 + len(source.class_names))
        values = {name: value for value, name in enumerate(source.class_names, start=1)}
        shown = [name for name, value in values.items() if counts[value] or name in labels]
        caption = [
            Label(f"{name} {100 * counts[values[name]] / mask.size:.0f} %", class_colour(values[name]))
            for name in sorted(shown, key=lambda name: -counts[values[name]])
        ]
        overlay = mask_over_image(backdrop, _fitted(mask, box, Image.Resampling.NEAREST))
        cells.append(Cell(title, overlay, tuple(caption) or (Label("background only"),)))
        if title != PSEUDO_MASK:
            continue
        notes.append(", ".join(labels) or "no labels")
        if cams is not None and len(cams) > MOST_CAMS:
            notes[-1] += f" (activation of the first {MOST_CAMS} only)"
        confidence = record.confidence.astype(np.float32) / np.float32(CERTAIN)
        sure = (record.confidence >= half_percent_threshold(CONFIDENT)).mean()
        label = Label(f"mean {confidence.mean():.2f}, {100 * sure:.0f} % from {CONFIDENT} up")
        shade = coloured(_fitted(confidence, box, Image.Resampling.BILINEAR), CONFIDENCE_MAP)
        cells.append(Cell("Confidence", shade, (label,), colour_map=CONFIDENCE_MAP))
        for name, cam in list(zip(labels, cams if cams is not None else (), strict=False))[:MOST_CAMS]:
            heat = heat_over_image(backdrop, _fitted(cam.astype(np.float32), box, Image.Resampling.BILINEAR))
            colour = class_colour(values[name]) if name in values else None
            about = (Label(name, colour), Label(f"maximum {cam.max():.2f}"))
            cells.append(Cell("Class activation", heat, about, colour_map=HEAT_MAP))
    return Row(image_id, "; ".join(notes), tuple(cells))


def _fitted(pixels: NDArray[Pixels], box: tuple[int, int], method: Image.Resampling) -> NDArray[Pixels]:
    """(H, W) or (H, W, 3) at the largest size of the same shape that fits into ``box`` (width, height)."""
    height, width = pixels.shape[:2]
    scale = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, method), dtype=pixels.dtype)


def _size(pixels: NDArray[Any]) -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"
