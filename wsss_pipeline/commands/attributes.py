"""``wsss attributes``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from wsss_pipeline.commands.options import (
    CLASSES_FORMS,
    attributes_option,
    config_options,
    given_paths,
    given_settings,
    json_option,
    machine_options,
    say,
    setting,
)
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.errors import ConfigError


@click.group("attributes", short_help="Look at the sentences that enrich class texts.")
def command() -> None:
    """Look at the sentences of what one sees of each class, which enrich the texts of the method excel.

    \b
    Example:
      wsss attributes check --classes voc12
    """


@command.command("check")
@click.option("--classes", required=True, help=f"{CLASSES_FORMS}.")
@setting(
    MaskConfig, "method", "--method", metavar="NAME", help="One that takes attributes.  [default: excel]"
)
@attributes_option
@config_options
@machine_options
@json_option
@click.pass_context
def check(context: click.Context, /, classes: str, device: str, offline: bool, as_json: bool) -> None:
    """Say how far the sentences tell the classes apart, by the CLIP that is to use them.

    "own" is the share of a class's sentences that are more like its text than like any other class's. "plain" and
    "enriched" are the largest cosine of its text with another's, both less the mean of all: the smaller, the better
    they are told apart.

    \b
    Example:
      wsss attributes check --classes cat,dog --attributes attributes.json
    """
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.methods import load_mask_config
    from wsss_pipeline.methods.excel import ExcelConfig
    from wsss_pipeline.stages.attributes import check_attributes

    paths = given_paths(context)
    flags = {**given_settings(context), "classes": classes}
    overrides = ("method=excel", *(paths.get("overrides") or ()))
    config = load_mask_config(paths.get("preset"), paths.get("config_file"), overrides, flags)
    if not isinstance(config, ExcelConfig):
        raise ConfigError(f"method {config.method} takes no attributes; give --method excel, or leave it out")
    checks = check_attributes(config, load_class_set(classes), device, offline)
    if as_json:
        say(json.dumps([asdict(item) for item in checks]))
        return
    width = max(len(item.name) for item in checks)
    say(f"{'class':{width}}  sentences    own  plain  enriched  most like")
    for item in checks:
        figures = f"{item.sentences:9}  {100 * item.own:4.0f}%  {item.plain:5.2f}  {item.enriched:8.2f}"
        say(f"{item.name:{width}}  {figures}  {item.nearest}")
