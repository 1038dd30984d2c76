"""Writes ``docs/commands.md`` from every command's ``--help``: ``python docs/generate_commands.py``.

A test compares the file with what this makes, so that the two can't drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from wsss_pipeline.cli import main

FILE = Path(__file__).with_name("commands.md")
WIDTH = 100
HEAD = """# Commands

Made from `--help` by `docs/generate_commands.py`; don't edit it by hand.

Progress and remarks go to stderr, results to stdout. Exit codes: 0 done; 1 done, but some images failed (they are
listed); 2 it couldn't be done, and the one line on stderr says why; 130 interrupted, the same command goes on.
"""


def reference() -> str:
    """The whole file."""
    parts = [HEAD]
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
    FILE.write_text(reference(), "utf-8")
