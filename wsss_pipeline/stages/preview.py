"""A contact sheet of a mask set: image, pseudo mask, confidence and CAMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.errors import CacheRecordError, ConfigError
from wsss_pipeline.pictures.contact_sheet import CELL_HEIGHT, CELL_WIDTH, draw_sheet
from wsss_pipeline.pictures.overlays import encoded
from wsss_pipeline.pictures.rows import PSEUDO_MASK, make_row
from wsss_pipeline.runtime.output import check_replaceable, write_file


def preview(
    cache: Path, images: Mapping[str, ImageFile], out: Path, ids: Sequence[str] = (), limit: int = 12
) -> Path:
    """Draws some of the cache's images, one row each, and writes the sheet as PNG, to ``out``.

    Args:
        cache: a mask set, or a folder that holds one.
        images: image id to file.
        out: the PNG file; its folder is made where it doesn't exist.
        ids: the images to show; without them, up to ``limit`` ids spread evenly over the sorted ids.
        limit: largest number of rows.

    An image or record that can't be read leaves a marked cell; the others are drawn all the same.

    Raises:
        CacheError: the cache can't be read, holds nothing, or lacks one of ``ids``.
        ConfigError: ``out`` isn't a PNG file.
        OutputError: it can't be written, or there is a file that this program didn't write.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"the contact sheet is a PNG file: end its name in .png, not '{out.name}'")
    check_replaceable(out)
    masks = MaskCache.open(cache)
    for image_id in ids:
        if image_id not in masks:
            raise CacheRecordError(f"cache {cache} has no image '{image_id}'; ids are paths without suffix")
    if not len(masks):
        raise CacheRecordError(f"cache {cache} holds no image yet; run generate-masks on it first")
    shown = list(dict.fromkeys(ids))[:limit]
    if not shown:
        positions = np.rint(np.linspace(0, len(masks) - 1, min(limit, len(masks)))).astype(int)
        shown = [list(masks)[position] for position in positions]
    box = (CELL_WIDTH, CELL_HEIGHT)
    rows = [make_row(image_id, images.get(image_id), {PSEUDO_MASK: masks}, box) for image_id in shown]
    title = f"{masks.path.resolve().name}: {len(rows):,} of {len(masks):,} images"
    write_file(out, encoded(draw_sheet(title, rows), "PNG"), durable=False)
    return out
