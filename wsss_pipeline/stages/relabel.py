"""The next round: a trained network's masks -> a new mask set in the cache, to train the next network on.

The loop, its resuming and its faults are those of ``generate_masks``; what makes the masks is a network.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsss_pipeline.cache import MaskSet
from wsss_pipeline.config import LabelFormat, Layer, RelabelConfig, resolve
from wsss_pipeline.data.classes import ClassSet, builtin_class_sets, load_class_set
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.label_readers.label_table import OtherClasses
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.data.transforms import Prepared
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.pseudo_masks.job import Job, check_work
from wsss_pipeline.pseudo_masks.maker import Generated, LabelledImage
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.pseudo_masks.run import run_share
from wsss_pipeline.refine import load_refiner
from wsss_pipeline.runtime.device import resolve_device, resolve_precision
from wsss_pipeline.segmentation.checkpoint import find_checkpoint, load_network
from wsss_pipeline.segmentation.clip_network import ClipNetwork
from wsss_pipeline.segmentation.inference import Segmenter, network_digest

NAME = "relabel"  # of the mask sets: a checkpoint has class names, but no name for them
VERSION = 1  # to be raised when the same settings give other masks
# as WeakCLIP's published code makes its masks of the images that it was trained on
_VIEWS = {
    "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "flip": True,
    "window": 512,
    "window_stride": 341,
    "short_side": 512,
    "long_side": 2048,
    "winners_only": True,
}
_CRF = {"image": "rgb", "half_scores": False, "iterations": 10, "gaussian_weight": 3.0}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "weakclip/voc12": {
        "inference": _VIEWS,
        "crf": {
            **_CRF,
            "gaussian_sxy": 3.0,
            "bilateral_sxy": 83.0,
            "bilateral_srgb": 5.0,
            "bilateral_weight": 3.0,
        },
    },
    "weakclip/coco14": {
        "inference": _VIEWS,
        "crf": {
            **_CRF,
            "gaussian_sxy": 1.0,
            "bilateral_sxy": 67.0,
            "bilateral_srgb": 3.0,
            "bilateral_weight": 4.0,
        },
    },
}


def relabel_config(preset: str | None, layers: Iterable[Layer] = ()) -> RelabelConfig:
    """The settings of a preset, if any, under those of the layers; a ConfigError where one can't be had."""
    if preset is None:
        return resolve(RelabelConfig, layers)
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset:.60}: unknown; known are {', '.join(PRESETS)}")
    return resolve(RelabelConfig, [(f"preset {preset}", PRESETS[preset]), *layers])


class NetworkMaker:
    """A ``MaskMaker``: a network's masks, of the classes that are present in an image.

    Args:
        segmenter: network, with what is done beside it.
        class_set: classes of the network, as labels name them.
        determinants: all that determines the masks.
        lines: choices, for people.
    """

    model = "network"
    if_too_large = "lower --workers, give --window or fewer --scales"

    def __init__(
        self, segmenter: Segmenter, class_set: ClassSet, determinants: Mapping[str, Any], lines: Sequence[str]
    ) -> None:
        self.segmenter, self.class_set = segmenter, class_set
        self.device, self.pixel_range = torch.device(segmenter.device), segmenter.pixel_range
        self.in_threads = self.device.type == "cpu"
        ids = {entry.name: entry.coco_id for entry in class_set.classes if entry.coco_id is not None}
        self.mask_set = MaskSet(
            name=NAME,
            determinants=dict(determinants),
            class_names=class_set.names,
            category_ids=ids if len(ids) == len(class_set.names) else None,
        )
        self._lines = list(lines)

    def lines(self) -> list[str]:
        """The choices that decide over the masks, as a person reads them."""
        return self._lines

    def load(self) -> None:
        """Nothing: the network's weights are in the fingerprint, so it is there already."""

    def prepare(
        self, pixels: NDArray[np.uint8], labels: Sequence[str] | None, image_id: str = ""
    ) -> LabelledImage:
        """An image, uint8 (H, W, 3) RGB, with its classes; without labels, None, each class may be there."""
        names = self.class_set.names if labels is None else tuple(dict.fromkeys(labels))
        classes = [self.class_set.index(name) for name in names]
        known = None if labels is None else names
        return LabelledImage(pixels, known, classes, Prepared(torch.from_numpy(pixels).permute(2, 0, 1)))

    def generate(self, batch: Sequence[LabelledImage], with_cams: bool) -> list[Generated]:
        """Masks, one after another, without CAMs; their labels are those given, else the classes in the mask.

        Raises:
            MaskError: the network's answer holds NaN.
            MemoryError, RuntimeError: memory ran out.
        """
        found = []
        for image in batch:
            start = time.monotonic()
            record = self.segmenter(image.pixels, None if image.labels is None else image.classes)
            labels = image.labels
            if labels is None:
                labels = tuple(self.class_set.names[value - 1] for value in np.unique(record.mask) if value)
            mask, confidence = torch.from_numpy(record.mask), torch.from_numpy(record.confidence)
            end = time.monotonic()
            found.append(Generated(labels, mask, confidence, None, (start, end, end), 1.0))
        return found


