"""Stage two: a segmentation network trained on pseudo masks."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from wsss_pipeline.config import LabelFormat, PixelRange
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import ImageWarnings, read_image, read_stored_image
from wsss_pipeline.data.label_readers.label_table import OtherClasses
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.data.masks import (
    CERTAIN,
    MaskFolder,
    MaskSource,
    half_percent_threshold,
    ignore_value,
)
from wsss_pipeline.errors import (
    ConfigError,
    EvaluationError,
    ImageError,
    MaskError,
    MissingDependencyError,
    TrainingError,
)
from wsss_pipeline.evaluation.metrics import Scores, check_sizes, confusion_matrix
from wsss_pipeline.evaluation.result import id_digest
from wsss_pipeline.methods import load_mask_config, load_method, method_names
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.runtime.device import is_out_of_memory, resolve_device, resolve_precision
from wsss_pipeline.runtime.output import check_apart, one_line
from wsss_pipeline.segmentation.augmentation import Augmentation, OpenCvAugmentation
from wsss_pipeline.segmentation.checkpoint import BEST, LAST, check_frozen
from wsss_pipeline.segmentation.clip_network import ClipNetwork
from wsss_pipeline.segmentation.coverage import surest
from wsss_pipeline.segmentation.dataset import ImageLabels, SegmentationDataset, usable_ids
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.pretrained import load_pretrained
from wsss_pipeline.segmentation.run_folder import run_folder
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import TRANSFORMERS, OnlineConfig, TrainConfig, load_train_config
from wsss_pipeline.segmentation.trainer import STATE, Trainer

logger = logging.getLogger(__name__)

MASKS_LOOKED_AT = 32  # for what a confidence threshold leaves of them
IMAGES_LOOKED_AT = 32  # for what is worth a warning
LEAST_COUNTED = 0.05  # of the objects' pixels; with less a network learns the background


@dataclass(frozen=True)
class TrainJob:
    """A training run as the user asks for it.

    Attributes:
        images: folder of the images.
        masks: masks of these images, a mask set, or a folder of ground truth; None where the settings name a method
            that makes them in training.
        out: folder of the run; one that holds the same run goes on.
        config: settings, see ``TrainConfig``.
        labels: image-level labels, see ``read_labels``, for targets that are made in training.
        classes: class set of such targets, and the colours of ground truth, as ``--classes`` has it; None for that
            of the method's preset.
        split: text file of the ids to train on; None for all images.
        val_gt: folder of ground-truth masks to validate on; None for no validation.
        val_images: folder of their images; None for ``images``.
        val_split: text file of the ids to validate on; None for all ground truth that has an image.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: number of processes that load samples.
        allow_missing: choice to leave out images that lack a file or a mask.
        overwrite: choice to start anew in a folder that holds a run.
        offline: choice to fetch no weights.
        track: name of a tracker of accelerate, such as tensorboard.
        image_suffix: choice of the images' files, see ``find_images``.
        gt_suffix: ending of the names in ``val_gt``.
        labels_format: name of the labels' form; None for what their content shows.
        other_classes: what becomes of labels that are none of these, see ``LabelTable``.
        leave_out: text file of ids that aren't trained on all the same; None for none.
    """

    images: Path
    masks: MaskSource | None
    out: Path
    config: TrainConfig = field(default_factory=TrainConfig)
    labels: Path | None = None
    classes: str | None = None
    split: Path | None = None
    val_gt: Path | None = None
    val_images: Path | None = None
    val_split: Path | None = None
    device: str = "auto"
    workers: int = 2
    allow_missing: bool = False
    overwrite: bool = False
    offline: bool = False
    track: str | None = None
    image_suffix: str | None = None
    gt_suffix: str | None = None
    labels_format: LabelFormat | None = None
    other_classes: OtherClasses = "error"
    leave_out: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        checkpoint: folder of the best network where there was validation, else of the last.
        miou: the best network's, in [0, 1]; None without validation.
        steps: number of updates done.
        interrupted: True where some are left.
    """

    checkpoint: Path
    miou: float | None
    steps: int
    interrupted: bool


