"""Writes ``commands.md`` from every command's ``--help``, ``settings.md`` from the configuration's own fields.

``python docs/generate.py``. A test compares the files with what this makes, so that they can't drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from wsss_pipeline.cli import main
from wsss_pipeline.config import RelabelConfig, Settings, default, description, fields, recipe_names
from wsss_pipeline.methods import load_method, method_names
from wsss_pipeline.prompts.config import RECIPES, PromptConfig
from wsss_pipeline.regions.proposals import PRESETS, ProposalConfig
from wsss_pipeline.regions.superpixels import SlicConfig
from wsss_pipeline.segmentation.train_config import TrainConfig

FOLDER = Path(__file__).parent
WIDTH = 100
COMMANDS_HEAD = """# Commands

Made from `--help` by `docs/generate.py`; don't edit it by hand.

Progress and remarks go to stderr, results to stdout. Exit codes: 0 done; 1 done, but some images failed (they are
listed); 2 it couldn't be done, and the one line on stderr says why; 130 interrupted, the same command goes on.
"""


SETTINGS_HEAD = """# Settings

Made from the configuration's own fields by `docs/generate.py`; don't edit it by hand.

Each can stand in a YAML file (`--config FILE`), or be given as `--set key=value`; some have options of their own.
`wsss config show` prints what a preset, a recipe or a file comes to. Later layers win: defaults, preset or recipe,
`--config`, `--set`, options. An unknown key, a wrong type or a value out of range is refused with its name.
"""


def settings_page() -> str:
    """All of ``settings.md``."""
    parts = [SETTINGS_HEAD]
    for name in method_names():
        method = load_method(name)
        presets = ", ".join(f"`{name}/{preset}`" for preset in sorted(method.presets))
        title = f"generate-masks --method {name}"
        parts.append(f"## {title}\n\nPresets: {presets or 'none'}.\n\n{_table(method.Config)}")
    recipes = ", ".join(f"`{name}`" for name in recipe_names())
    parts.append(f"## train-seg\n\nRecipes: {recipes}.\n\n{_table(TrainConfig)}")
    prompt_recipes = ", ".join(f"`{name}`" for name in RECIPES)
    parts.append(f"## learn-prompts\n\nRecipes: {prompt_recipes}.\n\n{_table(PromptConfig)}")
    parts.append(f"## relabel\n\n{_table(RelabelConfig)}")
    parts.append(f"## propose-regions\n\nPresets: {', '.join(f'`{name}`' for name in PRESETS)}.\n")
    parts.append(_table(ProposalConfig))
    parts.append(f"## Superpixels (slic)\n\n{_table(SlicConfig)}")
    return "\n".join(parts)


def _table(kind: type[Settings]) -> str:
    rows = ["| key | default | |", "| --- | --- | --- |"]
    for key, _, _ in fields(kind):
        value = default(kind, key)
        shown = (
            "" if value in (None, "", ()) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
        )
        rows.append(f"| `{key}` | {shown} | {description(kind, key)} |")
    return "\n".join(rows) + "\n"


def commands_page() -> str:
    """All of ``commands.md``."""
    parts = [COMMANDS_HEAD]
    for name, command in _commands("wsss", main):
        context = click.Context(
            command,
            info_name=name,
            terminal_width=WIDTH,
            max_content_width=WIDTH,
            help_option_names=main.context_settings["help_option_names"],
        )
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _commands(f"{name} {below}", found)


if __name__ == "__main__":
    (FOLDER / "commands.md").write_text(commands_page(), "utf-8")
    (FOLDER / "settings.md").write_text(settings_page(), "utf-8")
