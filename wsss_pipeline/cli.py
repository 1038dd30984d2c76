"""The ``wsss`` command group: finds the commands, shows errors as one line, sets the exit code.

0    done
1    done, but some images failed (they are listed)
2    the command could not do its work: usage, bad input, a cache that can't be written
130  interrupted; the command that goes on is printed
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

import click

from wsss_pipeline import __version__
from wsss_pipeline.errors import WsssError
from wsss_pipeline.runtime.output import one_line

# each is a module of wsss_pipeline.commands, written with underscores, that holds a command called ``command``
COMMANDS = (
    *("generate-masks", "train-seg", "evaluate", "predict", "export-model", "export-masks", "preview"),
    *("cache", "select-prompt", "config", "doctor", "demo"),
)


class CommandGroup(click.Group):
    """Loads a command's module when it is asked for, and turns our errors into one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None when there's none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"wsss_pipeline.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except WsssError as error:
            click.echo(f"error: {one_line(error)}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(
                "interrupted; what was finished is kept, the same command goes on from there", err=True
            )
            ctx.exit(130)


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="wsss")
@click.option("-v", "--verbose", is_flag=True, help="Also show what is of interest when something is wrong.")
@click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
def main(verbose: bool, quiet: bool) -> None:
    """Segmentation masks from image-level labels, with a frozen CLIP.

    \b
    Try it:
      wsss doctor
      wsss generate-masks --images photos --labels labels.csv --classes cat,dog --cache cache
      wsss preview --cache cache --images photos --out preview.png
    """
    # before torch starts its threads: where other processes want the cores too, our own CRF workers among them,
    # libgomp's spinning made a run 5 to 10 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logger = logging.getLogger("wsss_pipeline")
    logger.handlers[:] = [StderrHandler()]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class StderrHandler(logging.Handler):
    """Prints a message as a line on whatever stderr is at the moment: while a progress bar is shown, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """``warning: text`` for warnings and worse, the text alone below."""
        text = one_line(record.getMessage())
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(prefix + text, file=sys.stderr)
