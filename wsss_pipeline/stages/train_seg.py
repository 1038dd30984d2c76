"""Stage two: a segmentation network trained on cached pseudo masks."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from wsss_pipeline.config import InferenceConfig, differing_keys, to_yaml
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.errors import CheckpointError, ConfigError, MissingDependencyError, TrainingError
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.evaluation.result import id_digest
from wsss_pipeline.runtime.device import resolve_device
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.segmentation.augmentation import Augmentation
from wsss_pipeline.segmentation.dataset import SegmentationDataset, training_ids
from wsss_pipeline.segmentation.inference import predict_probabilities
from wsss_pipeline.segmentation.mask_sources import CachedMasks, GroundTruthMasks, MaskSource
from wsss_pipeline.segmentation.networks import SegmentationNetwork, build_network
from wsss_pipeline.segmentation.pretrained import load_pretrained
from wsss_pipeline.segmentation.train_config import TrainConfig, load_train_config
from wsss_pipeline.segmentation.trainer import BEST, LAST, Trainer, TrainingHooks
from wsss_pipeline.stages.evaluate import choose_images

logger = logging.getLogger(__name__)

CONFIG, DATA = "config.yaml", "data.json"


@dataclass(frozen=True)
class Validation:
    """Ground truth to validate on: image id to picture, and to index mask; both hold the same ids."""

    images: Mapping[str, ImageFile]
    truth: Mapping[str, ImageFile]


@dataclass(frozen=True)
class TrainRequest:
    """A training run as the user asked for it.

    ``images``: image id to file. ``source``: of the masks. ``split``: ids to train on, all without it. ``out``:
    the run's folder. ``workers``: processes that load samples. ``track``: name of an accelerate tracker.
    """

    images: Mapping[str, ImageFile]
    source: MaskSource
    config: TrainConfig
    out: Path
    split: Sequence[str] | None = None
    validation: Validation | None = None
    device: str = "auto"
    workers: int = 0
    allow_missing: bool = False
    overwrite: bool = False
    offline: bool = False
    track: str | None = None


@dataclass(frozen=True)
class TrainResult:
    """``checkpoint``: the best network where there was validation, else the last. ``miou``: its mIoU in [0, 1]."""

    checkpoint: Path
    miou: float | None
    steps: int
    interrupted: bool


def open_source(
    cache: Path | None, ground_truth: Path | None, class_names: Sequence[str] | None
) -> MaskSource:
    """Masks of a cache, or of a folder of ground truth whose classes are ``class_names``.

    Raises:
        ConfigError: not exactly one of the two, or classes missing.
        CacheError, ImageError: it can't be read.
    """
    if (cache is None) == (ground_truth is None):
        raise ConfigError("give the masks once: --cache DIR, or --gt-masks DIR for ground truth")
    if cache is not None:
        return CachedMasks(cache)
    assert ground_truth is not None
    if class_names is None:
        raise ConfigError("--gt-masks needs --classes: a folder of masks doesn't know its class names")
    return GroundTruthMasks(ground_truth, class_names)


def train_seg(
    request: TrainRequest, log: Callable[[dict[str, Any]], None] = lambda numbers: None
) -> TrainResult:
    """Trains a network, or goes on where an interrupted run stopped; does nothing where one has ended.

    Raises:
        WsssError: nothing can be trained: masks missing, weights not there, another run in the folder, NaN.
    """
    ids = training_ids(request.images, request.source, request.split, request.allow_missing)
    accelerator = _accelerator(request)
    config = request.config
    if accelerator.is_main_process:
        _prepare_folder(request, ids, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if request.track:
        accelerator.init_trackers("wsss")
    torch.manual_seed(config.seed)
    class_names = request.source.class_names
    network = build_network(config.network, 1 + len(class_names))
    if not (request.out / LAST).exists():
        load_pretrained(network, config.network, request.offline)
    dataset = SegmentationDataset(
        request.images, request.source, ids, Augmentation(config.augmentation), config.seed
    )
    if accelerator.is_main_process:
        for line in _lines(request, ids, network):
            logger.info("%s", line)
    trainer = Trainer(accelerator, config, network, dataset, class_names, request.out, request.workers)
    if trainer.progress.step:
        logger.info("going on after update %d of %d", trainer.progress.step, config.optimisation.iterations)
    with StopRequest() as stop:
        validate = _validation(request, accelerator.device, class_names)
        ended = trainer.run(TrainingHooks(validate, lambda: stop.requested, log))
    accelerator.end_training()
    progress = trainer.progress
    name = BEST if progress.best_miou is not None else LAST
    return TrainResult(request.out / name, progress.best_miou, progress.step, not ended)


def train_seeds(
    request: TrainRequest, seeds: int, log: Callable[[dict[str, Any]], None] = lambda numbers: None
) -> list[TrainResult]:
    """Trains ``seeds`` networks into ``out/seed-0`` and so on, which differ in their seed alone."""
    first = request.config.seed
    results = []
    for seed in range(first, first + seeds):
        config = request.config.model_copy(update={"seed": seed})
        results.append(train_seg(replace(request, config=config, out=request.out / f"seed-{seed}"), log))
        if results[-1].interrupted:
            break
    return results


def spread(results: Sequence[TrainResult]) -> str:
    """Mean and standard deviation of the runs' mIoU as a person reads them."""
    values = [100 * result.miou for result in results if result.miou is not None]
    if not values:
        return f"{len(results)} networks trained; without ground truth there is no mIoU to compare"
    deviation = f" ± {statistics.stdev(values):.2f} (standard deviation)" if len(values) > 1 else ""
    listed = ", ".join(f"{value:.2f}" for value in values)
    return f"mIoU {statistics.fmean(values):.2f}{deviation} over {len(values)} seeds: {listed}"