@dataclass(frozen=True)
class RelabelJob(Job):
    """Images for a network to label; ``dataclasses.replace`` sets how the work is divided.

    Attributes:
        network: maker of the masks.
    """

    network: NetworkMaker

    def maker(self) -> NetworkMaker:
        """The network."""
        return self.network

    @classmethod
    def read(
        cls,
        checkpoint: Path,
        images: Path,
        cache: Path,
        *,
        labels: Path | None = None,
        labels_format: LabelFormat | None = None,
        classes: str | None = None,
        other_classes: OtherClasses | None = None,
        split: Path | None = None,
        any_class: bool = False,
        config: RelabelConfig | None = None,
        device: str = "auto",
        clip: str | None = None,
        image_suffix: str | None = None,
    ) -> RelabelJob:
        """A job out of paths: the network loaded, the labels read.

        Args:
            checkpoint: a training run or a checkpoint folder.
            images: folder, searched with all below it, or WebDataset archives.
            cache: folder that holds mask sets.
            labels: image-level labels, of which a mask then has no other classes; without them it may have any.
            labels_format: name of the labels' form; None for what their content shows.
            classes: class set of the labels, where they use its aliases; it must have the network's classes.
            other_classes: what becomes of other labels, see ``LabelTable``; an error, where None.
            split: text file of the ids of the images to do; all of them, where None.
            any_class: choice to take from the labels only which images to do.
            config: scales, flip, refiner.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            clip: place of a network's frozen CLIP, where that isn't where it lay in training.
            image_suffix: choice of the files, see ``find_images``.

        Raises:
            CheckpointError: no network.
            ConfigError, ClassSetError: no such device or precision, or choices that contradict each other or the
                network.
            LabelError, ImageError: from reading the labels, the split, the folder.
            MissingDependencyError: the refiner isn't installed.
        """
        config = config or RelabelConfig()
        only = {"--any-class": any_class, "--classes": classes, "--labels-format": labels_format}
        only["--other-classes"] = other_classes
        if labels is None and any(only.values()):
            option = next(option for option, given in only.items() if given)
            raise ConfigError(f"{option} goes with --labels; without them a mask may have any of the classes")
        where = resolve_device(device)
        precision = resolve_precision(config.precision, where)
        if precision == "fp16" and where.type == "cpu":
            raise ConfigError("--precision fp16 is for GPUs; use bf16 or fp32")
        refiner = load_refiner(config, "crf")
        loaded = load_network(checkpoint, where, clip, precision)
        folder = find_checkpoint(checkpoint)
        class_set = _class_set(loaded.class_names, classes, folder)
        inference, is_restricted = config.inference, labels is not None and not any_class
        # what a frozen encoder is, its digest says, wherever it lies
        is_frozen = isinstance(loaded.network, ClipNetwork)
        told = ["name"] if is_frozen else ["name", "encoder"]
        architecture = {key: loaded.config["network"][key] for key in told}
        determinants = {
            "relabel": {"version": VERSION, "classes": "of the labels" if is_restricted else "any"},
            "network": {**architecture, "digest": network_digest(loaded.network)},
            "precision": precision,
            "classes": list(class_set.names),
            "inference": inference.determinants(),
            **refiner.determinants(),
            **({} if config.confidence == "posterior" else {"confidence": config.confidence}),
        }
        lines = [
            f"network: {folder}, {precision} on {where}",
            f"classes ({len(class_set.names)}): {', '.join(class_set.names)}",
            f"a mask may have: {'the classes of its labels' if is_restricted else 'any class'}",
            f"inference: {inference.name}" + (f", windows of {inference.window}" if inference.window else ""),
            f"confidence: {config.confidence}",
            refiner.description,
        ]
        segmenter = Segmenter(
            loaded.network,
            class_set.names,
            where,
            inference,
            refiner=refiner,
            confidence=config.confidence,
            precision=precision,
            fixed_tiles=True,
        )
        if segmenter.pixel_range:  # where it is given: mask sets from before keep their fingerprint
            determinants["pixel_range"] = list(segmenter.pixel_range)
        found = find_images(images, image_suffix, option="--image-suffix")
        files: Mapping[str, ImageFile] = found
        names: Mapping[str, tuple[str, ...] | None] = dict.fromkeys(files)
        if labels is not None:
            names = read_labels(labels, files, class_set, labels_format, other_classes or "error")
        if split is not None:
            wanted = read_split(split, files)
            names = {i: names.get(i) for i in wanted if labels is None or i in names}
            files = {i: files[i] for i in wanted if i in files}
        if any_class:
            names = dict.fromkeys(names)
        check_work(files, names, found.unread)
        inputs = {"--images": images, "--labels": labels, "--split": split, "--checkpoint": folder}
        return cls(
            files,
            names,
            NetworkMaker(segmenter, class_set, determinants, lines),
            cache_dir=cache,
            inputs={option: path for option, path in inputs.items() if path is not None},
            unread=found.unread,
        )


def _class_set(names: tuple[str, ...], given: str | None, checkpoint: Path) -> ClassSet:
    """The class set with a network's classes: the one given, else a built-in one, else the names alone.

    Raises:
        ClassSetError, ConfigError: the one given has other classes, or a name can't be a class's.
    """
    if given is not None:
        found = load_class_set(given)
        if found.names != names:
            raise ConfigError(
                f"--classes {given:.100}: these aren't the classes of the network {checkpoint} "
                f"({', '.join(names):.300}); leave --classes out, the network knows its own"
            )
        return found
    # with their aliases, and their numbers in COCO
    for built_in in map(load_class_set, builtin_class_sets()):
        if built_in.names == names:
            return built_in
    values = {"name": NAME, "classes": [{"name": name} for name in names]}
    found = resolve(ClassSet, [(f"checkpoint {checkpoint}", values)])
    if found.names != names:
        raise ConfigError(f"checkpoint {checkpoint}: a class name begins or ends with a space; write it anew")
    return found


def relabel(job: RelabelJob) -> MaskReport:
    """Make the network's masks that the cache doesn't hold yet.

    Raises:
        WsssError: nothing can be computed at all; never for one image.
    """
    return run_share(job)
