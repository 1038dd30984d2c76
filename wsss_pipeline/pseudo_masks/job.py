"""What a run that fills a cache is to do: as it was asked for, and as it was resolved without loading CLIP."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from wsss_pipeline.cache import FinishedImages, is_mask_set
from wsss_pipeline.config import LabelFormat, MaskConfig
from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.datasets import coco_inputs, voc_inputs
from wsss_pipeline.data.image_files import ImageFile, TarMember, is_there, reading_order
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import image_size
from wsss_pipeline.data.label_readers.label_table import OtherClasses
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import ConfigError, ImageError, LabelError
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.pseudo_masks.maker import MaskMaker
from wsss_pipeline.runtime.output import check_apart, one_line
from wsss_pipeline.runtime.share import Share

Engine = Literal["local", "ray"]

# Measured on photographs of PASCAL VOC: mask and confidence, compressed, per pixel.
BYTES_PER_PIXEL = 0.25
BYTES_PER_REGION_PIXEL = 0.2  # 60 ragged regions an image; SAM's are more and smoother
BYTES_PER_CAM_PIXEL = 1.0

_NAMED = 3  # examples in a message


class JobPaths(TypedDict, total=False):
    """Where a job's inputs lie; what is left out or None isn't given.

    Attributes:
        images: folder, or WebDataset archives such as ``shards/{000..127}.tar``.
        image_suffix: choice of its files, see ``find_images``.
        gt_suffix: ending of ground-truth names, which no job looks at.
        labels: file or folder of image-level labels; left out where the images bring theirs.
        labels_format: name of the labels' form; left out where their content shows it.
        voc, coco: folder of a data set, in place of images, labels and classes.
        split: part of that data set.
        classes: built-in class set, file, or names with commas between, see ``load_class_set``.
        other_classes: what becomes of labels that are none of these, see ``LabelTable``; an error, where None.
        preset: name of published settings.
        config_file: YAML file of settings.
        overrides: ``key=value`` texts.
        cache: folder that holds mask sets.
    """

    images: Path | str | None
    image_suffix: str | None
    gt_suffix: str | None
    labels: Path | str | None
    labels_format: LabelFormat | None
    voc: Path | str | None
    coco: Path | str | None
    split: str | None
    classes: str | None
    other_classes: OtherClasses | None
    preset: str | None
    config_file: Path | None
    overrides: Sequence[str]
    cache: Path | str


@dataclass(frozen=True)
class Job(ABC):
    """Images whose masks are to be in a cache, and how the work is divided.

    Attributes:
        images: image id to file.
        labels: image id to class names in order of appearance; an empty tuple means that no class is present,
            None that each may be.
        cache_dir: folder that holds mask sets.
        share: this run's part of the images.
        limit: at most so many images of the share.
        batch_size: on a GPU, images of one size that CLIP sees together.
        workers: images that a CPU works on at a time, files that are read ahead for a GPU; with Ray, tasks at a
            time at most (0: as many as there is room for).
        store_cams: keep the CAMs in the cache too.
        overwrite: compute again what the cache holds.
        check_bytes: choice to read every image whose mask is there, whatever its size and times say.
        inputs: option to what it names, which is only read.
        cache_option: option that names ``cache_dir``.
        unread: image id to what is wrong with the format of a file, see ``FoundImages``.
    """

    images: Mapping[str, ImageFile]
    labels: Mapping[str, tuple[str, ...] | None]
    _: KW_ONLY
    cache_dir: Path = Path("cache")
    share: Share = field(default_factory=Share)
    limit: int | None = None
    batch_size: int = 1
    workers: int = 0
    store_cams: bool = False
    overwrite: bool = False
    check_bytes: bool = False
    inputs: Mapping[str, Path] = field(default_factory=dict)
    cache_option: str = "--cache"
    unread: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def maker(self) -> MaskMaker:
        """What makes the masks or regions; a WsssError where it can't be had."""


