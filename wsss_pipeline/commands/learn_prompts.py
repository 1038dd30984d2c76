"""``wsss learn-prompts``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    choice,
    file_options,
    given_paths,
    given_settings,
    input_options,
    machine_options,
    say,
    setting,
)
from wsss_pipeline.config import Precision
from wsss_pipeline.prompts.config import RECIPES, Objective, PromptConfig


@click.command("learn-prompts", short_help="Learn CLIP's prompts from image-level labels or coarse masks.")
@setting(PromptConfig, "objective", "--objective", type=choice(Objective))
@input_options
@click.option("--cache", type=PATH, help="With cam: the coarse mask set, or a cache folder that holds one.")
@setting(PromptConfig, "labels", "--crop-labels", type=click.Choice(["image", "mask"]))
@click.option("--out", type=PATH, required=True, help="Folder of the run; the same one goes on.")
@click.option(
    "--recipe",
    metavar="NAME",
    help=f"Published or tried settings: {', '.join(RECIPES)}.  [default: that of class set and objective]",
)
@setting(PromptConfig, "clip.weights", "--clip", metavar="ID_OR_PATH")
@setting(PromptConfig, "clip.tokenizer", "--tokenizer", metavar="ID_OR_PATH")
@setting(PromptConfig, "clip.precision", "--precision", type=choice(Precision))
@setting(PromptConfig, "images.pixel_range", "--pixel-range", metavar="LOW:HIGH")
@setting(PromptConfig, "optimisation.iterations", "--iterations", type=int)
@setting(PromptConfig, "optimisation.batch", "--batch-size", type=int)
@setting(PromptConfig, "optimisation.accumulate", "--accumulate", type=int)
@setting(PromptConfig, "optimisation.lr", "--lr", type=float)
@setting(PromptConfig, "seed", "--seed", metavar="TEXT")
@click.option(
    "--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that load samples."
)
@click.option("--allow-missing", is_flag=True, help="Leave out images that have no file.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@machine_options
@file_options("optimisation.lr=0.01", "docs/settings.md lists them")
@click.pass_context
def command(
    context: click.Context,
    /,
    cache: Path | None,
    out: Path,
    recipe: str | None,
    workers: int,
    allow_missing: bool,
    overwrite: bool,
    device: str,
    offline: bool,
) -> None:
    """Learn prompts for a frozen CLIP, for generate-masks --prompts.

    With the objective contrastive, from images and image-level labels as generate-masks takes them; with cam, from a
    mask set and its images, so that class activation maps fit the masks. No ground truth is looked at.

    The last line on stdout is the file of the prompts. Run the same command again to go on after an interruption.

    \b
    Examples:
      wsss learn-prompts --voc VOCdevkit/VOC2012 --split train_aug --out prompts
      wsss learn-prompts --objective cam --cache cache --images photos --classes voc12 --out prompts-cam
    """
    from wsss_pipeline.stages.learn_prompts import PromptJob, learn_prompts

    job = PromptJob.read(out, given_settings(context), recipe=recipe, masks=cache, **given_paths(context))
    result = learn_prompts(
        replace(
            job,
            device=device,
            workers=workers,
            allow_missing=allow_missing,
            overwrite=overwrite,
            offline=offline,
        )
    )
    if result.interrupted:
        say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    say(result.prompts)
    context.exit(130 if result.interrupted else 0)
