"""Learning prompts: images with labels, or with a coarse mask set -> a small file for ``generate-masks --prompts``.

No ground truth is looked at, and the last context is the one that is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Unpack

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.learned_prompts import LearnedPrompts, initial_context, seed_number, text_tower_digest
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.classes import ClassSet, builtin_class_sets, load_class_set
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.evaluation.result import id_digest
from wsss_pipeline.prompts.augmentation import PromptAugmentation
from wsss_pipeline.prompts.config import PromptConfig, load_prompt_config
from wsss_pipeline.prompts.trainer import PROMPTS, PromptTrainer
from wsss_pipeline.pseudo_masks.job import JobPaths, MaskJob
from wsss_pipeline.runtime.device import resolve_device, resolve_precision
from wsss_pipeline.runtime.output import check_apart, check_replaceable
from wsss_pipeline.segmentation.dataset import ImageLabels, SegmentationDataset, usable_ids
from wsss_pipeline.segmentation.run_folder import run_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptJob:
    """A run of learn-prompts as the user asks for it.

    Attributes:
        images: image id to file.
        source: coarse masks, for the objective ``cam``; else image id to class names.
        class_set: classes with their texts and background words.
        out: folder of the run; one that holds the same run goes on.
        config: settings, see ``PromptConfig``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: number of processes that load samples.
        allow_missing: choice to leave out images that lack a file or a mask.
        overwrite: choice to start anew in a folder that holds a run.
        offline: choice to fetch no weights.
        inputs: option to what it names, which is only read.
    """

    images: Mapping[str, ImageFile]
    source: MaskCache | Mapping[str, tuple[str, ...]]
    class_set: ClassSet
    out: Path
    config: PromptConfig
    _: KW_ONLY
    device: str = "auto"
    workers: int = 0
    allow_missing: bool = False
    overwrite: bool = False
    offline: bool = False
    inputs: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        out: Path,
        settings: Mapping[str, Any] | None = None,
        *,
        recipe: str | None = None,
        masks: Path | None = None,
        **paths: Unpack[JobPaths],
    ) -> PromptJob:
        """A job out of paths: settings resolved, labels or masks read; ``dataclasses.replace`` sets the rest.

        Args:
            out: folder of the run.
            settings: dotted key of the configuration to value.
            recipe: name of published settings; else those of the class set's name and the objective, if there are.
            masks: coarse mask set, for the objective ``cam``.
            paths: inputs, see ``JobPaths``.

        Raises:
            ConfigError: options that contradict each other or leave something out.
            CacheError, ClassSetError, LabelError, ImageError: from reading masks, class set, labels, folder.
        """
        layers = (recipe, paths.get("config_file"), paths.get("overrides") or (), settings)
        objective = load_prompt_config("", *layers).objective
        images, source, class_set, inputs = (
            _coarse(masks, paths) if objective == "cam" else _labelled(masks, paths)
        )
        return cls(images, source, class_set, out, load_prompt_config(class_set.name, *layers), inputs=inputs)


Inputs = tuple[
    Mapping[str, ImageFile], MaskCache | Mapping[str, tuple[str, ...]], ClassSet, Mapping[str, Path]
]


def _labelled(masks: Path | None, paths: JobPaths) -> Inputs:
    """Images with image-level labels, as ``generate-masks`` takes them."""
    if masks is not None:
        raise ConfigError("--cache is for --objective cam; contrastive learning takes image-level labels")
    given: JobPaths = {**paths, "config_file": None, "overrides": ()}  # which are of other settings here
    job = MaskJob.read(**given)
    return job.images, job.labels, job.class_set, job.inputs


def _coarse(masks: Path | None, paths: JobPaths) -> Inputs:
    """Images with a coarse mask set, which brings their labels."""
    images = paths.get("images")
    if masks is None or images is None:
        raise ConfigError(
            "--objective cam needs --cache, a coarse mask set of generate-masks, and --images, its images' folder"
        )
    suffix = paths.get("image_suffix")
    for option in ("labels", "labels_format", "voc", "coco", "split", "other_classes"):
        if paths.get(option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} isn't for --objective cam: the mask set says which images and classes"
            )
    source = MaskCache.open(masks)
    name = paths.get("classes") or source.manifest.mask_set.name
    if not paths.get("classes") and name not in builtin_class_sets():
        raise ConfigError(f"{source.path} isn't of a built-in class set; give its classes with --classes")
    inputs = {"--images": Path(images), "--cache": source.path}
    files = find_images(Path(images), suffix, option="--image-suffix")
    return files, source, load_class_set(name), inputs


@dataclass(frozen=True)
class PromptResult:
    """What came out of a run.

    Attributes:
        prompts: file of the learned prompts.
        steps: number of updates done.
        interrupted: True where some are left.
    """

    prompts: Path
    steps: int
    interrupted: bool


def learn_prompts(job: PromptJob) -> PromptResult:
    """Learns a context, or goes on where an interrupted run stopped; does nothing where one has ended.

    Raises:
        WsssError: nothing can be learned: masks missing, weights not there, another run in the folder, NaN.
    """
    config, classes = job.config, job.class_set
    check_apart(job.out, "--out", job.inputs)
    device = resolve_device(job.device)
    precision = resolve_precision(config.clip.precision, device)
    files = locate_clip(config.clip, offline=job.offline)
    masks = _labels(job.source, classes) if isinstance(job.source, Mapping) else job.source
    if masks.class_names != classes.names:
        raise ConfigError(
            f"the {masks.description} has other classes than --classes {classes.name}: give those of its making"
        )
    ids = usable_ids(
        job.images, masks, None if isinstance(masks, ImageLabels) else list(masks), job.allow_missing
    )
    background = ("",) * config.context.free_background or classes.background
    texts = tuple(entry.texts() for entry in classes.classes)
    data = {
        "masks": masks.identity,
        "classes": list(classes.names),
        "texts": [list(several) for several in texts],
        "background": list(background),
        "images": len(ids),
        "ids": id_digest(ids),
        **files.determinants,
        "precision": precision,
    }
    with run_folder(
        job.out, config, data, lambda file: load_prompt_config(file=file), overwrite=job.overwrite
    ):
        check_replaceable(job.out / PROMPTS)
        clip = load_clip(files, device)
        trunk = Trunk(clip.vision, precision, rounded_positions=False)
        if (crop := config.augmentation.crop) % trunk.patch_size:
            raise ConfigError(
                f"augmentation.crop is {crop}; it has to be a multiple of the patch, {trunk.patch_size}"
            )
        context, width = config.context, int(clip.text.config.hidden_size)
        own = (len(texts) + len(background),) if context.per_class else ()
        prompts = LearnedPrompts(
            initial_context((*own, context.length, width), context.std, config.seed),
            context.layout,
            classes.names,
            texts,
            background,
            text_tower_digest(clip),
        )
        augmentation = PromptAugmentation(config.augmentation, clip.statistics)
        dataset = SegmentationDataset(
            job.images,
            masks,
            ids,
            augmentation,
            seed_number(config.seed),
            config.images.pixel_range or getattr(masks, "pixel_range", None),
        )
        trainer = PromptTrainer(config, clip, trunk, prompts, dataset, job.out, job.workers, precision)
        chosen, state = config.optimisation, trainer.state
        kind = "a context for each class" if context.per_class else "one context for all classes"
        logger.info(f"prompts: {kind}, {prompts.context.numel():,} numbers, layout {context.layout}")
        logger.info(f"data: {masks.description}, {len(ids):,} images (ids {id_digest(ids)})")
        logger.info(
            f"learning: {config.objective}, {chosen.iterations:,} updates of {chosen.batch * chosen.accumulate} "
            f"images, seed {config.seed}, on {device} in {precision}"
        )
        if state.step:
            logger.info(f"going on after update {state.step} of {chosen.iterations}")
        ended = trainer.run()
    return PromptResult(job.out / PROMPTS, state.step, not ended)


def _labels(labels: Mapping[str, tuple[str, ...]], classes: ClassSet) -> ImageLabels:
    """Image-level labels, with what tells them from others."""
    present = {image_id: tuple(sorted(set(map(classes.index, names)))) for image_id, names in labels.items()}
    digest = hashlib.sha256(json.dumps(sorted(present.items())).encode()).hexdigest()[:12]
    return ImageLabels(classes.names, present, f"labels {digest}", "image-level labels")
