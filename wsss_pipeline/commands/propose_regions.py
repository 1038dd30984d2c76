"""``wsss propose-regions``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    given_paths,
    given_settings,
    image_suffix_option,
    machine_options,
    proposal_options,
    report_masks,
    run_options,
    say,
    shard_option,
)
from wsss_pipeline.config import user_layers


@click.command("propose-regions", short_help="Class-agnostic regions of images, by a SAM, into a region set.")
@click.option(
    "--sam",
    metavar="ID_OR_PATH",
    required=True,
    help="SAM, SAM-HQ or SAM 2: a hub id such as facebook/sam-vit-huge, or its folder.",
)
@click.option(
    "--images",
    type=PATH,
    required=True,
    help="Folder of images, searched with all below it, or WebDataset archives: 'shards/{000..127}.tar'.",
)
@image_suffix_option
@click.option("--out", type=PATH, required=True, help="Folder that holds the region sets.")
@click.option("--split", type=PATH, help="Text file of the ids of the images to do.  [default: all]")
@proposal_options
@machine_options
@click.option(
    "--points-per-batch",
    type=click.IntRange(1),
    help="Points that the SAM is asked for together; regions don't depend on it.  [default: 64 on a GPU, else 16]",
)
@shard_option
@run_options
@click.pass_context
def command(
    context: click.Context,
    /,
    sam: str,
    images: Path,
    out: Path,
    split: Path | None,
    device: str,
    offline: bool,
    points_per_batch: int | None,
    shard: str | None,
    limit: int | None,
    overwrite: bool,
    check_bytes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find what there is in images, its parts and their parts, of whatever class, with a SAM.

    Regions are stored once and serve every method and every pass. What the set already holds isn't computed again.
    The last line on stdout is the region set.

    \b
    Example:
      wsss propose-regions --sam facebook/sam-vit-huge --images photos --out regions
    """
    from wsss_pipeline.pseudo_masks.job import describe_plan, plan_masks
    from wsss_pipeline.runtime.share import parse_share, share_of_environment
    from wsss_pipeline.stages.propose_regions import ProposeJob, propose_regions

    paths = given_paths(context)
    job = replace(
        ProposeJob.read(
            sam,
            images,
            out,
            preset=paths["preset"],
            layers=user_layers(paths["config_file"], paths["overrides"], given_settings(context)),
            split=split,
            device=device,
            offline=offline,
            points_per_batch=points_per_batch or 0,
            image_suffix=paths["image_suffix"],
        ),
        share=parse_share(shard) if shard else share_of_environment(),
        limit=limit,
        overwrite=overwrite,
        check_bytes=check_bytes,
    )
    if dry_run:
        say("\n".join(describe_plan(plan_masks(job))))
        return
    report_masks(context, propose_regions(job), as_json)
