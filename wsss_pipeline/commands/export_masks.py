"""``wsss export-masks``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsss_pipeline.commands.options import PATH, say

if TYPE_CHECKING:
    from wsss_pipeline.stages.export_masks import ExportFormat


@click.command("export-masks", short_help="Write masks out of the cache as files.")
@click.option("--cache", type=PATH, required=True, help="A mask set, or a cache folder that holds one.")
@click.option("--out", type=PATH, required=True, help="Folder to write into.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["png", "voc", "coco", "npz"]),
    default="png",
    show_default=True,
    help="png: grey index masks; voc: the same with VOC's palette; coco: one JSON of run-length masks; "
    "npz: mask, confidence, labels and CAMs.",
)
@click.option(
    "--min-confidence",
    type=float,
    help="Pixels below it become 255 (in 16 bits 65535), ignored; the paper has 0.95.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier export wrote.")
@click.pass_context
def command(
    context: click.Context,
    cache: Path,
    out: Path,
    kind: ExportFormat,
    min_confidence: float | None,
    overwrite: bool,
) -> None:
    """Write masks out of the cache as files that other tools read.

    Files that hold the same already are left alone. Others are replaced with --overwrite only, and those that
    another program wrote never.

    \b
    Example:
      wsss export-masks --cache cache --out masks --format voc --min-confidence 0.95
    """
    from wsss_pipeline.cache import MaskCache
    from wsss_pipeline.stages.export_masks import export_masks

    with MaskCache.open(cache) as masks:
        report = export_masks(masks, out, kind, min_confidence, overwrite)
    for image_id, reason in report.failed.items():
        say(f"{image_id}: {reason}", err=True)
    say(
        f"{report.written} masks written, {report.unchanged} were there already, {len(report.failed)} failed",
        err=True,
    )
    if report.interrupted:
        say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    say(out)
    context.exit(130 if report.interrupted else 1 if report.failed else 0)
