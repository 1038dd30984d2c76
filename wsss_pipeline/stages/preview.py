"""A contact sheet of a mask set: picture, pseudo mask, confidence and class activation maps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.cache import MaskCache, PseudoMask
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import CacheRecordError, ConfigError, ImageError
from wsss_pipeline.stages.contact_sheet import Cell, Header, Label, Row, draw_sheet, fitted_size
from wsss_pipeline.stages.overlays import (
    CONFIDENCE_MAP,
    HEAT_MAP,
    Rgb,
    coloured,
    heat_over_image,
    mask_over_image,
)

logger = logging.getLogger(__name__)

Pixels = TypeVar("Pixels", np.uint8, np.float32)

MOST_CAMS = 4
CONFIDENT = 0.95  # the threshold of CLIP-ES's confidence-guided loss


def preview(
    cache: Path,
    images: Mapping[str, ImageFile],
    out: Path,
    ids: Sequence[str] | None = None,
    limit: int = 12,
) -> Path:
    """Draws some of the cache's images, one row each, and writes the sheet as PNG.

    Args:
        cache: a mask set, as ``generate-masks`` prints it.
        images: image id -> picture, as ``find_images`` gives it.
        out: the PNG file; its folder is made where it doesn't exist.
        ids: the images to show; without them, up to ``limit`` ids spread evenly over the sorted ids.
        limit: largest number of rows.

    An image or record that can't be read leaves a marked cell; the others are drawn all the same.

    Returns:
        ``out``.

    Raises:
        CacheError: the cache can't be read, holds nothing, or lacks one of ``ids``.
        ConfigError: ``out`` isn't a PNG file or can't be written.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the contact sheet is a PNG file: end its name in .png, not '{out.name}'")
    masks = MaskCache.open(cache)
    shown = _choose(masks, cache, ids, limit)
    rows = [_row(image_id, masks, images.get(image_id)) for image_id in shown]
    headers = [Header("Image"), Header("Pseudo mask"), Header("Confidence", CONFIDENCE_MAP)]
    if any(len(row.cells) > len(headers) for row in rows):
        headers.append(Header("Class activation", HEAT_MAP))
    title = f"{masks.path.resolve().name}: {len(rows):,} of {len(masks):,} images"
    sheet = draw_sheet(title, headers, rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise ConfigError(f"the contact sheet {out} can't be written: {error.strerror or error}") from error
    return out


def _choose(masks: MaskCache, path: Path, ids: Sequence[str] | None, limit: int) -> list[str]:
    if ids:
        for image_id in ids:
            if image_id not in masks:
                raise CacheRecordError(
                    f"cache {path} has no image '{image_id}'; ids are paths without suffix"
                )
        return list(dict.fromkeys(ids))[:limit]
    everything = sorted(masks)
    if not everything:
        raise CacheRecordError(f"cache {path} holds no image yet; run generate-masks on it first")
    places = np.linspace(0, len(everything) - 1, min(limit, len(everything)))
    return [everything[place] for place in np.rint(places).astype(int)]


def _row(image_id: str, masks: MaskCache, file: ImageFile | None) -> Row:
    """One row; what can't be read is marked and logged."""
    image: Rgb | None = None
    problem = "no picture with this id in the images folder"
    try:
        if file is not None:
            image = read_image(file)
    except ImageError as error:
        problem = str(error)
    try:
        pseudo_mask = masks[image_id]
    except CacheRecordError as error:
        logger.warning("%s: %s", image_id, error)
        return Row(image_id, "", (_picture_cell(image, problem), Cell(None, problem=str(error))))
    if image is not None and image.shape[:2] != pseudo_mask.mask.shape:
        problem = (
            f"the picture is {_size(image)}, its mask {_size(pseudo_mask.mask)}: not the one of the cache"
        )
        image = None
    if image is None:
        logger.warning("%s: %s", image_id, problem)
    note = ", ".join(pseudo_mask.labels) if pseudo_mask.labels else "no labels"
    left_out = len(pseudo_mask.labels) - MOST_CAMS
    if pseudo_mask.cams is not None and left_out > 0:
        note += f" (activation of the first {MOST_CAMS} only)"
    cells = (_picture_cell(image, problem), *_mask_cells(pseudo_mask, image, masks.class_names))
    return Row(image_id, note, cells)


def _picture_cell(image: Rgb | None, problem: str) -> Cell:
    if image is None:
        return Cell(None, problem=problem)
    return Cell(_resized(image, Image.Resampling.LANCZOS), (Label(_size(image)),))


def _mask_cells(pseudo_mask: PseudoMask, image: Rgb | None, class_names: Sequence[str]) -> list[Cell]:
    """Mask, confidence and class activation maps; over white where there is no picture."""
    mask = pseudo_mask.mask
    backdrop = np.full((*mask.shape, 3), 255, np.uint8) if image is None else image
    backdrop = _resized(backdrop, Image.Resampling.LANCZOS)
    palette = voc_palette()
    numbers = {label: class_names.index(label) + 1 for label in pseudo_mask.labels}
    colours = {label: _colour(palette, number) for label, number in numbers.items()}

    shares = {label: float((mask == number).mean()) for label, number in numbers.items()}
    legend = [
        Label(f"{label} {100 * share:.0f} %", colours[label])
        for label, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    overlay = mask_over_image(backdrop, _resized(mask, Image.Resampling.NEAREST), palette)

    confidence = pseudo_mask.confidence.astype(np.float32) / np.float32(200)  # stored in half percents
    sure = f"mean {confidence.mean():.2f}, {100 * (pseudo_mask.confidence >= 200 * CONFIDENT).mean():.0f} %"
    shade = coloured(_resized(confidence, Image.Resampling.BILINEAR), CONFIDENCE_MAP)
    cells = [
        Cell(overlay, tuple(legend) or (Label("background only"),)),
        Cell(shade, (Label(f"{sure} from {CONFIDENT} up"),)),
    ]
    if pseudo_mask.cams is not None:
        for label, cam in list(zip(pseudo_mask.labels, pseudo_mask.cams, strict=True))[:MOST_CAMS]:
            heat = heat_over_image(backdrop, _resized(cam.astype(np.float32), Image.Resampling.BILINEAR))
            cells.append(Cell(heat, (Label(label, colours[label]), Label(f"maximum {cam.max():.2f}"))))
    return cells


def _colour(palette: Rgb, number: int) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in palette[number])
    return red, green, blue


def _resized(pixels: NDArray[Pixels], method: Image.Resampling) -> NDArray[Pixels]:
    """(H, W) or (H, W, 3) at the size that fits into a cell."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels).resize(fitted_size(width, height), method)
    return np.asarray(picture, dtype=pixels.dtype)


def _size(pixels: NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"
