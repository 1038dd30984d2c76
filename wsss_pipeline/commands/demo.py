"""``wsss demo``."""

from __future__ import annotations

from pathlib import Path

import click

from wsss_pipeline.commands.options import PATH, offline_guarantee, say

NEXT = (
    "Next, with images of your own; labels.csv begins with the line image,labels and goes on as 0001.jpg,cat;dog",
    "  wsss generate-masks --images photos --labels labels.csv --classes cat,dog --cache cache",
    "  wsss preview --cache cache --images photos --html look",
)


@click.command("demo", short_help="Run everything on drawn scenes with the embedded CLIP, offline.")
@click.option(
    "--out", type=PATH, default="demo-out", show_default=True, help="Folder for data, cache, network, report."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of scenes and network.")
@click.option(
    "--recipe",
    type=click.Choice(
        ["demo/frozen-clip", "weclip/demo", "excel/demo", "demo/deeplabv3plus", "demo/segformer"]
    ),
    default="demo/frozen-clip",
    show_default=True,
    help="Of the network. weclip and excel learn from the labels, on the frozen CLIP as demo/frozen-clip; the others "
    "start from nothing.",
)
@click.option("--upper-bound", is_flag=True, help="Also train a network on the ground truth.")
@click.option("--data-only", is_flag=True, help="Draw the scenes, print their folder, and stop.")
@offline_guarantee
def command(out: Path, seed: int, recipe: str, upper_bound: bool, data_only: bool) -> None:
    """Draw a small data set, make pseudo masks of it by three methods, train a network on the best and score all,
    offline.

    200 training and 100 test scenes are laid out as PASCAL VOC lays out its images, and the CLIP that
    comes with this package was trained on such scenes and their captions. A second run computes nothing
    twice.

    \b
    Example:
      wsss demo --out demo-out
    """
    from wsss_pipeline.stages.demo import draw_scenes, run_demo

    if data_only:
        say(draw_scenes(out, seed))
        return
    say("\n".join([*run_demo(out, seed, recipe, upper_bound=upper_bound).lines(), "", *NEXT]))
