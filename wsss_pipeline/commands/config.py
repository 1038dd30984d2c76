"""``wsss config``: the settings that there are, and what they come to."""

from __future__ import annotations

import click

from wsss_pipeline.commands.options import given_paths, given_settings, layer_options, say, setting
from wsss_pipeline.config import MaskConfig


@click.group("config", short_help="Show the settings that there are.")
def command() -> None:
    """Show the settings that there are, with their defaults, ranges and descriptions.

    \b
    Example:
      wsss config show --preset clip-es/voc12
    """


@command.command("show")
@setting(MaskConfig, "method", "--method", metavar="NAME")
@layer_options
@click.option("--train", is_flag=True, help="The settings of train-seg instead of generate-masks.")
@click.option("--recipe", metavar="NAME", help="Settings of train-seg, such as voc12/segformer-b2.")
@click.pass_context
def show(context: click.Context, train: bool, recipe: str | None) -> None:
    """Print the resolved settings as YAML that --config reads, each with its description and range.

    \b
    Examples:
      wsss config show --preset clip-es/coco14 --set crf.iterations=5
      wsss config show --recipe voc12/segformer-b2
    """
    from wsss_pipeline.config import Settings, to_yaml
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.methods import load_mask_config
    from wsss_pipeline.segmentation.train_config import load_train_config

    flags, paths = given_settings(context), given_paths(context)
    preset, config_file, overrides = paths["preset"], paths["config_file"], paths["overrides"]
    if train or recipe:
        if preset or flags["method"]:
            raise ConfigError(
                "--preset and --method belong to generate-masks, --recipe and --train to train-seg"
            )
        settings: Settings = load_train_config(recipe, config_file, overrides)
    else:
        settings = load_mask_config(preset, config_file, overrides, flags)
    say(to_yaml(settings, described=True).removesuffix("\n"))
