"""Scores a trained network against ground truth: as it is, at several scales, and after the dense CRF."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.errors import EvaluationError, ImageError
from wsss_pipeline.evaluation.metrics import Scores, check_sizes, confusion_matrix
from wsss_pipeline.evaluation.report import EvaluationResult, id_digest
from wsss_pipeline.refine import choose_backend, crf_image, dense_crf, unary_from_scores
from wsss_pipeline.runtime.device import resolve_device
from wsss_pipeline.segmentation.checkpoint import find_checkpoint, load_network
from wsss_pipeline.segmentation.inference import InferenceConfig, predict_probabilities
from wsss_pipeline.segmentation.networks import SegmentationNetwork
from wsss_pipeline.stages.evaluate import choose_images, remarks

logger = logging.getLogger(__name__)

RAW, CRF = "raw", "+CRF"


@dataclass(frozen=True)
class NetworkMasks:
    """What a network makes of pictures.

    Attributes:
        network: in evaluation mode, on ``device``.
        class_names: of mask values 1..C.
        images: image id to file.
        inference: scales, flip, windows.
        crf: its parameters with the backend resolved; None for none.
        description: where the network is from.
    """

    network: SegmentationNetwork
    class_names: tuple[str, ...]
    images: Mapping[str, ImageFile]
    device: torch.device
    inference: InferenceConfig
    crf: CrfConfig | None = None
    description: str = "network"

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of what ``probabilities`` gives, the most refined one last."""
        several = [] if self.inference.is_single else [_name(self.inference)]
        crf = [CRF] if self.crf is not None else []
        return (RAW, *several, *crf)

    def probabilities(self, image_id: str) -> dict[str, NDArray[np.float32]]:
        """float32 (1+C, H, W) by variant; ImageError where the picture can't be read."""
        image = read_image(self.images[image_id])
        single = replace(self.inference, scales=(1.0,), flip=False)
        found = {RAW: predict_probabilities(self.network, image, single, self.device)}
        if not self.inference.is_single:
            found[_name(self.inference)] = predict_probabilities(
                self.network, image, self.inference, self.device
            )
        if self.crf is not None:
            last = list(found.values())[-1]
            picture = crf_image(image, self.crf.image)
            backend = self.crf.backend
            assert backend != "auto"
            found[CRF] = dense_crf(picture, unary_from_scores(last), self.crf, backend, str(self.device))
        return found

    def mask(self, image_id: str) -> NDArray[np.uint8]:
        """uint8 (H, W) of the most refined variant."""
        return self.masks(image_id)[self.variants[-1]]

    def masks(self, image_id: str) -> dict[str, NDArray[np.uint8]]:
        """uint8 (H, W) by variant."""
        return {
            name: values.argmax(axis=0).astype(np.uint8)
            for name, values in self.probabilities(image_id).items()
        }


def _name(inference: InferenceConfig) -> str:
    scales = ",".join(f"{scale:g}" for scale in inference.scales)
    return f"scales {scales}" + (" flip" if inference.flip else "")


@dataclass(frozen=True)
class NetworkEvaluation:
    """One result a variant, the most refined one last."""

    results: dict[str, EvaluationResult]

    @property
    def last(self) -> EvaluationResult:
        """The most refined one."""
        return list(self.results.values())[-1]

    def as_json(self) -> dict[str, Any]:
        """The last variant's values at the top level, all of them under ``variants``."""
        variants = {name: result.as_json() for name, result in self.results.items()}
        return {**self.last.as_json(), "variant": list(self.results)[-1], "variants": variants}

    def as_text(self) -> str:
        """Table of IoU in percent, a column a variant, then what was measured on what."""
        from rich.cells import cell_len

        names = list(self.last.scores.per_class_iou)
        first = max(cell_len(name) for name in (*names, "mIoU"))

        def row(name: str, values: Iterable[str]) -> str:
            cells = (f"{value:>{len(variant)}}" for value, variant in zip(values, heads, strict=True))
            return "  ".join([name + " " * (first - cell_len(name)), *cells])

        heads = [f"{variant:>8}" for variant in self.results]
        scores = [result.scores for result in self.results.values()]
        lines = [row("IoU %", heads), row("-" * first, ["-" * len(head) for head in heads])]
        for name in names:
            values = (score.per_class_iou[name] for score in scores)
            lines.append(row(name, ["-" if value is None else f"{100 * value:.2f}" for value in values]))
        lines.append(row("mIoU", [f"{100 * score.miou:.2f}" for score in scores]))
        if None in scores[0].per_class_iou.values():
            lines.append("(-: not in the ground truth, in no mean)")
        return "\n".join([*lines, "", *self.last.origin_lines()])


