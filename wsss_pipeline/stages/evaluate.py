"""Scores masks against ground truth: those of a mask set, of a folder of PNGs, or of a network."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.class_lists import Color
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.masks import MaskFolder, MaskSource
from wsss_pipeline.errors import ConfigError, EvaluationError, ImageError, MaskError
from wsss_pipeline.evaluation.metrics import Scores, check_sizes, confusion_matrix
from wsss_pipeline.evaluation.quality import Quality
from wsss_pipeline.evaluation.result import Evaluation, Variant
from wsss_pipeline.pictures.evaluation_page import confidence_page, evaluation_page
from wsss_pipeline.pictures.rows import GROUND_TRUTH, PREDICTION, PSEUDO_MASK
from wsss_pipeline.runtime.device import is_out_of_memory
from wsss_pipeline.runtime.output import check_replaceable, write_file
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.segmentation.inference import CRF, NetworkMasks, Segmenter

logger = logging.getLogger(__name__)


def open_masks(
    *,
    cache: Path | None = None,
    predictions: Path | None = None,
    checkpoint: Path | None = None,
    class_names: Sequence[str] | None = None,
    images: Mapping[str, ImageFile] | None = None,
    inference: InferenceConfig | None = None,
    crf: CrfConfig | None = None,
    device: str = "auto",
    clip: str | None = None,
) -> MaskSource:
    """The masks of exactly one of ``cache``, ``predictions`` and ``checkpoint``.

    Args:
        cache: a mask set, as ``generate-masks`` prints it, or a folder that holds one.
        predictions: folder of index masks.
        checkpoint: a training run or a checkpoint folder.
        class_names: the C names without the background; needed for ``predictions``, and for a cache only checked
            against its own.
        images: image id to file, for the network to look at.
        inference, crf, device, clip: settings of the network, see ``Segmenter``.

    Raises:
        EvaluationError: not exactly one, or classes that are missing or aren't those of the cache.
        CacheError, CheckpointError, ConfigError, ImageError, MaskError: it can't be opened.
    """
    if sum(path is not None for path in (cache, predictions, checkpoint)) != 1:
        raise EvaluationError("give the masks once: --cache, --predictions or --checkpoint")
    if checkpoint is not None:
        return NetworkMasks(Segmenter.load(checkpoint, device, inference, crf, clip), images or {})
    if predictions is not None:
        if class_names is None:
            raise EvaluationError(
                f"predictions {predictions}: masks don't know their class names; give --classes"
            )
        return MaskFolder(predictions, class_names)
    assert cache is not None
    masks = MaskCache.open(cache)
    if class_names is not None and tuple(class_names) != masks.class_names:
        raise EvaluationError(
            f"the classes given are not those of the cache {cache} ({', '.join(masks.class_names)}): "
            "leave the classes out, the cache knows its own"
        )
    return masks


def evaluate(
    source: MaskSource,
    ground_truth: Path,
    *,
    colors: Mapping[Color, int] | None = None,
    split: Path | None = None,
    min_confidence: float | None = None,
    allow_missing: bool = False,
    report: Path | None = None,
    images: Mapping[str, ImageFile] | None = None,
    pseudo_masks: MaskSource | None = None,
    settings: Mapping[str, object] | None = None,
    gt_suffix: str | None = None,
) -> Evaluation:
    """Scores masks; a network's in all variants, out of one set of passes an image.

    Args:
        ground_truth: folder of masks (0 background, 1..C classes, 255 ignore), one per image id; see ``MaskFolder``.
        colors: RGB colour to mask value of ground truth that holds colours.
        split: text file of the image ids to score; its name without suffix is the name of the split.
            Without one, every ground-truth file that has a prediction is scored.
        min_confidence: threshold; pixels below it count as misses.
        allow_missing: choice to score the rest where images of the split have no prediction.
        report: HTML file to write: scores, confusions, worst and random images; needs ``images``.
        images: image id to file, for the report.
        pseudo_masks: masks that the report shows beside the masks that are scored.
        settings: settings of the run, for the report.
        gt_suffix: ending of ground-truth names, which image ids don't have.

    Images that can't be read, or whose sizes differ, are left out and listed in ``skipped``.

    Raises:
        EvaluationError: nothing to score, predictions missing, values that fit no class, or options
            that contradict each other.
        ImageError, LabelError: a folder or the split can't be read.
        ConfigError: ``min_confidence`` isn't between 0 and 1, or a report without images.
        OutputError: ``report`` can't be written, or is a file that this program didn't write.
    """
    if min_confidence is not None and isinstance(source, MaskFolder):
        raise EvaluationError(
            f"{source.description}: a folder of masks holds no confidence; drop --min-confidence or give --cache"
        )
    if report is not None and images is None:
        raise ConfigError("a report shows images; give their folder (--images)")
    if report is not None:
        check_replaceable(report)
    try:
        truths = MaskFolder(ground_truth, source.class_names, "ground truth", colors, suffix=gt_suffix)
        truths.check_sizes(images or {})
    except MaskError as error:
        raise EvaluationError(str(error)) from error
    wanted = read_split(split, truths.files) if split is not None else list(truths.files)
    wanted = [_in_form_of(source, image_id) for image_id in wanted]
    if not wanted:
        raise EvaluationError(f"{ground_truth}: no image to score in it")
    without_truth = [image_id for image_id in wanted if image_id not in truths]
    if without_truth:
        raise EvaluationError(
            f"ground truth {ground_truth} lacks {len(without_truth):,} of the {len(wanted):,} images of {split}, "
            f"the first is '{without_truth[0]}'; give the folder or the split that belongs to the other"
        )
    image_ids = [image_id for image_id in wanted if image_id in source]
    missing = [image_id for image_id in wanted if image_id not in source]
    network = source if isinstance(source, NetworkMasks) else None
    description = source.description if network is None else "the folder of images"
    if not image_ids:
        raise EvaluationError(
            f"{description} holds none of the {len(wanted):,} images, such as '{wanted[0]}': "
            "image ids are paths below the folder without suffix, and must be the same on both sides"
        )
    if missing and split is not None and not allow_missing:
        raise EvaluationError(
            f"{description} lacks {len(missing):,} of the {len(wanted):,} images of {split}, the first is "
            f"'{missing[0]}'; make them first, or score the others with --allow-missing"
        )
    if missing:
        logger.warning("%s lacks %d of %d images; they are left out", description, len(missing), len(wanted))
    names = ("background", *source.class_names)
    matrices: dict[str, NDArray[np.int64]] = {}
    image_miou: dict[str, float | None] = {}
    skipped: dict[str, str] = {}
    with (
        network.warnings if network else nullcontext(),
        FewWarnings(logger, "images left out") as left_out,
        Progress(len(image_ids)) as progress,
    ):
        for image_id in image_ids:
            try:
                try:
                    truth = truths[image_id].mask
                except MaskError as error:
                    # Values that fit no class end the run: they say that the class set is wrong, not the image.
                    raise EvaluationError(str(error)) from error
                records = {"": source[image_id]} if network is None else network.variants(image_id)
                try:
                    check_sizes(list(records.values())[-1].mask, truth, image_id)
                except EvaluationError as error:
                    raise MaskError(str(error)) from error
                counts = {}
                for name, record in records.items():
                    mask = record.mask if min_confidence is None else record.with_ignore(min_confidence)
                    counts[name] = confusion_matrix(mask, truth, len(names), image_id)
            except (ImageError, MaskError, MemoryError, RuntimeError) as error:
                skipped[image_id] = _reason(error).removeprefix(f"{image_id}: ")
                left_out.warn("%s: left out: %s", image_id, skipped[image_id])
                progress.advance(failed=1)
                continue
            for name, matrix in counts.items():
                matrices[name] = matrices.get(name, 0) + matrix
            image_miou[image_id] = Scores.from_matrix(matrix, names).miou if matrix.any() else None
            progress.advance()
    if not matrices:
        image_id, reason = next(iter(skipped.items()))
        raise EvaluationError(
            f"none of the {len(image_ids):,} images could be scored; the first, {image_id}: {reason}"
        )
    matrix = list(matrices.values())[-1]
    evaluation = Evaluation(
        variants={
            name: Variant(Scores.from_matrix(total, names), _crf(source, name))
            for name, total in matrices.items()
        },
        class_names=source.class_names,
        source=source.description,
        ground_truth=str(ground_truth),
        split=split.stem if split is not None else "all",
        min_confidence=min_confidence,
        image_miou=image_miou,
        matrix=matrix,
        missing=tuple(missing),
        skipped=skipped,
    )
    if report is not None and images is not None:
        masks = {} if pseudo_masks is None else {PSEUDO_MASK: pseudo_masks}
        masks |= {PSEUDO_MASK if isinstance(source, MaskCache) else PREDICTION: source}
        masks |= {GROUND_TRUTH: truths}
        write_file(report, evaluation_page(evaluation, images, masks, settings or {}))
    return evaluation


def _in_form_of(source: MaskSource, image_id: str) -> str:
    """An id in the Unicode form in which the masks have it; as it stands where they don't."""
    forms = (image_id, unicodedata.normalize("NFC", image_id), unicodedata.normalize("NFD", image_id))
    return next((form for form in forms if form in source), image_id)