def check_work(
    images: Mapping[str, ImageFile],
    labels: Mapping[str, tuple[str, ...] | None],
    unread: Mapping[str, str],
) -> None:
    """Refuses what nothing can come of; arguments as in ``Job``.

    Raises:
        ImageError: none of the images is there.
        LabelError: none has a class.
    """
    if not any(image_id in images and is_there(images[image_id]) for image_id in labels):
        named = ", ".join(f"'{one_line(image_id, 100)}'" for image_id in islice(labels, _NAMED))
        there = ", ".join(f"'{one_line(image_id, 100)}'" for image_id in islice(images, _NAMED))
        why = next((f"; '{one_line(i, 100)}' is {unread[i]}" for i in labels if i in unread), "")
        raise ImageError(
            f"none of the {len(labels):,} images that the labels or the split name is there: they name {named}, the "
            f"images are {there}{why}; image ids are paths below the folder of images, without suffix"
        )
    if all(names == () for names in labels.values()):
        raise LabelError(
            f"none of the {len(labels):,} images has a class: every mask would be background alone; give labels that "
            "name classes, not a list of images"
        )


@dataclass(frozen=True)
class MaskJob(Job):
    """A run of stage one as the user asked for it.

    Attributes:
        labels: as in ``Job``, never None; aliases become the names of their classes.
        class_set: classes of the labels.
        config: settings that change the masks.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offline: fetch nothing.
        engine: this machine, or a Ray cluster.

    Raises:
        ClassSetError: a label is the name or alias of no class.
    """

    labels: Mapping[str, tuple[str, ...]]
    class_set: ClassSet
    config: MaskConfig
    _: KW_ONLY
    device: str = "auto"
    offline: bool = False
    engine: Engine = "local"

    def __post_init__(self) -> None:
        # the few names alone are looked at, for there may be a million images
        given = set(chain.from_iterable(self.labels.values()))
        own = {name: self.class_set.canonical(name) for name in sorted(given, key=str)}
        if any(name != own[name] for name in given):
            labels = {
                i: tuple(dict.fromkeys(own[name] for name in names)) for i, names in self.labels.items()
            }
            object.__setattr__(self, "labels", labels)

    @classmethod
    def read(cls, settings: Mapping[str, Any] | None = None, **paths: Unpack[JobPaths]) -> MaskJob:
        """A job out of paths: the configuration resolved, the labels read; ``dataclasses.replace`` sets the rest.

        Args:
            settings: dotted key of the configuration to value.
            paths: inputs and outputs, see ``JobPaths``.

        Raises:
            ConfigError: options that contradict each other or leave something out.
            ClassSetError, LabelError, ImageError: from reading the class set, the labels, the folder; or nothing can
                come of them.
        """
        images, labels, classes = paths.get("images"), paths.get("labels"), paths.get("classes")
        voc, coco, split = paths.get("voc"), paths.get("coco"), paths.get("split")
        suffix = paths.get("image_suffix")
        if sum(source is not None for source in (images, voc, coco)) != 1:
            raise ConfigError("give the images once: --images DIR, --voc ROOT or --coco ROOT")
        if (split is not None) == (images is not None):
            raise ConfigError(
                "--split goes with --voc or --coco, and they need it, for example --split train"
            )
        if suffix is not None and images is None:
            raise ConfigError("--image-suffix goes with --images; --voc and --coco know their files")
        if labels is not None and images is None:
            raise ConfigError("--labels goes with --images; --voc and --coco bring their own labels")
        labels_format = paths.get("labels_format")
        if labels_format is not None and labels is None:
            raise ConfigError("--labels-format goes with --labels")
        if paths.get("preset") is None and classes is None:
            classes = "voc12" if voc is not None else "coco14" if coco is not None else None
        config = load_mask_config(
            paths.get("preset"),
            paths.get("config_file"),
            paths.get("overrides") or (),
            {"classes": classes, **(settings or {})},
        )
        if not config.classes:
            raise ConfigError("no classes given; use --classes cat,dog, --classes FILE or --preset NAME")
        class_set, others = load_class_set(config.classes), paths.get("other_classes") or "error"
        files: Mapping[str, ImageFile]
        unread: Mapping[str, str] = {}
        if images is not None:
            found = find_images(Path(images), suffix, option="--image-suffix")
            files, unread = found, found.unread
            names = read_labels(
                None if labels is None else Path(labels), files, class_set, labels_format, others
            )
        elif voc is not None:
            files, names = voc_inputs(Path(voc), str(split), class_set, others)
        else:
            files, names = coco_inputs(Path(str(coco)), str(split), class_set, others)
        given = {"--images": images, "--labels": labels}
        inputs = {option: Path(path) for option, path in given.items() if path is not None}
        if voc is not None:
            inputs |= {
                f"--voc's {name}": Path(voc) / name for name in ("JPEGImages", "Annotations", "ImageSets")
            }
        elif coco is not None:
            inputs |= {
                f"--coco's {name}": Path(coco) / name for name in ("images", str(split), "annotations")
            }
        check_work(files, names, unread)
        cache = Path(paths.get("cache") or "cache")
        return cls(files, names, class_set, config, cache_dir=cache, inputs=inputs, unread=unread)

    def maker(self) -> MaskGenerator:
        """The method, its CLIP not loaded yet.

        Raises:
            ConfigError: no such device, settings that contradict each other.
            WeightsError: CLIP can't be found.
            MissingDependencyError: the refiner isn't installed.
        """
        return MaskGenerator(
            self.class_set,
            config=self.config,
            device=self.device,
            offline=self.offline,
            elsewhere=self.engine == "ray",
        )