def load_network_masks(
    checkpoint: Path,
    images: Path,
    *,
    inference: InferenceConfig | None = None,
    crf: CrfConfig | None = None,
    device: str = "auto",
) -> NetworkMasks:
    """The network of ``checkpoint``, a training run or a checkpoint folder, over a folder of pictures.

    Args:
        inference: how pictures go through the network; as they are, where None.
        crf: refine with the dense CRF; its backend may be ``auto``.

    Raises:
        CheckpointError, ImageError, ConfigError: no network, no folder, no such device.
    """
    place = resolve_device(device)
    loaded = load_network(checkpoint, place)
    return NetworkMasks(
        loaded.network,
        loaded.class_names,
        find_images(images),
        place,
        inference or InferenceConfig(),
        crf.model_copy(update={"backend": choose_backend(crf.backend)}) if crf is not None else None,
        f"network {find_checkpoint(checkpoint)}",
    )


def evaluate_network(
    masks: NetworkMasks,
    ground_truth: Path,
    *,
    split: Path | None = None,
    allow_missing: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    on_image: Callable[[str, NDArray[np.int64]], None] | None = None,
) -> NetworkEvaluation:
    """Scores a network; arguments as for ``evaluate``, ``on_image`` for the most refined variant.

    Raises:
        EvaluationError, ImageError, LabelError: what can't be read or doesn't fit together.
    """
    truth_files = find_images(ground_truth)
    image_ids, missing = choose_images(
        truth_files, masks.images.__contains__, "the folder of pictures", ground_truth, split, allow_missing
    )
    skipped: dict[str, str] = {}
    scores = confusion(masks, progress(image_ids), truth_files, skipped, on_image)
    scored = [image_id for image_id in image_ids if image_id not in skipped]
    split_name = split.stem if split is not None else "all"
    results = {
        name: EvaluationResult(
            scores=found,
            images=len(scored),
            split=split_name,
            id_digest=id_digest(scored),
            ground_truth=str(ground_truth),
            scored=f"{masks.description} ({name})",
            crf={"backend": masks.crf.backend, "image": masks.crf.image}
            if masks.crf is not None and name == CRF
            else {"backend": "none"},
            min_confidence=None,
            missing=tuple(missing),
            skipped=skipped,
            warnings=tuple(remarks(masks.class_names, split_name, len(scored), found)),
        )
        for name, found in scores.items()
    }
    return NetworkEvaluation(results)


def confusion(
    masks: NetworkMasks,
    image_ids: Iterable[str],
    truth_files: Mapping[str, ImageFile],
    skipped: dict[str, str] | None = None,
    on_image: Callable[[str, NDArray[np.int64]], None] | None = None,
) -> dict[str, Scores]:
    """Scores by variant over all images; those that can't be used go into ``skipped`` with the reason.

    Raises:
        EvaluationError: values that fit no class, or nothing could be scored.
    """
    names = ("background", *masks.class_names)
    matrices = {name: np.zeros((len(names), len(names) + 1), np.int64) for name in masks.variants}
    problems = {} if skipped is None else skipped
    for image_id in image_ids:
        try:
            truth = read_mask(truth_files[image_id])
            found = masks.masks(image_id)
            check_sizes(found[RAW], truth, image_id)
        except (EvaluationError, ImageError) as error:
            logger.warning("%s: left out: %s", image_id, error)
            problems[image_id] = str(error)
            continue
        for name, mask in found.items():
            counts = confusion_matrix(mask, truth, len(names), str(truth_files[image_id]))
            matrices[name] += counts
        if on_image is not None:
            on_image(image_id, counts)
    if not any(matrix.any() for matrix in matrices.values()):
        first = next(iter(problems.values()), "no image")
        raise EvaluationError(f"none of the images could be scored; the first: {first}")
    return {name: Scores.from_matrix(matrix, names) for name, matrix in matrices.items()}
