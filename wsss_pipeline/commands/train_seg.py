"""``wsss train-seg``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsss_pipeline.commands.options import (
    CLASSES_FORMS,
    OTHER_CLASSES,
    PATH,
    choice,
    device_option,
    given_paths,
    given_settings,
    gt_suffix_option,
    image_suffix_option,
    labels_format_option,
    say,
    setting,
)
from wsss_pipeline.config import LabelFormat, Precision, description
from wsss_pipeline.segmentation.train_config import Confidence, TrainConfig

if TYPE_CHECKING:
    from wsss_pipeline.data.label_readers.label_table import OtherClasses


@click.command("train-seg", short_help="Train a segmentation network on cached masks.")
@click.option("--cache", type=PATH, help="Mask set, or a cache folder that holds one.")
@click.option("--gt-masks", type=PATH, help="Ground-truth masks instead: the fully supervised bound.")
@gt_suffix_option
@setting(TrainConfig, "online.method", "--online", metavar="METHOD")
@click.option(
    "--labels",
    type=PATH,
    help="With --online: image-level labels, as generate-masks takes them.  [default: one folder per class]",
)
@labels_format_option
@click.option(
    "--classes", help=f"With --online, --gt-masks, or --val-gt that holds colours: {CLASSES_FORMS}."
)
@click.option("--other-classes", **OTHER_CLASSES)
@click.option("--images", type=PATH, required=True, help="Folder of the images.")
@image_suffix_option
@click.option("--split", type=PATH, help="Text file of image ids to train on.  [default: all images]")
@click.option(
    "--leave-out", type=PATH, help="Text file of image ids not to train on, as preview's page saves it."
)
@click.option("--out", type=PATH, required=True, help="Folder of the run; the same one goes on.")
@click.option("--recipe", metavar="NAME", help="Published or tried settings, such as voc12/deeplabv2-coco.")
@setting(TrainConfig, "network.name", "--network")
@setting(TrainConfig, "network.encoder", "--encoder")
@setting(TrainConfig, "network.weights", "--weights")
@setting(TrainConfig, "loss.confidence", "--loss", type=choice(Confidence))
@setting(TrainConfig, "loss.min_confidence", "--min-confidence", type=float)
@setting(TrainConfig, "loss.keep", "--keep", type=float)
@setting(TrainConfig, "loss.balanced", "--balanced/--not-balanced")
@setting(TrainConfig, "optimisation.iterations", "--iterations", type=int)
@setting(TrainConfig, "optimisation.batch", "--batch-size", type=int)
@setting(TrainConfig, "optimisation.accumulate", "--accumulate", type=int)
@setting(TrainConfig, "optimisation.lr", "--lr", type=float)
@setting(TrainConfig, "augmentation.crop", "--crop", type=int)
@setting(TrainConfig, "precision", "--precision", type=choice(Precision))
@setting(
    TrainConfig,
    "images.pixel_range",
    "--pixel-range",
    metavar="LOW:HIGH",
    help=f"{description(TrainConfig, 'images.pixel_range')}  [default: that of the masks of --cache]",
)
@setting(TrainConfig, "seed", "--seed", type=int)
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Number of networks to train."
)
@click.option("--val-gt", type=PATH, help="Ground truth to validate on; keeps the best network.")
@click.option("--val-images", type=PATH, help="Its images.  [default: those of --images]")
@click.option("--val-split", type=PATH, help="Text file of its image ids.  [default: all of --val-gt]")
@device_option
@click.option(
    "--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that load samples."
)
@click.option("--allow-missing", is_flag=True, help="Leave out images that have no mask.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@click.option("--offline", is_flag=True, help="Fetch no weights.")
@click.option("--track", metavar="NAME", help="Also log to tensorboard, or another tracker of accelerate.")
@click.option("--config", "config_file", type=PATH, help="YAML file of settings.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="One setting; may be repeated.")
@click.pass_context
def command(
    context: click.Context,
    /,
    cache: Path | None,
    gt_masks: Path | None,
    labels: Path | None,
    labels_format: LabelFormat | None,
    classes: str | None,
    other_classes: OtherClasses | None,
    images: Path,
    split: Path | None,
    leave_out: Path | None,
    out: Path,
    recipe: str | None,
    seeds: int,
    val_gt: Path | None,
    val_images: Path | None,
    val_split: Path | None,
    device: str,
    workers: int,
    allow_missing: bool,
    overwrite: bool,
    offline: bool,
    track: str | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Train a segmentation network on the masks of a cache, or on masks made as it learns.

    The last line on stdout is the checkpoint: the best network where --val-gt is given, else the last. Run the
    same command again to go on after an interruption. Under torchrun or `accelerate launch`, use
    `torchrun ... -m wsss_pipeline train-seg ...`.

    \b
    Examples:
      wsss train-seg --cache cache --images photos --out run --recipe voc12/segformer-b2
      wsss train-seg --cache cache --images photos --out run --network deeplabv3plus --weights none
      wsss train-seg --online weclip --labels labels.json --classes voc12 --images photos --out run
    """
    import torch

    from wsss_pipeline.cache import MaskCache
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.masks import MaskFolder, MaskSource
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.segmentation.train_config import load_train_config, online_recipe
    from wsss_pipeline.stages.train_seg import (
        TrainJob,
        check_makes_targets,
        spread,
        train_seeds,
        train_seg,
    )

    flags, paths = given_settings(context), given_paths(context)
    if flags["online.method"]:
        check_makes_targets(flags["online.method"])  # before a network is asked for that it needs
        recipe = recipe or online_recipe(flags["online.method"], classes)
    if flags["loss.keep"] and flags["loss.min_confidence"] is not None:
        raise ConfigError("--keep takes the place of --min-confidence; drop one of them")
    config = load_train_config(recipe, config_file, overrides, flags)
    masks: MaskSource | None
    if [cache is not None, gt_masks is not None, bool(config.online.method)].count(True) != 1:
        raise ConfigError(
            "give the masks once: --cache DIR, --online METHOD to make them in training, or --gt-masks DIR for "
            "ground truth"
        )
    if labels_format is not None and labels is None:
        raise ConfigError("--labels-format goes with --labels")
    for option, value in (("--labels", labels), ("--other-classes", other_classes)):
        if value is not None and not config.online.method:
            raise ConfigError(f"{option} is for --online METHOD; the masks of a cache hold their labels")
    if cache is not None:
        masks = MaskCache.open(cache)
    elif gt_masks is None:
        masks = None
    elif classes is None:
        raise ConfigError("--gt-masks needs --classes: a folder of masks doesn't know its class names")
    else:
        class_set = load_class_set(classes)
        suffix = paths["gt_suffix"]
        masks = MaskFolder(gt_masks, class_set.names, "ground truth", class_set.colors, suffix=suffix)
    job = TrainJob(
        images,
        masks,
        out,
        config,
        labels=labels,
        labels_format=labels_format,
        classes=classes,
        other_classes=other_classes or "error",
        split=split,
        leave_out=leave_out,
        val_gt=val_gt,
        val_images=val_images,
        val_split=val_split,
        device=device,
        workers=workers,
        allow_missing=allow_missing,
        overwrite=overwrite,
        offline=offline,
        track=track,
        image_suffix=paths["image_suffix"],
        gt_suffix=paths["gt_suffix"],
    )
    results = [train_seg(job)] if seeds == 1 else train_seeds(job, seeds)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    last = results[-1]
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
        if seeds > 1:
            say(spread(results), err=True)
        if last.miou is not None:
            say(f"best mIoU {100 * last.miou:.2f} %", err=True)
        if last.interrupted:
            say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
        say(last.checkpoint)
    context.exit(130 if last.interrupted else 0)
