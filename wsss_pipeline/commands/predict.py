"""``wsss predict``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    device_option,
    frozen_clip_option,
    given_paths,
    image_suffix_option,
    inference_config,
    inference_options,
    offline_guarantee,
    say,
)
from wsss_pipeline.config import CrfConfig


@click.command("predict", short_help="Segment a folder of images with a trained network.")
@click.option("--checkpoint", type=PATH, required=True, help="A training run, or a checkpoint folder.")
@click.option("--images", type=PATH, required=True, help="Folder of images, searched with all below it.")
@click.option("--out", type=PATH, required=True, help="Folder for masks/, overlays/ and confidence/.")
@click.option("--split", type=PATH, help="Text file of the ids of the images to do.  [default: all]")
@image_suffix_option
@inference_options
@frozen_clip_option
@click.option("--overlays", is_flag=True, help="Also write each mask over its image.")
@click.option("--confidence", is_flag=True, help="Also write the label's probability, in half percents.")
@device_option
@offline_guarantee
@click.option("--overwrite", is_flag=True, help="Predict again what an earlier run of this command wrote.")
@click.pass_context
def command(
    context: click.Context,
    /,
    checkpoint: Path,
    images: Path,
    out: Path,
    split: Path | None,
    crf: bool,
    clip: str | None,
    overlays: bool,
    confidence: bool,
    device: str,
    overwrite: bool,
) -> None:
    """Segment every image of a folder with a trained network, or those of a split.

    Masks are palette PNGs, with more than 254 classes grey ones of 16 bits: 0 background, then the classes in the
    order of the network's config.json. An image that is too large for a whole look is worked on in tiles. The last
    line on stdout is their folder. Exit code 1 where images couldn't be read, 2 where none could. Files that
    another program wrote are never replaced.

    \b
    Example:
      wsss predict --checkpoint run --images photos --out predictions --overlays
    """
    from wsss_pipeline.stages.predict import MASKS, predict

    report = predict(
        checkpoint,
        images,
        out,
        inference=inference_config(context),
        crf=CrfConfig() if crf else None,
        clip=clip,
        overlays=overlays,
        confidence=confidence,
        device=device,
        overwrite=overwrite,
        image_suffix=given_paths(context)["image_suffix"],
        split=split,
    )
    kept = f", {report.kept} were there already" if report.kept else ""
    say(f"{report.written} masks written{kept}, {len(report.failed)} failed", err=True)
    if report.interrupted:
        say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    say(out / MASKS)
    some_failed = 1 if report.written or report.kept else 2
    context.exit(130 if report.interrupted else some_failed if report.failed else 0)
