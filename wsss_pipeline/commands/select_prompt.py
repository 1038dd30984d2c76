"""``wsss select-prompt``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    config_options,
    given_paths,
    given_settings,
    input_options,
    json_option,
    machine_options,
    say,
    template_option,
)


@click.command("select-prompt", short_help="Rank prompt templates on labelled images.")
@input_options
@template_option
@click.option(
    "--out", type=PATH, help="YAML file to write the best template into, for generate-masks --config."
)
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Rows of the table.")
@config_options
@machine_options
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    templates: tuple[str, ...],
    out: Path | None,
    limit: int | None,
    top: int,
    device: str,
    offline: bool,
    as_json: bool,
) -> None:
    """Rank prompt templates by their sharpness on labelled images; the smallest is the best.

    Without --template, the list that comes with the package is ranked. Images with one class say nothing.

    \b
    Examples:
      wsss select-prompt --images photos --labels labels.csv --classes cat,dog --out prompt.yaml
      wsss generate-masks --images photos --labels labels.csv --classes cat,dog --config prompt.yaml
    """
    import yaml

    from wsss_pipeline.clip.text import built_in_templates
    from wsss_pipeline.pseudo_masks.job import MaskJob
    from wsss_pipeline.runtime.output import MARK, check_apart, check_replaceable, printable, write_file
    from wsss_pipeline.stages.select_prompt import select_prompt

    job = MaskJob.read(given_settings(context), **given_paths(context))
    job = replace(job, limit=limit, device=device, offline=offline)
    if out is not None:
        check_apart(out, "--out", job.inputs)
        check_replaceable(out)
    ranking = select_prompt(job, templates or built_in_templates())
    if as_json:
        say(json.dumps({"ranked": ranking.ranked, "images": ranking.images, "failed": ranking.failed}))
    else:
        say(f"sharpness   template ({len(ranking.ranked)} ranked on {ranking.images} images)")
        for template, value in ranking.ranked[:top]:
            say(printable(f"{value:9.4f}   {template}"))
    if out is not None:
        best = yaml.safe_dump({"templates": [ranking.ranked[0][0]]}, allow_unicode=True)
        write_file(out, f"# {MARK}: the sharpest of {len(ranking.ranked)} templates\n{best}")
        say(f"the best one is in {out}", err=True)
    context.exit(1 if ranking.failed else 0)
