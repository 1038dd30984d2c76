"""Scores pseudo masks, from a cache or a folder of PNGs, against ground truth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.errors import CacheRecordError, EvaluationError, ImageError
from wsss_pipeline.evaluation.metrics import IGNORE, Scores, check_sizes, confusion_matrix
from wsss_pipeline.evaluation.report import EvaluationResult, id_digest

logger = logging.getLogger(__name__)

VOC_TRAIN_IMAGES = 1_464
VOC_TRAIN_AUG_IMAGES = range(10_000, 11_000)  # 10,582; copies of the list differ by a few ids


@dataclass(frozen=True)
class _Predictions:
    """One source of masks: ``read(image_id)`` gives uint8 (H, W), 255 where there is no label."""

    has: Callable[[str], bool]
    read: Callable[[str], NDArray[np.uint8]]
    class_names: tuple[str, ...]
    description: str
    crf: dict[str, str] | None


def evaluate(
    ground_truth: Path,
    *,
    cache: Path | None = None,
    predictions: Path | None = None,
    class_names: Sequence[str] | None = None,
    split: Path | None = None,
    min_confidence: float | None = None,
    allow_missing: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    on_image: Callable[[str, NDArray[np.int64]], None] | None = None,
) -> EvaluationResult:
    """Scores the masks of ``cache`` or of ``predictions`` (exactly one of them).

    Args:
        ground_truth: folder of index masks (0 background, 1..C classes, 255 ignore), one per image id.
        cache: a mask set, as ``generate-masks`` prints it.
        predictions: folder of index masks with the same ids as the ground truth.
        class_names: the C names without the background; needed for ``predictions``, and for a cache
            only checked against its own.
        split: text file of the image ids to score; its name without suffix is the name of the split.
            Without one, every ground-truth file that has a prediction is scored.
        min_confidence: cache only; pixels below it count as misses.
        allow_missing: score the rest where images of the split have no prediction.
        progress: gets the image ids and yields them while it shows how far the run is.
        on_image: gets each image's id and confusion matrix, int64 (1+C, 2+C).

    Images that can't be read, or whose sizes differ, are left out and listed in ``skipped``.

    Raises:
        EvaluationError: nothing to score, predictions missing, values that fit no class, or options
            that contradict each other.
        CacheError, ImageError, LabelError: the cache, a folder or the split can't be read.
    """
    if (cache is None) == (predictions is None):
        raise EvaluationError("give either a cache or a folder of predictions (--cache or --predictions)")
    if cache is not None:
        source = _from_cache(cache, class_names, min_confidence)
    else:
        assert predictions is not None
        source = _from_folder(predictions, class_names, min_confidence)

    truth_files = find_images(ground_truth)
    image_ids, missing = choose_images(
        truth_files, source.has, source.description, ground_truth, split, allow_missing
    )
    matrix, scored, skipped = _add_up(progress(image_ids), truth_files, source, on_image)
    if not scored:
        reason = next(iter(skipped.values()))
        raise EvaluationError(f"none of the {len(image_ids):,} images could be scored; the first: {reason}")
    scores = Scores.from_matrix(matrix, ("background", *source.class_names))
    name = split.stem if split is not None else "all"
    return EvaluationResult(
        scores=scores,
        images=len(scored),
        split=name,
        id_digest=id_digest(scored),
        ground_truth=str(ground_truth),
        scored=source.description,
        crf=source.crf,
        min_confidence=min_confidence,
        missing=tuple(missing),
        skipped=skipped,
        warnings=tuple(remarks(source.class_names, name, len(scored), scores)),
    )


def _from_cache(path: Path, class_names: Sequence[str] | None, min_confidence: float | None) -> _Predictions:
    cache = MaskCache.open(path)
    if class_names is not None and tuple(class_names) != tuple(cache.class_names):
        raise EvaluationError(
            f"the classes given are not those of the cache {path} ({', '.join(cache.class_names)}): "
            "leave the classes out, the cache knows its own"
        )

    def read(image_id: str) -> NDArray[np.uint8]:
        pseudo_mask = cache[image_id]
        return pseudo_mask.mask if min_confidence is None else pseudo_mask.with_ignore(min_confidence)

    return _Predictions(
        has=cache.__contains__,
        read=read,
        class_names=tuple(cache.class_names),
        description=f"mask set {cache.path}",
        crf=_crf(cache),
    )


def _crf(cache: MaskCache) -> dict[str, str]:
    """Backend and image of the dense CRF, from what the mask set was made with."""
    parameters = cache.manifest.mask_set.determinants.get("crf", {})
    return {key: str(parameters[key]) for key in ("backend", "image") if key in parameters}


def _from_folder(
    folder: Path, class_names: Sequence[str] | None, min_confidence: float | None
) -> _Predictions:
    if class_names is None:
        raise EvaluationError(f"predictions {folder}: masks don't know their class names; give --classes")
    if min_confidence is not None:
        raise EvaluationError(
            f"predictions {folder}: a folder of masks holds no confidence; drop --min-confidence or give --cache"
        )
    files = find_images(folder)
    return _Predictions(
        has=files.__contains__,
        read=lambda image_id: read_mask(files[image_id]),
        class_names=tuple(class_names),
        description=f"predictions {folder}",
        crf=None,
    )


def choose_images(
    truth_files: Mapping[str, ImageFile],
    has: Callable[[str], bool],
    description: str,
    ground_truth: Path,
    split: Path | None,
    allow_missing: bool,
) -> tuple[list[str], list[str]]:
    """The ids to score, and those for which ``has`` says that there is no prediction.

    Raises:
        EvaluationError: nothing to score, or a part of a split is missing and ``allow_missing`` is false.
    """
    wanted = list(truth_files) if split is None else list(dict.fromkeys(read_split(split)))
    if not wanted:
        raise EvaluationError(f"{split or ground_truth}: no image to score in it")
    without_truth = [image_id for image_id in wanted if image_id not in truth_files]
    if without_truth:
        raise EvaluationError(
            f"ground truth {ground_truth} lacks {len(without_truth):,} of the {len(wanted):,} images of {split}, "
            f"the first is '{without_truth[0]}'; give the folder or the split that belongs to the other"
        )
    missing = [image_id for image_id in wanted if not has(image_id)]
    if len(missing) == len(wanted):
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
    absent = set(missing)
    return [image_id for image_id in wanted if image_id not in absent], missing


def _add_up(
    image_ids: Iterable[str],
    truth_files: Mapping[str, ImageFile],
    source: _Predictions,
    on_image: Callable[[str, NDArray[np.int64]], None] | None,
) -> tuple[NDArray[np.int64], list[str], dict[str, str]]:
    """Confusion matrix over the images, the ids that are in it, and reasons for those that aren't."""
    num_classes = len(source.class_names) + 1
    matrix = np.zeros((num_classes, num_classes + 1), np.int64)
    scored: list[str] = []
    skipped: dict[str, str] = {}
    any_ignored = False
    for image_id in image_ids:
        try:
            truth = read_mask(truth_files[image_id])
            prediction = source.read(image_id)
            check_sizes(prediction, truth, image_id)
        except (CacheRecordError, EvaluationError, ImageError) as error:
            logger.warning("%s: left out: %s", image_id, error)
            skipped[image_id] = str(error)
            continue
        # Values that fit no class end the run: they say that the class set is wrong, not the image.
        counts = confusion_matrix(prediction, truth, num_classes, str(truth_files[image_id]))
        matrix += counts
        if on_image is not None:
            on_image(image_id, counts)
        scored.append(image_id)
        any_ignored = any_ignored or bool((truth == IGNORE).any())
    if scored and any_ignored and not matrix[1:].any():
        raise EvaluationError(
            f"ground truth such as {truth_files[scored[0]]} holds 0 and 255 only: binary masks? 255 means "
            "'ignore' here, so write objects as their class index, 1 for the first class"
        )
    return matrix, scored, skipped


def remarks(class_names: tuple[str, ...], split: str, images: int, scores: Scores) -> Iterable[str]:
    """What a reader has to know before comparing the number with another one."""
    if images in VOC_TRAIN_AUG_IMAGES and class_names == load_class_set("voc12").names:
        yield (
            f"split {split} has {images:,} images: published figures use train ({VOC_TRAIN_IMAGES:,} images) "
            "and can't be compared with train_aug"
        )
    if scores.ignored_predictions > 0:
        yield (
            f"{100 * scores.ignored_predictions:.2f} % of the scored pixels have no label and count as misses: "
            "published figures score masks without 255"
        )
