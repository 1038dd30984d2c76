"""A trained network on any folder of pictures: masks to keep, overlays to look at, confidence to filter by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.data.masks import half_percent_confidence
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError, ImageError
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.segmentation.inference import InferenceConfig
from wsss_pipeline.stages.evaluate_network import NetworkMasks, load_network_masks
from wsss_pipeline.stages.overlays import mask_over_image

logger = logging.getLogger(__name__)

MASKS, OVERLAYS, CONFIDENCE = "masks", "overlays", "confidence"


@dataclass
class PredictReport:
    """``written``, ``kept``: masks made now, and found. ``failed``: image id to reason."""

    out: Path
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
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> PredictReport:
    """Writes ``out/masks/ID.png`` (palette PNG, 0..C) for each picture that hasn't got one yet.

    Args:
        checkpoint: a training run or a checkpoint folder.
        images: folder, searched with all below it.
        inference: scales, flip, windows; pictures as they are, where None.
        crf: refine with the dense CRF; its backend may be ``auto``.
        overlays: also ``out/overlays/ID.jpg``, the mask over the picture.
        confidence: also ``out/confidence/ID.png``, uint8, the label's probability in half percents.
        overwrite: predict again what is there.

    A picture that can't be read is reported, skipped and counted.

    Raises:
        CheckpointError, ImageError: no network, no folder.
        ConfigError: ``out`` can't be written.
    """
    masks = load_network_masks(checkpoint, images, inference=inference, crf=crf, device=device)
    report = PredictReport(out)
    kinds = {MASKS: ".png"}
    kinds |= {OVERLAYS: ".jpg"} if overlays else {}
    kinds |= {CONFIDENCE: ".png"} if confidence else {}
    with StopRequest() as stop:
        for image_id in progress(list(masks.images)):
            if stop.requested:
                report.interrupted = True
                break
            files = {kind: out / kind / f"{image_id}{suffix}" for kind, suffix in kinds.items()}
            if not overwrite and all(file.exists() for file in files.values()):
                report.kept += 1
                continue
            try:
                _predict_one(masks, image_id, files)
                report.written += 1
            except ImageError as error:
                report.failed[image_id] = str(error)
                logger.warning("%s: %s", image_id, error)
    return report


def _predict_one(masks: NetworkMasks, image_id: str, files: dict[str, Path]) -> None:
    probabilities = masks.probabilities(image_id)[masks.variants[-1]]
    mask = probabilities.argmax(axis=0).astype(np.uint8)
    palette = voc_palette()
    indexed = Image.fromarray(mask, mode="P")
    indexed.putpalette(palette.tobytes())
    pictures = {MASKS: indexed}
    if OVERLAYS in files:
        pictures[OVERLAYS] = Image.fromarray(
            mask_over_image(read_image(masks.images[image_id]), mask, palette)
        )
    if CONFIDENCE in files:
        sure: NDArray[np.uint8] = half_percent_confidence(probabilities.max(axis=0))
        pictures[CONFIDENCE] = Image.fromarray(sure)
    # the mask last: a run that was killed before it does the picture again
    for kind in reversed(files):
        _write(pictures[kind], files[kind])


def _write(picture: Image.Image, file: Path) -> None:
    """In one go: a file that is there is whole."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="JPEG" if file.suffix == ".jpg" else "PNG")
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror or error}") from error
