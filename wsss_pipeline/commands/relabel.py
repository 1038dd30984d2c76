"""``wsss relabel``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsss_pipeline.commands.options import (
    OTHER_CLASSES,
    PATH,
    cache_option,
    device_option,
    frozen_clip_option,
    given_paths,
    given_settings,
    image_suffix_option,
    labels_format_option,
    offline_guarantee,
    relabel_options,
    report_masks,
    run_options,
    say,
    shard_option,
)
from wsss_pipeline.config import LabelFormat, user_layers

if TYPE_CHECKING:
    from wsss_pipeline.data.label_readers.label_table import OtherClasses


@click.command("relabel", short_help="A trained network's masks as a new mask set, for the next network.")
@click.option("--checkpoint", type=PATH, required=True, help="A training run, or a checkpoint folder.")
@click.option(
    "--images",
    type=PATH,
    required=True,
    help="Folder of images, searched with all below it, or WebDataset archives: 'shards/{000..127}.tar'.",
)
@image_suffix_option
@cache_option
@click.option(
    "--labels",
    type=PATH,
    help="Image-level labels, in any form that generate-masks reads: a mask then has no class but its image's. "
    "Without them it may have any class.",
)
@labels_format_option
@click.option(
    "--any-class", is_flag=True, help="With --labels: take from them which images to do, and nothing else."
)
@click.option(
    "--classes",
    help="Class set of the labels, where they use aliases: voc12, a YAML file, ...  [default: the network's names]",
)
@click.option("--other-classes", **OTHER_CLASSES)
@click.option("--split", type=PATH, help="Text file of the ids of the images to do.  [default: all]")
@relabel_options
@frozen_clip_option
@device_option
@offline_guarantee
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Images that the CPU works on at a time; files read ahead for a GPU.  [default: one a core, at most 8]",
)
@shard_option
@run_options
@click.pass_context
def command(
    context: click.Context,
    /,
    checkpoint: Path,
    images: Path,
    labels: Path | None,
    labels_format: LabelFormat | None,
    any_class: bool,
    classes: str | None,
    other_classes: OtherClasses | None,
    split: Path | None,
    clip: str | None,
    device: str,
    workers: int | None,
    shard: str | None,
    limit: int | None,
    overwrite: bool,
    check_bytes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a trained network's masks a new mask set in the cache, on which train-seg trains the next network.

    With --labels, what the network gives to classes that an image hasn't got is dropped before the refiner, and
    the confidence is that among background and the image's classes; an image whose label list is empty is all
    background, and one that isn't named is left out. Without --labels every image is done, with any class.

    What the cache already holds isn't computed again. The last line on stdout is the mask set: the folder that
    train-seg, evaluate and preview take as --cache.

    \b
    Examples:
      wsss relabel --checkpoint run --images photos --labels labels.csv --cache cache --scales 0.5,1,1.5 --flip
      wsss relabel --checkpoint run --images photos --labels labels.csv --cache cache --preset weakclip/voc12
    """
    from wsss_pipeline.pseudo_masks.job import describe_plan, plan_masks
    from wsss_pipeline.runtime.device import images_at_a_time
    from wsss_pipeline.runtime.share import parse_share, share_of_environment
    from wsss_pipeline.stages.relabel import RelabelJob, relabel, relabel_config

    paths = given_paths(context)
    layers = user_layers(paths["config_file"], paths["overrides"], given_settings(context))
    job = replace(
        RelabelJob.read(
            checkpoint,
            images,
            Path(paths["cache"]),
            labels=labels,
            labels_format=labels_format,
            classes=classes,
            other_classes=other_classes,
            split=split,
            any_class=any_class,
            config=relabel_config(paths["preset"], layers),
            device=device,
            clip=clip,
            image_suffix=paths["image_suffix"],
        ),
        share=parse_share(shard) if shard else share_of_environment(),
        workers=images_at_a_time() if workers is None else workers,
        limit=limit,
        overwrite=overwrite,
        check_bytes=check_bytes,
    )
    if dry_run:
        say("\n".join(describe_plan(plan_masks(job))))
        return
    report_masks(context, relabel(job), as_json)