@dataclass(frozen=True)
class MaskPlan:
    """A job with everything resolved.

    Attributes:
        job: inputs, read.
        maker: maker of the masks.
        image_ids: this run's share, labelled and there, in the order in which they are best read.
        missing: labelled ids without a file.
        unlabelled: number of images that the labels don't name.
    """

    job: Job
    maker: MaskMaker
    image_ids: list[str]
    missing: list[str]
    unlabelled: int

    @property
    def folder(self) -> Path:
        """Of the mask set."""
        return self.job.cache_dir / self.maker.mask_set.folder_name


def plan_masks(job: Job, maker: MaskMaker | None = None) -> MaskPlan:
    """Resolve a job; ``maker`` is one that was made for the same classes and settings before.

    Raises:
        ConfigError: masks would go into an input.
        WsssError: as ``Job.maker``.
    """
    maker = maker or job.maker()
    check_apart(job.cache_dir / maker.mask_set.folder_name, job.cache_option, job.inputs)
    share = job.share.select(job.labels)[: job.limit]
    # what was found is looked at once, for whether it is finished, and not here too: there may be a million files
    there = [image_id for image_id in share if image_id in job.images]
    missing = [image_id for image_id in share if image_id not in job.images]
    if there and isinstance(job.images[there[0]], TarMember):  # all are, or none
        there.sort(key=lambda image_id: reading_order(job.images[image_id]))
    unlabelled = sum(image_id not in job.labels for image_id in job.images)
    return MaskPlan(job, maker, there, missing, unlabelled)


def describe_plan(plan: MaskPlan) -> list[str]:
    """Lines for a person: choices, counts, images that can't be used, disk to be taken.

    Nothing is written. Every image left to do is opened as far as its header.

    Raises:
        CacheFormatError: the mask set is there, of another format version.
    """
    job, folder, todo = plan.job, plan.folder, plan.image_ids
    if is_mask_set(folder) and not job.overwrite:
        finished = FinishedImages(folder, job.share.index, job.share.count)
        options = {"need_cams": job.store_cams, "check_bytes": job.check_bytes}
        todo = finished.unfinished(todo, job.images, job.labels, **options)
    is_of_masks = plan.maker.mask_set.holds == "masks"
    per_pixel = BYTES_PER_PIXEL if is_of_masks else BYTES_PER_REGION_PIXEL
    bad: list[str] = []
    size = 0.0
    for image_id in todo:
        try:
            width, height = image_size(job.images[image_id])
        except ImageError as error:
            bad.append(str(error))
            continue
        maps = len(job.labels[image_id] or ()) if job.store_cams else 0
        size += width * height * (per_pixel + maps * BYTES_PER_CAM_PIXEL)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, done = shutil.disk_usage(existing).free, len(plan.image_ids) - len(todo)
    about_labels = [
        f"without any class, so all background: {sum(job.labels[i] == () for i in plan.image_ids)}",
        f"images that the labels don't name, left out: {plan.unlabelled}",
    ]
    return [
        *plan.maker.lines(),
        f"{'mask' if is_of_masks else 'region'} set: {folder}" + ("" if folder.exists() else " (new)"),
        f"images: {len(plan.image_ids)}, {done} of them in the cache, {len(todo)} to compute",
        *(about_labels if is_of_masks else ()),
        *_listed("named, but no file is there", plan.missing),
        *_listed("can't be used", bad),
        f"disk: about {size / 2**20:.1f} MiB to be taken, {free / 2**20:.0f} MiB free",
    ]


def _listed(what: str, items: list[str], shown: int = 20) -> list[str]:
    lines = [f"{what}: {len(items)}", *(f"  {item}" for item in items[:shown])]
    return [*lines, f"  and {len(items) - shown} more"] if len(items) > shown else lines
