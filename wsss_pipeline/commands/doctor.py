"""``wsss doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    clip_options,
    file_options,
    given_paths,
    given_settings,
    json_option,
    say,
)


@click.command("doctor", short_help="Say what is installed here and what is missing.")
@click.option("--cache", type=PATH, default="cache", show_default=True, help="Where masks are to be written.")
@clip_options
@file_options("clip.activation=gelu")
@json_option
@click.pass_context
def command(context: click.Context, /, cache: Path, as_json: bool) -> None:
    """Say what is installed here, which device and CRF would be used, and what is missing.

    Nothing is fetched. Exit code 1 where something would stop generate-masks.

    \b
    Example:
      wsss doctor --cache cache
    """
    from wsss_pipeline.methods import load_mask_config
    from wsss_pipeline.runtime.output import printable
    from wsss_pipeline.stages.doctor import doctor

    paths = given_paths(context)
    config = load_mask_config(
        None, paths.get("config_file"), paths.get("overrides") or (), given_settings(context)
    )
    checks = doctor(cache, config.clip)
    if as_json:
        say(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            say(printable(f"{check.status:<5} {check.name:<10} {check.text}"))
    context.exit(1 if any(check.status == "fail" for check in checks) else 0)