def _reason(error: Exception) -> str:
    """Why an image is left out; what is no image's fault is raised again."""
    if is_out_of_memory(error):
        return "ran out of memory; give --window, fewer --scales, or a smaller image"
    if isinstance(error, RuntimeError):
        raise error
    return str(error)


def _crf(source: MaskSource, variant: str) -> dict[str, str] | None:
    """Backend and image of the dense CRF that the masks went through, or what they went through instead; None where
    not known."""
    if isinstance(source, MaskCache):
        determinants = source.manifest.mask_set.determinants
        parameters = dict(determinants.get("crf", {"backend": "none"}))
        parameters |= {"instead": "region vote"} if "vote" in determinants else {}
        parameters |= {"instead": "PAR"} if "par" in determinants else {}
    elif isinstance(source, NetworkMasks):
        refiner = source.segmenter.refiner
        none = {"backend": "none"}
        parameters = refiner.determinants().get("crf", none) if refiner and variant == CRF else none
    else:
        return None
    return {key: str(parameters[key]) for key in ("backend", "image", "instead") if key in parameters}


def report_without_ground_truth(
    report: Path,
    images: Mapping[str, ImageFile],
    pseudo_masks: MaskSource,
    predictions: MaskSource | None = None,
    settings: Mapping[str, object] | None = None,
) -> int:
    """Writes a page of the pseudo masks that are most likely wrong, the least sure ones, and those that differ most
    from the predictions.

    Args:
        images: image id to file; those without a pseudo mask are passed over.
        predictions: masks of another source; an image may have none.
        settings: settings of the run, for the page.

    Returns:
        The number of images that were looked at.

    Raises:
        EvaluationError: no image has a pseudo mask.
        OutputError: the file can't be written, or is there and this program didn't write it.
    """
    check_replaceable(report)
    quality = Quality(pseudo_masks.class_names)
    confidence: dict[str, float] = {}
    agreement: dict[str, float] = {}
    image_ids = [image_id for image_id in images if image_id in pseudo_masks]
    with Progress(len(image_ids)) as progress:
        for image_id in progress.over(image_ids):
            try:
                record = pseudo_masks[image_id]
                confidence[image_id] = float(record.confidence.mean()) / 2
                quality.add(image_id, record)
                if predictions is not None and image_id in predictions:
                    mask = predictions[image_id].mask
                    if mask.shape == record.mask.shape:
                        agreement[image_id] = 100 * float((mask == record.mask).mean())
            except (ImageError, MaskError, MemoryError, RuntimeError) as error:
                logger.warning("%s: left out: %s", image_id, _reason(error))
    if not confidence:
        raise EvaluationError(
            "no image of the folder has a pseudo mask in the cache: do they belong together?"
        )
    masks: dict[str, MaskSource] = {PSEUDO_MASK: pseudo_masks}
    masks |= {} if predictions is None else {PREDICTION: predictions}
    write_file(report, confidence_page(confidence, agreement, images, masks, settings or {}, quality))
    return len(confidence)
