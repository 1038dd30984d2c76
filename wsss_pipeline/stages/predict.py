"""A trained network on any folder of images: masks to keep, overlays to look at, confidence to filter by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import ImageWarnings, read_stored_image
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.pictures.overlays import Rgb, encoded, index_png, mask_over_image
from wsss_pipeline.runtime.device import is_out_of_memory
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import check_apart, check_replaceable, write_file
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.segmentation.checkpoint import find_checkpoint
from wsss_pipeline.segmentation.inference import Segmenter

logger = logging.getLogger(__name__)

MASKS, OVERLAYS, CONFIDENCE = "masks", "overlays", "confidence"


@dataclass
class PredictReport:
    """``written``, ``kept``: masks made now, and there before. ``failed``: image id to reason."""

    written: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def predict(
    checkpoint: Path,
    images: Path,
    out: Path,
    *,
    inference: InferenceConfig | None = None,
    crf: CrfConfig | None = None,
    clip: str | None = None,
    overlays: bool = False,
    confidence: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    image_suffix: str | None = None,
    split: Path | None = None,
) -> PredictReport:
    """Writes ``out/masks/ID.png`` (palette PNG, 0..C) for each image that hasn't got one yet.

    With more than 254 classes they are grey PNGs of 16 bits.

    Args:
        checkpoint: a training run or a checkpoint folder.
        images: folder, searched with all below it.
        inference, crf, clip: settings, see ``Segmenter``.
        overlays: choice to write ``out/overlays/ID.jpg`` too, the mask over the image.
        confidence: choice to write ``out/confidence/ID.png``, uint8, the label's probability in half percents.
        overwrite: choice to predict again what is there.
        image_suffix: choice of the files, see ``find_images``.
        split: text file of the ids of the images to do; all of them, where None.

    An image of ``split`` that isn't there, one that can't be read, or for which memory ran out, is reported, skipped
    and counted.

    Raises:
        CheckpointError, ConfigError, ImageError: no network, no such device, no folder, or an output in an input.
        LabelError: ``split`` can't be read, or names no image unmistakably.
        OutputError: ``out`` can't be written, or a file to be replaced isn't this program's.
    """
    # the mask last: a run that was killed before it does the image again
    kinds = {CONFIDENCE: "png"} if confidence else {}
    kinds |= ({OVERLAYS: "jpg"} if overlays else {}) | {MASKS: "png"}
    inputs = {"--images": images, "--checkpoint": find_checkpoint(checkpoint), "--split": split}
    for kind in kinds:
        check_apart(out / kind, "--out", inputs)
    files: Mapping[str, ImageFile] = find_images(images, image_suffix, option="--image-suffix")
    report = PredictReport()
    if split is not None:
        wanted = read_split(split, files)
        report.failed = {
            i: f"{split} names it, but {images} has no such image" for i in wanted if i not in files
        }
        files = {i: files[i] for i in wanted if i in files}
        for image_id, reason in report.failed.items():
            logger.warning("%s: %s", image_id, reason)
    targets = {i: {kind: out / kind / f"{i}.{suffix}" for kind, suffix in kinds.items()} for i in files}
    kept = set() if overwrite else {i for i in files if all(map(Path.exists, targets[i].values()))}
    for target in (target for i in files if i not in kept for target in targets[i].values()):
        check_replaceable(target)
    segmenter = Segmenter.load(checkpoint, device, inference, crf, clip)
    with ImageWarnings() as image_warnings, StopRequest() as stop, Progress(len(files)) as progress:
        for image_id, file in files.items():
            if stop.requested:
                report.interrupted = True
                break
            if image_id in kept:
                report.kept += 1
                progress.advance()
                continue
            try:
                stored = read_stored_image(file, segmenter.pixel_range)
                image_warnings.warn(file, stored.remarks)
                image = stored.pixels
                record = segmenter(image)
                contents = [_content(kind, image, record) for kind in kinds]
            except (ImageError, MaskError, MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    reason = "ran out of memory; give --window, fewer --scales, or a smaller image"
                elif isinstance(error, RuntimeError):
                    raise
                else:
                    reason = str(error)
                report.failed[image_id] = reason
                logger.warning("%s: %s", image_id, reason)
                progress.advance(failed=1)
                continue
            for target, content in zip(targets[image_id].values(), contents, strict=True):
                write_file(target, content, durable=False, below=out)
            report.written += 1
            progress.advance()
    return report


def _content(kind: str, image: Rgb, record: PseudoMask) -> bytes:
    """The file of that kind: the mask's, or what shows it."""
    if kind == OVERLAYS:
        return encoded(Image.fromarray(mask_over_image(image, record.mask)), "JPEG")
    if kind == CONFIDENCE:
        return index_png(record.confidence, with_palette=False)
    return index_png(record.mask, with_palette=True)
