"""Masks to look at: a contact sheet of some, or a page to look through all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import image_digest, image_size, read_image
from wsss_pipeline.data.masks import MaskSource
from wsss_pipeline.errors import CacheRecordError, ConfigError, ImageError, MaskError
from wsss_pipeline.evaluation.quality import (
    LIKELY_WRONG,
    POSTERIOR_REMARK,
    estimate,
    is_sure_of_everything,
    likely_wrong,
)
from wsss_pipeline.pictures.contact_sheet import CELL_HEIGHT, CELL_WIDTH, draw_sheet
from wsss_pipeline.pictures.overlays import encoded
from wsss_pipeline.pictures.preview_page import (
    PICTURES,
    PreviewImage,
    layer,
    picture_name,
    preview_page,
    thumbnail,
)
from wsss_pipeline.pictures.rows import PSEUDO_MASK, make_row
from wsss_pipeline.runtime.device import is_out_of_memory
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import check_replaceable, write_file
from wsss_pipeline.runtime.progress import Progress

PAGE = "index.html"

logger = logging.getLogger(__name__)


@dataclass
class PreviewReport:
    """What ``preview_folder`` did.

    Attributes:
        page: the page.
        images: number of images on it.
        drawn: number of pictures drawn, thumbnails and layers; the others were there.
        failed: image id to reason, of images that are on the page with something missing.
        interrupted: True where a request to stop came, and some images are left.
    """

    page: Path
    images: int = 0
    drawn: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def preview_folder(
    masks: MaskSource,
    images: Mapping[str, ImageFile],
    out: Path,
    ids: Sequence[str] = (),
    limit: int | None = None,
) -> PreviewReport:
    """Writes a folder with a page to look through masks, the most doubtful first, and the pictures that it shows.

    A picture has its name from the bytes that it is drawn of: one that is there needn't be drawn again, and none
    ever shows something else than before. The page is written last; after a request to stop, of what there is.

    Args:
        masks: the masks.
        images: image id to file; those without a mask are passed over.
        out: folder, made where it doesn't exist.
        ids: the images to show; without them all, or ``limit`` of them, spread evenly over their order.
        limit: largest number of images; None for all.

    Raises:
        MaskError: no image has a mask, or one of ``ids`` hasn't.
        OutputError: something can't be written, or there is a file that this program didn't write.
    """
    page = out / PAGE
    check_replaceable(page)
    there = [image_id for image_id in images if image_id in masks]
    if isinstance(masks, MaskCache) and (missing := len(masks) - len(there)):
        logger.warning("%d of the %d images of the mask set have no image file here", missing, len(masks))
    if not there:
        raise MaskError(f"no image of the folder is in the {masks.description}: do they belong together?")
    for image_id in ids:
        if image_id not in masks or image_id not in images:
            raise MaskError(f"no image '{image_id}' with a mask; ids are paths without suffix")
    shown = _chosen(there, ids, limit)
    pixel_range = getattr(masks, "pixel_range", None)
    report = PreviewReport(page)
    entries: list[PreviewImage] = []

    with StopRequest() as stop, Progress(len(shown)) as progress:
        for image_id in shown:
            if stop.requested:
                report.interrupted = True
                break
            entry, file = PreviewImage(image_id), images[image_id]
            entries.append(entry)
            try:
                drawn_of = f"{image_digest(file)}{pixel_range or ''}"
                photo = out / PICTURES / picture_name(drawn_of.encode(), ".jpg")
                check_replaceable(photo)
                if not photo.exists():
                    write_file(photo, thumbnail(read_image(file, pixel_range)), durable=False, below=out)
                    report.drawn += 1
                entry.image = photo.name
                record = masks[image_id]
                mask, (width, height) = record.mask, image_size(file)
                if mask.shape != (height, width):
                    raise MaskError(
                        f"the image is {width}x{height}, its mask {mask.shape[1]}x{mask.shape[0]}: they don't "
                        "belong together"
                    )
                over = out / PICTURES / picture_name(b"%d %d " % mask.shape + mask.tobytes(), ".png")
                check_replaceable(over)
                if not over.exists():
                    write_file(over, layer(mask), durable=False, below=out)
                    report.drawn += 1
                entry.layer = over.name
                entry.doubt = likely_wrong(record, masks.class_names)
                values = {name: value for value, name in enumerate(masks.class_names, start=1)}
                entry.share = {name: float((mask == values[name]).mean()) for name in entry.doubt}
            except (ImageError, MaskError, MemoryError, RuntimeError) as error:
                if isinstance(error, (MemoryError, RuntimeError)) and not is_out_of_memory(error):
                    raise
                known = isinstance(error, (ImageError, MaskError))
                entry.problem = str(error) if known else "this machine has too little memory for it"
                report.failed[image_id] = entry.problem
                logger.warning("%s: %s", image_id, entry.problem)
            progress.advance(failed=int(bool(entry.problem)))
    report.images = len(entries)
    warnings = []
    if report.interrupted:
        warnings.append(
            f"{len(entries):,} of {len(shown):,} images: the run was interrupted. The same command goes on."
        )
    content = preview_page(
        entries,
        masks.class_names,
        identity=masks.identity,
        summary={"Masks": masks.description, "Doubt": LIKELY_WRONG, **_remark(masks)},
        warnings=warnings,
    )
    write_file(page, content, below=out)
    return report


def preview(
    cache: Path,
    images: Mapping[str, ImageFile],
    out: Path,
    ids: Sequence[str] = (),
    limit: int = 12,
    *,
    worst: bool = False,
) -> Path:
    """Draws some of the cache's images, one row each, and writes the sheet as PNG, to ``out``.

    Args:
        cache: a mask set, or a folder that holds one.
        images: image id to file.
        out: the PNG file; its folder is made where it doesn't exist.
        ids: the images to show; without them, up to ``limit`` ids spread evenly over the sorted ids.
        limit: largest number of rows.
        worst: choice to show the images of the lowest estimated IoU, see ``Quality``, in place of evenly spread ones.

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
    box = (CELL_WIDTH, CELL_HEIGHT)
    shown = _chosen(list(masks), ids, limit)
    for remark in _remark(masks).values():
        logger.warning("the estimates on the sheet are rough: %s", remark)
    quality = estimate(masks, list(masks) if worst and not ids else shown)
    if worst and not ids:
        shown = (
            list(quality.by_image)[:limit] or shown
        )  # where nothing has a class, there is nothing to estimate
    rows = [
        make_row(image_id, images.get(image_id), {PSEUDO_MASK: masks}, box, quality.note(image_id))
        for image_id in shown
    ]
    title = f"{len(rows):,} of {len(masks):,} images of {masks.path.resolve().name}"
    write_file(out, encoded(draw_sheet(title, rows), "PNG"), durable=False)
    return out


def _remark(masks: MaskSource) -> dict[str, str]:
    """What is to be said of the doubt in these masks, if anything, by what it is about."""
    if isinstance(masks, MaskCache) and is_sure_of_everything(masks.manifest.mask_set.determinants):
        return {"Confidence": POSTERIOR_REMARK}
    return {}


def _chosen(there: Sequence[str], ids: Sequence[str], limit: int | None) -> list[str]:
    """The first ``limit`` of ``ids``, without these of all images, spread evenly."""
    if ids:
        return list(dict.fromkeys(ids))[:limit]
    positions = np.rint(np.linspace(0, len(there) - 1, min(limit or len(there), len(there)))).astype(int)
    return [there[position] for position in positions]