def train_seg(job: TrainJob) -> TrainResult:
    """Trains a network, or goes on where an interrupted run stopped; does nothing where one has ended.

    Raises:
        WsssError: nothing can be trained: masks missing, weights not there, another run in the folder, NaN.
    """
    inputs = {"--images": job.images, "--split": job.split, "--val-gt": job.val_gt, "--labels": job.labels}
    inputs |= {"--val-images": job.val_images, "--val-split": job.val_split, "--leave-out": job.leave_out}
    check_apart(job.out, "--out", {**inputs, "the masks": getattr(job.masks, "path", None)})
    images = find_images(job.images, job.image_suffix, option="--image-suffix")
    accelerator = _accelerator(job)
    generator = _generator(job, accelerator.device) if job.config.online.method else None
    if generator is not None:
        masks: MaskSource | ImageLabels = _image_labels(job, images, generator)
    elif job.masks is not None:
        masks = job.masks
        if isinstance(masks, MaskFolder):
            masks.check_sizes(images)
    else:
        raise ConfigError("no masks to train on, and no online.method that makes them")
    wanted = read_split(job.split, images) if job.split else list(images)
    if job.leave_out is not None:
        wanted = _without(wanted, job.leave_out, images)
    ids = usable_ids(images, masks, wanted, job.allow_missing)
    validate = _validation(job, job.val_gt, masks.class_names, accelerator) if job.val_gt else None
    with _run_folder(job, masks, ids, accelerator) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        return _train(job, images, masks, ids, generator, accelerator, validate)


def _without(ids: Sequence[str], leave_out: Path, images: Mapping[str, ImageFile]) -> list[str]:
    """The ids that a list of images to leave out doesn't name; what it comes to is said.

    Raises:
        LabelError: the list can't be read.
        TrainingError: it names all of them.
    """
    listed = set(read_split(leave_out, images))
    kept = [image_id for image_id in ids if image_id not in listed]
    left_out = len(ids) - len(kept)
    if ids and not kept:
        raise TrainingError(
            f"--leave-out {leave_out} names all {left_out:,} images: no image is left to train on"
        )
    logger.info(f"left out: {left_out:,} of {len(ids):,} images, as {leave_out} says")
    if unknown := sorted(listed.difference(ids)):
        logger.warning(
            "%s names %s ids that aren't among the images to train on, such as %s",
            leave_out,
            f"{len(unknown):,}",
            one_line(unknown[0], 200),
        )
    return kept


def _generator(job: TrainJob, device: torch.device) -> MaskGenerator:
    """What makes the targets; CLIP isn't loaded yet.

    Raises:
        ConfigError: the method can't make any in training.
    """
    config = job.config
    check_makes_targets(config.online.method)
    name, _, preset = config.online.method.partition("/")
    flags = {"method": name, "classes": job.classes, "clip.weights": config.network.encoder}
    flags["clip.precision"] = config.precision
    if any(text.partition("=")[0].strip().endswith(".checkpoint") for text in config.online.settings):
        raise ConfigError(
            "online.settings: no checkpoint helps in training, the network itself does; leave it out, and start "
            "from its weights with --weights RUN/last/model.safetensors"
        )
    try:
        settings = load_mask_config(
            config.online.method if preset else None, None, config.online.settings, flags
        )
    except ConfigError as error:  # it knows them as --set of another command
        raise ConfigError(str(error).replace("--set ", "online.settings ", 1)) from error
    if not settings.classes:
        raise ConfigError(
            "--online needs classes: give --classes voc12, FILE.yaml or cat,dog, or a preset such as --online "
            f"{name}/voc12"
        )
    return MaskGenerator(config=settings, device=str(device), offline=job.offline)


def check_makes_targets(method: str) -> None:
    """A ConfigError where a method, METHOD or METHOD/PRESET, can't make targets in training."""
    name = method.partition("/")[0]
    if not hasattr(load_method(name), "cams"):
        able = ", ".join(known for known in method_names() if hasattr(load_method(known), "cams"))
        raise ConfigError(
            f"--online {name}: it makes no targets in training; choose one of {able}, or make masks first with "
            "generate-masks and give --cache"
        )


