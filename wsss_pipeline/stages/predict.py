"""A trained network on any folder of images: masks to keep, overlays to look at, confidence to filter by."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ImageError, MaskError
from wsss_pipeline.pictures.overlays import encoded, index_png, mask_over_image
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import write_file
from wsss_pipeline.runtime.progress import Progress
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
    overlays: bool = False,
    confidence: bool = False,
    device: str = "auto",
    overwrite: bool = False,
) -> PredictReport:
    """Writes ``out/masks/ID.png`` (palette PNG, 0..C) for each image that hasn't got one yet.

    Args:
        checkpoint: a training run or a checkpoint folder.
        images: folder, searched with all below it.
        inference, crf: settings, see ``Segmenter``.
        overlays: choice to write ``out/overlays/ID.jpg`` too, the mask over the image.
        confidence: choice to write ``out/confidence/ID.png``, uint8, the label's probability in half percents.
        overwrite: choice to predict again what is there.

    An image that can't be read is reported, skipped and counted.

    Raises:
        CheckpointError, ConfigError, ImageError: no network, no such device, no folder.
        OutputError: ``out`` can't be written.
    """
    segmenter = Segmenter.load(checkpoint, device, inference, crf)
    files = find_images(images)
    # the mask last: a run that was killed before it does the image again
    kinds = {CONFIDENCE: "png"} if confidence else {}
    kinds |= ({OVERLAYS: "jpg"} if overlays else {}) | {MASKS: "png"}
    report = PredictReport()
    with StopRequest() as stop, Progress(len(files)) as progress:
        for image_id, file in files.items():
            if stop.requested:
                report.interrupted = True
                break
            targets = {kind: out / kind / f"{image_id}.{suffix}" for kind, suffix in kinds.items()}
            if not overwrite and all(target.exists() for target in targets.values()):
                report.kept += 1
                progress.advance()
                continue
            try:
                image = read_image(file)
                record = segmenter(image)
            except (ImageError, MaskError) as error:
                report.failed[image_id] = str(error)
                logger.warning("%s: %s", image_id, error)
                progress.advance(failed=1)
                continue
            for kind, target in targets.items():
                if kind == OVERLAYS:
                    content = encoded(Image.fromarray(mask_over_image(image, record.mask)), "JPEG")
                elif kind == CONFIDENCE:
                    content = index_png(record.confidence, with_palette=False)
                else:
                    content = index_png(record.mask, with_palette=True)
                write_file(target, content, durable=False)
            report.written += 1
            progress.advance()
    return report
