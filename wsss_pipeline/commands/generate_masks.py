"""``wsss generate-masks``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from wsss_pipeline.commands.options import (
    cache_option,
    config_options,
    given_paths,
    given_settings,
    input_options,
    machine_options,
    method_options,
    report_masks,
    run_options,
    say,
    shard_option,
    template_option,
)

if TYPE_CHECKING:
    from wsss_pipeline.pseudo_masks.job import Engine


@click.command("generate-masks", short_help="Make pseudo masks from images and labels, into the cache.")
@input_options
@cache_option
@template_option
@config_options
@method_options
@machine_options
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="On a GPU: images of one size that CLIP sees together.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Images that the CPU works on at a time; with Ray, tasks at a time.  [default: one a core, at most 8; "
    "with Ray, as many as there is room for]",
)
@shard_option
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This machine, or a Ray cluster.",
)
@click.option(
    "--checkpoint",
    metavar="RUN",
    help="Method weclip or excel: a run of --network frozen-clip, which gates and guides what makes the CAMs.",
)
@click.option("--store-cams", is_flag=True, help="Keep the CAMs before refinement in the cache as well.")
@run_options
@click.pass_context
def command(
    context: click.Context,
    /,
    templates: tuple[str, ...],
    device: str,
    offline: bool,
    batch_size: int,
    workers: int | None,
    shard: str | None,
    engine: Engine,
    limit: int | None,
    checkpoint: str | None,
    store_cams: bool,
    overwrite: bool,
    check_bytes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make pseudo masks from images and image-level labels, into the cache.

    What the cache already holds isn't computed again. The last line on stdout is the mask set: the folder
    that evaluate, preview and export-masks take as --cache.

    Under torchrun each process takes a share and a GPU: `torchrun --nproc-per-node 8 -m wsss_pipeline
    generate-masks ...`; failed images are listed then, but the exit code stays 0, since torchrun would stop
    the other processes.

    \b
    Examples:
      wsss generate-masks --images photos --labels labels.csv --classes cat,dog --cache cache
      wsss generate-masks --voc VOCdevkit/VOC2012 --split train_aug
    """
    from wsss_pipeline.config import section
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.methods import DEFAULT_METHOD, load_method
    from wsss_pipeline.pseudo_masks.job import MaskJob, describe_plan, plan_masks
    from wsss_pipeline.runtime.device import images_at_a_time
    from wsss_pipeline.runtime.share import parse_share, share_of_environment
    from wsss_pipeline.stages.generate_masks import generate_masks

    if workers is None:
        workers = 0 if engine == "ray" else images_at_a_time()
    settings, paths = {"templates": templates or None, **given_settings(context)}, given_paths(context)
    if checkpoint is not None:
        name = settings["method"] or (paths.get("preset") or DEFAULT_METHOD).partition("/")[0]
        own = section(load_method(name).Config, name)
        if own is None or "checkpoint" not in own.model_fields:
            raise ConfigError(f"--checkpoint: method {name} takes no network; give --method weclip or excel")
        settings[f"{name}.checkpoint"] = checkpoint
    job = replace(
        MaskJob.read(settings, **paths),
        share=parse_share(shard) if shard else share_of_environment(),
        device=device,
        offline=offline,
        batch_size=batch_size,
        workers=workers,
        engine=engine,
        limit=limit,
        store_cams=store_cams,
        overwrite=overwrite,
        check_bytes=check_bytes,
    )
    name = job.config.refine if job.config.refine != "auto" else load_method(job.config.method).refiner
    if settings["vote.regions"] and name != "vote":
        raise ConfigError(
            f"--regions is of use to --refine vote alone, and here it is {name}; drop one of them"
        )
    if dry_run:
        say("\n".join(describe_plan(plan_masks(job))))
        return
    report_masks(context, generate_masks(job), as_json)