def _image_labels(job: TrainJob, images: Mapping[str, ImageFile], generator: MaskGenerator) -> ImageLabels:
    """The labels that targets are made of, and what tells them, with how it is done, from others."""
    class_set, mask_set = generator.class_set, generator.mask_set
    present = {
        image_id: tuple(sorted(map(class_set.index, names)))
        for image_id, names in read_labels(
            job.labels, images, class_set, job.labels_format, job.other_classes
        ).items()
    }
    digest = hashlib.sha256(json.dumps(sorted(present.items())).encode()).hexdigest()[:12]
    identity = f"online {mask_set.fingerprint[:12]}, labels {digest}"
    return ImageLabels(class_set.names, present, identity, f"labels {job.labels or job.images}")


def _train(
    job: TrainJob,
    images: Mapping[str, ImageFile],
    masks: MaskSource | ImageLabels,
    ids: list[str],
    generator: MaskGenerator | None,
    accelerator: Accelerator,
    validate: Callable[[SegmentationNetwork], float] | None,
) -> TrainResult:
    config, out = job.config, job.out
    if job.track:
        accelerator.init_trackers("wsss")
    torch.manual_seed(config.seed)
    network = build_network(
        config.network,
        1 + len(masks.class_names),
        class_names=masks.class_names,
        clip=None if generator is None else generator.loaded_clip,
        precision=resolve_precision(config.precision, accelerator.device),
        offline=job.offline,
    )
    if isinstance(network, ClipNetwork):
        crop, patch, smallest = config.augmentation.crop, network.multiple, network.smallest
        if crop % patch or crop < smallest:
            least = f", from {smallest} on" if smallest > patch else ""
            raise ConfigError(
                f"--crop {crop} isn't a multiple of {patch}, the patch of this CLIP{least}; "
                f"{max(smallest, crop // patch * patch)} is"
            )
        if (out / LAST).exists():
            check_frozen(network, out / LAST)
    if not (out / STATE).exists():
        load_pretrained(network, config.network, job.offline)
    augment = OpenCvAugmentation if config.augmentation.style == "opencv" else Augmentation
    augmentation = augment(config.augmentation, network.image_mean, network.image_std)
    # masks that were made of a part of the values belong to that part
    network.pixel_range = config.images.pixel_range or getattr(masks, "pixel_range", None)
    coverage, least_confidence = None, None
    if config.loss.keep and not isinstance(masks, ImageLabels):
        coverage = surest(masks, ids, config.loss.keep, is_shown=accelerator.is_main_process)
        least_confidence = torch.from_numpy(coverage.least)
    dataset = SegmentationDataset(
        images, masks, ids, augmentation, config.seed, network.pixel_range, least_confidence
    )
    online = None if generator is None else _online_target(config, network, generator)
    trainer = Trainer(accelerator, config, network, dataset, out, job.workers, online)
    state = trainer.state
    if accelerator.is_main_process:
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        chosen, loss, optimisation = config.network, config.loss, config.optimisation
        precision = accelerator.mixed_precision.replace("no", "fp32")
        balanced = ", balanced" if loss.balanced else ""
        encoder, ending = chosen.encoder, f", weights {chosen.weights}"
        if isinstance(network, ClipNetwork):
            dino = chosen.frozen.dino if isinstance(network, FrozenClip) else ""
            built_on = " and ".join(filter(None, (chosen.encoder, dino)))
            encoder, ending = built_on + (" (frozen)" if network.frozen.modules else ""), " to train"
        logger.info(f"network: {chosen.name}, {encoder}, {millions:.2f} M parameters{ending}")
        kind = "data" if isinstance(masks, ImageLabels) else "masks"
        logger.info(f"{kind}: {masks.description}, {len(ids):,} images (ids {id_digest(ids)})")
        counted, foreground = "", 1.0
        if isinstance(masks, ImageLabels):
            logger.info(f"targets: {_told(config.online)}")
        else:
            if coverage is None:
                background, foreground = _counted(masks, ids, loss.min_confidence)
            else:
                background, foreground = coverage.share(slice(1)), coverage.share(slice(1, None))
            counted = (
                f"; {background:.0%} of the background and {foreground:.0%} of the objects' pixels count"
            )
        further = "".join(
            f", {name} {weight:g}"
            for name, weight in (
                *(("affinity", loss.affinity), ("Dice", loss.dice), ("cross", loss.cross)),
                *(("seeding", loss.seeding), ("boundary", loss.boundary), ("score", loss.score)),
            )
            if weight
        )
        sure = f"from {loss.min_confidence:g}"
        if coverage is not None:
            there = coverage.least[coverage.pixels > 0] / CERTAIN
            sure = f"of the surest {loss.keep:.0%} of each class, from {there.min():g} to {there.max():g}"
        logger.info(f"loss: {loss.confidence} confidence {sure}{balanced}{further}{counted}")
        _warn_of_images(images, ids, network.pixel_range)
        if foreground < LEAST_COUNTED:
            logger.warning(
                "of the objects' pixels %.1f %% are certain enough to count: lower --min-confidence, or train on the "
                "surest of each class with --keep 0.8 (PAR is far less sure of its labels than the CRF)",
                100 * foreground,
            )
        logger.info(
            f"training: {optimisation.iterations:,} updates of {optimisation.batch * optimisation.accumulate} images "
            f"a process, seed {config.seed}, on {accelerator.device} in {precision}"
        )
        if state.step:
            logger.info(f"going on after update {state.step} of {optimisation.iterations}")
    ended = trainer.run(validate)
    for tracker in accelerator.trackers:
        tracker.finish()
    name = BEST if state.best_miou is not None else LAST
    return TrainResult(out / name, state.best_miou, state.step, not ended)