def _accelerator(request: TrainRequest) -> Accelerator:
    device = resolve_device(request.device)
    precision = request.config.precision
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=request.track,
            project_dir=str(request.out),
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--track {request.track}: {reason}") from error
    if request.track and not accelerator.log_with:  # accelerate leaves out a tracker that isn't installed
        raise MissingDependencyError(
            f"--track {request.track} isn't installed; for tensorboard, pip install 'wsss-pipeline[track]'"
        )
    return accelerator


def _prepare_folder(request: TrainRequest, ids: Sequence[str], processes: int) -> None:
    """Writes what the run is, or refuses a folder that holds another one."""
    data = {
        "masks": getattr(request.source, "fingerprint", request.source.description),
        "classes": list(request.source.class_names),
        "images": len(ids),
        "ids": id_digest(ids),
        "processes": processes,
    }
    try:
        if request.overwrite and request.out.exists():
            shutil.rmtree(request.out)
        request.out.mkdir(parents=True, exist_ok=True)
        if (request.out / CONFIG).exists():
            _check_same(request, data)
            return
        if any(request.out.iterdir()):
            raise TrainingError(f"{request.out} holds something else; give an empty folder, or --overwrite")
        (request.out / DATA).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (request.out / CONFIG).write_text(to_yaml(request.config), "utf-8")
    except OSError as error:
        raise CheckpointError(f"{request.out} can't be written: {error.strerror or error}") from error


def _check_same(request: TrainRequest, data: dict[str, Any]) -> None:
    before = load_train_config(file=request.out / CONFIG)
    changes = differing_keys(before, request.config)
    try:
        known = json.loads((request.out / DATA).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{request.out / DATA} can't be read; start anew with --overwrite") from error
    changes += [f"{key}: {known.get(key)}, {value}" for key, value in data.items() if known.get(key) != value]
    if changes:
        raise TrainingError(
            f"{request.out} holds a run with other settings ({'; '.join(changes)}): give another --out, the former "
            "settings, or --overwrite"
        )


def _lines(request: TrainRequest, ids: Sequence[str], network: SegmentationNetwork) -> list[str]:
    config = request.config
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    kind, threshold = config.loss.confidence, config.loss.min_confidence
    return [
        f"network: {config.network.name}, {config.network.encoder}, {millions:.1f} M parameters, "
        f"weights {config.network.weights}",
        f"masks: {request.source.description}, {len(ids):,} images (ids {id_digest(ids)})",
        f"loss: {kind} confidence from {threshold:g}{', balanced' if config.loss.balanced else ''}",
        f"training: {config.optimisation.iterations:,} updates of "
        f"{config.optimisation.batch * config.optimisation.accumulate} pictures a process, seed {config.seed}",
    ]


def _validation(
    request: TrainRequest, device: torch.device, class_names: tuple[str, ...]
) -> Callable[[SegmentationNetwork], float] | None:
    validation = request.validation
    if validation is None:
        return None

    def validate(network: SegmentationNetwork) -> float:
        names = ("background", *class_names)
        matrix = np.zeros((len(names), len(names) + 1), np.int64)
        for image_id, file in validation.truth.items():
            image = read_image(validation.images[image_id])
            mask = predict_probabilities(network, image, InferenceConfig(), device).argmax(axis=0)
            matrix += confusion_matrix(mask.astype(np.uint8), read_mask(file), len(names), str(file))
        return Scores.from_matrix(matrix, names).miou

    return validate


def validation_images(ground_truth: Path, images: Path, split: Path | None) -> Validation:
    """Pictures and ground truth of one split, or of all ground truth that has a picture.

    Raises:
        EvaluationError: nothing to validate on, or a part of the split is missing.
    """
    truth, pictures = find_images(ground_truth), find_images(images)
    ids, _ = choose_images(truth, pictures.__contains__, str(images), ground_truth, split, False)
    return Validation(pictures, {image_id: truth[image_id] for image_id in ids})
