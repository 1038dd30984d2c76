"""``wsss train-seg``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from wsss_pipeline.commands.options import PATH

# option as click names it -> dotted key of the configuration
CONFIG_KEYS = {
    "network": "network.name",
    "encoder": "network.encoder",
    "weights": "network.weights",
    "loss": "loss.confidence",
    "min_confidence": "loss.min_confidence",
    "balanced": "loss.balanced",
    "iterations": "optimisation.iterations",
    "batch_size": "optimisation.batch",
    "accumulate": "optimisation.accumulate",
    "lr": "optimisation.lr",
    "crop": "augmentation.crop",
    "precision": "precision",
    "seed": "seed",
}


@click.command("train-seg", short_help="Train a segmentation network on cached masks.")
@click.option("--cache", type=PATH, help="Mask set, or a cache folder that holds one.")
@click.option("--gt-masks", type=PATH, help="Ground-truth index masks instead: the fully supervised bound.")
@click.option("--classes", help="With --gt-masks: voc12, coco14, demo, a YAML file, or names.")
@click.option("--images", type=PATH, required=True, help="Folder of the pictures.")
@click.option("--split", type=PATH, help="Text file of image ids to train on.  [default: all images]")
@click.option("--out", type=PATH, required=True, help="Folder of the run; the same one goes on.")
@click.option("--recipe", metavar="NAME", help="Published or tried settings, such as voc12/deeplabv2-coco.")
@click.option(
    "--network", help="deeplabv2, segformer, or deeplabv3plus, unet, fpn, ...  [default: deeplabv3plus]"
)
@click.option("--encoder", help="Such as resnet101, mit-b2, or tiny for segformer.  [default: resnet50]")
@click.option("--weights", help="imagenet, coco, none, a file or a folder.  [default: imagenet]")
@click.option("--loss", type=click.Choice(["hard", "soft"]), help="Confidence-guided loss.  [default: hard]")
@click.option("--min-confidence", type=float, help="Pixels below count nothing.  [default: 0.95]")
@click.option("--balanced/--not-balanced", default=None, help="Background and foreground count half each.")
@click.option("--iterations", type=int, help="Updates.  [default: 20000]")
@click.option("--batch-size", type=int, help="Pictures per process and micro-step.  [default: 10]")
@click.option("--accumulate", type=int, help="Micro-steps per update.  [default: 1]")
@click.option("--lr", type=float, help="Peak learning rate of the encoder.  [default: 0.001]")
@click.option("--crop", type=int, help="Side of the square training pictures.  [default: 320]")
@click.option("--seed", type=int, help="Of weights, order and augmentation.  [default: 0]")
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Train so many networks."
)
@click.option("--val-gt", type=PATH, help="Ground truth to validate on; keeps the best network.")
@click.option("--val-images", type=PATH, help="Its pictures.  [default: those of --images]")
@click.option("--val-split", type=PATH, help="Text file of its image ids.  [default: all of --val-gt]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="[default: auto]")
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
    classes: str | None,
    images: Path,
    split: Path | None,
    out: Path,
    recipe: str | None,
    seeds: int,
    val_gt: Path | None,
    val_images: Path | None,
    val_split: Path | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a segmentation network on the masks of a cache.

    The last line on stdout is the checkpoint: the best network where --val-gt is given, else the last. Run the
    same command again to go on after an interruption. Under torchrun or `accelerate launch`, use
    `torchrun ... -m wsss_pipeline train-seg ...`.

    \b
    Examples:
      wsss train-seg --cache cache --images photos --out run --recipe voc12/segformer-b2
      wsss train-seg --cache cache --images photos --out run --network deeplabv3plus --weights none
    """
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.datasets import read_split
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.runtime.training_progress import TrainingProgressBar
    from wsss_pipeline.segmentation.train_config import load_train_config
    from wsss_pipeline.stages.train_seg import (
        TrainRequest,
        open_source,
        spread,
        train_seeds,
        train_seg,
        validation_images,
    )

    flags = {key: options.pop(name) for name, key in CONFIG_KEYS.items()}
    request = TrainRequest(
        images=find_images(images),
        source=open_source(cache, gt_masks, load_class_set(classes).names if classes else None),
        config=load_train_config(recipe, config_file, overrides, flags),
        out=out,
        split=read_split(split) if split else None,
        validation=validation_images(val_gt, val_images or images, val_split) if val_gt else None,
        **options,
    )
    with TrainingProgressBar(request.config.optimisation.iterations) as bar:
        results = [train_seg(request, bar.log)] if seeds == 1 else train_seeds(request, seeds, bar.log)
    if seeds > 1:
        click.echo(spread(results), err=True)
    last = results[-1]
    if last.miou is not None:
        click.echo(f"best mIoU {100 * last.miou:.2f} %", err=True)
    if last.interrupted:
        click.echo(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    click.echo(last.checkpoint)
    context.exit(130 if last.interrupted else 0)