def _online_target(
    config: TrainConfig, network: SegmentationNetwork, generator: MaskGenerator
) -> OnlineTarget:
    """What makes the targets of a batch; NetworkError where method and network don't fit together."""
    assert isinstance(network, FrozenClip)
    method: Any = generator.method
    network.check_method(generator.config.method, method.encoding)
    if config.online.guide_from and "guide" not in method.helped_by:
        raise ConfigError(
            f"online.guide_from: {generator.config.method} takes no guide; leave it out, or give --online excel"
        )
    statistics = network.image_mean, network.image_std
    return OnlineTarget(method, generator.refiner, config.online, *statistics, generator.config.confidence)


def _told(online: OnlineConfig) -> str:
    """How targets are made in training, as a person reads it."""
    starts = {
        "gated": online.gate_from,
        "guided": online.guide_from,
        "own affinity": online.self_affinity_from,
        "own sure labels": online.override_from,
    }
    later = ", ".join(f"{name} from update {start:,}" for name, start in starts.items() if start)
    return f"{online.method}, made of each batch's crops" + (f"; {later}" if later else "")


def _warn_of_images(
    images: Mapping[str, ImageFile], ids: Sequence[str], pixel_range: PixelRange | None
) -> None:
    """Warnings of what some of the images are taken for."""
    with ImageWarnings() as warnings:
        for image_id in ids[:: max(1, len(ids) // IMAGES_LOOKED_AT)]:
            with suppress(ImageError, MemoryError):  # as it comes up, it is warned of
                warnings.warn(images[image_id], read_stored_image(images[image_id], pixel_range).remarks)


def _counted(masks: MaskSource, ids: Sequence[str], min_confidence: float) -> tuple[float, float]:
    """Shares of background and foreground pixels that are certain enough, over some of the masks."""
    pixels, counted, least = [0, 0], [0, 0], half_percent_threshold(min_confidence)
    ignore = ignore_value(1 + len(masks.class_names))
    for image_id in ids[:: max(1, len(ids) // MASKS_LOOKED_AT)]:
        with suppress(MaskError, ImageError):  # as it comes up, it is warned of
            record = masks[image_id]
            for number, part in enumerate((record.mask == 0, (record.mask != 0) & (record.mask != ignore))):
                pixels[number] += int(part.sum())
                counted[number] += int((record.confidence[part] >= least).sum())
    background, foreground = (part / max(1, whole) for part, whole in zip(counted, pixels, strict=True))
    return background if pixels[0] else 1.0, foreground if pixels[1] else 1.0


def train_seeds(job: TrainJob, seeds: int) -> list[TrainResult]:
    """Trains ``seeds`` networks into ``out/seed-0`` and so on, which differ in their seed alone."""
    results: list[TrainResult] = []
    for seed in range(job.config.seed, job.config.seed + seeds):
        config = job.config.model_copy(update={"seed": seed})
        results.append(train_seg(replace(job, config=config, out=job.out / f"seed-{seed}")))
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


def _accelerator(job: TrainJob) -> Accelerator:
    """Of this process, on the device and in the precision that were asked for."""
    device = resolve_device(job.device)
    precision = resolve_precision(job.config.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 trains on a GPU only; use bf16 or fp32")
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the present one
    # an earlier run in this process may have had another device or precision; its process group stays
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=job.track,
            project_dir=str(job.out),
            # some models of transformers have weights that their answer doesn't hang on
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=job.config.network.name in TRANSFORMERS)
            ],
        )
    except ValueError as error:
        reason = one_line(error)[:200]
        raise ConfigError(f"--track {job.track}: {reason}" if job.track else reason) from error
    if job.track and not accelerator.log_with:  # accelerate leaves out a tracker that isn't installed
        raise MissingDependencyError(
            f"--track {job.track} isn't installed; for tensorboard, pip install 'wsss-pipeline[track]'"
        )
    used = accelerator.device
    if used.type != device.type or (None not in (used.index, device.index) and used.index != device.index):
        raise ConfigError(
            f"--device {job.device}: accelerate trains on {used}, since each of several processes has a device "
            "of its own; use --device auto, and CUDA_VISIBLE_DEVICES to choose"
        )
    return accelerator


def _run_folder(
    job: TrainJob, masks: MaskSource | ImageLabels, ids: Sequence[str], accelerator: Accelerator
) -> AbstractContextManager[None]:
    """The run's folder, this process's alone; see ``run_folder``."""
    data = {
        "masks": masks.identity,
        "classes": list(masks.class_names),
        "images": len(ids),
        "ids": id_digest(ids),
        "processes": accelerator.num_processes,
    }
    return run_folder(
        job.out, job.config, data, lambda file: load_train_config(file=file), overwrite=job.overwrite
    )


def _validation(
    job: TrainJob, ground_truth: Path, class_names: Sequence[str], accelerator: Accelerator
) -> Callable[[SegmentationNetwork], float]:
    """The function that gives a network's mIoU: each process scores its share of the images, each image once."""
    images = find_images(job.val_images or job.images, job.image_suffix, option="--image-suffix")
    class_set = load_class_set(job.classes) if job.classes else None
    if class_set is not None and class_set.names != tuple(class_names):
        raise ConfigError(
            f"--classes {job.classes:.100}: these aren't the classes to be trained ({', '.join(class_names):.300}); "
            "leave --classes out, or give a class set of these"
        )
    colors = class_set.colors if class_set else None
    truth = MaskFolder(ground_truth, class_names, "ground truth", colors, suffix=job.gt_suffix)
    truth.check_sizes(images)
    split = read_split(job.val_split, images) if job.val_split else list(truth.files)
    ids = usable_ids(images, truth, split, job.allow_missing or job.val_split is None)
    names = ("background", *class_names)

    def validate(network: SegmentationNetwork) -> float:
        segmenter = Segmenter(network, names[1:], accelerator.device)
        matrix = np.zeros((len(names), len(names) + 1), np.int64)
        for image_id in ids[accelerator.process_index :: accelerator.num_processes]:
            try:
                labels, image = truth[image_id].mask, read_image(images[image_id], segmenter.pixel_range)
                check_sizes(image[..., 0], labels, image_id)
                prediction = segmenter(image).mask
            except (EvaluationError, ImageError, MaskError) as error:
                logger.warning("%s: left out of the validation: %s", image_id, error)
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("%s: left out of the validation: too little memory for it", image_id)
                continue
            matrix += confusion_matrix(prediction, labels, len(names), image_id)
        total: torch.Tensor = accelerator.reduce(torch.from_numpy(matrix).to(accelerator.device), "sum")
        if not total.any():
            raise EvaluationError(f"none of the {len(ids):,} images of {ground_truth} could be scored")
        return Scores.from_matrix(total.cpu().numpy(), names).miou

    return validate
