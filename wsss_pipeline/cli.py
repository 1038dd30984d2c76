"""The ``wsss`` command group: finds the commands, shows errors as one line, sets the exit code.

0    done
1    done, but some images failed (they are listed)
2    the command could not do its work: usage, bad input, a cache that can't be written, a full disk behind stdout,
     or a mistake of this program's, whose traceback is printed
130  interrupted; the command that goes on is printed

A closed stdout or stderr is nobody who listens, and no error.
"""

from __future__ import annotations

import _thread
import importlib
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, TextIO

import click

from wsss_pipeline import __version__
from wsss_pipeline.errors import WsssError
from wsss_pipeline.runtime.output import one_line

# each is a module of wsss_pipeline.commands, written with underscores, that holds a command called ``command``
COMMANDS = (
    *("generate-masks", "propose-regions", "learn-prompts", "train-seg", "evaluate", "predict", "relabel"),
    *("export-model", "export-masks", "preview", "compare", "cache", "select-prompt", "attributes", "config"),
    *("doctor", "run", "demo"),
)
# the only ones that ever fetch anything: weights, and only without --offline
FETCHING = (
    *(
        "generate-masks",
        "propose-regions",
        "learn-prompts",
        "train-seg",
        "select-prompt",
        "attributes",
        "run",
    ),
)


class CommandGroup(click.Group):
    """Loads a command's module when it is asked for, and turns errors into one line and an exit code."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """``main`` as a process calls it: Python's exit code for a traceback, 1, would say that the work is done."""
        try:
            return self.main(*arguments, **options)
        except Exception as error:
            with suppress(OSError):
                traceback.print_exc()
            kind = type(error).__name__
            _complain(
                f"error: {kind}, a mistake of wsss itself: please report the lines above (what was finished is kept)"
            )
            sys.exit(2)

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click does it, with standard streams to print on, and what is printed on its way before the end."""
        _open_standard_streams()
        sys.unraisablehook, hook = _interrupt_again, sys.unraisablehook
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                sys.stdout.flush()
        except OSError as error:
            if not _is_about_printing(error):
                raise
            _complain(f"error: {_about_printing(error)}")
            sys.exit(2)
        finally:
            sys.unraisablehook = hook
            try:
                sys.stderr.flush()
            except OSError:
                _give_up(sys.stderr)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """As click does it; what it prints, such as the help, can be interrupted too."""
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:
            _complain("interrupted")
            sys.exit(130)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; that it fetches nothing holds for all that it imports."""
        name, command, rest = super().resolve_command(ctx, args)
        if name not in FETCHING or "--offline" in rest:
            stay_offline()
        return name, command, rest

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
        except KeyboardInterrupt:
            _complain("interrupted; what was finished is kept, the same command goes on from there")
            ctx.exit(130)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            _complain(f"error: {one_line(reason)}")
            ctx.exit(2)


def _reason(error: Exception) -> object:
    """What is to be said of an error that isn't a mistake of this program's; None where it may be one."""
    if isinstance(error, WsssError):
        return error
    if isinstance(error, OSError) and _is_about_printing(error):
        return _about_printing(error)
    from wsss_pipeline.runtime.device import is_out_of_memory

    text = str(error)
    if is_out_of_memory(error) or (
        isinstance(error, ImportError) and any(part in text for part in _NO_ROOM_FOR_A_LIBRARY)
    ):
        return (
            f"memory ran out ({text or 'MemoryError'}); close other programs, raise the limit on memory (ulimit -v), "
            "or give the command less to do at a time"
        )
    if isinstance(error, RecursionError):
        return "something that was read is nested too deep; look for brackets in brackets without end"
    return None


# as the dynamic linker puts it that a limit on memory leaves no room for a library
_NO_ROOM_FOR_A_LIBRARY = ("failed to map segment", "annot allocate memory")


def _interrupt_again(unraisable: Any) -> None:
    """Ctrl-C comes a second time where the first fell into a destructor, whose errors Python prints and forgets."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _complain(line: str) -> None:
    """A line on stderr, where somebody listens."""
    with suppress(OSError):
        click.echo(line, err=True)


def _about_printing(error: OSError) -> str:
    """What is wrong with stdout, which is given up."""
    _give_up(sys.stdout)
    return (
        f"what is printed can't be written: {error.strerror}; print to another place and run the same command again: "
        "what was finished is kept"
    )


def _give_up(stream: TextIO) -> None:
    """Lead a stream nowhere: what is left in it would be an error again when the interpreter ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _is_about_printing(error: OSError) -> bool:
    """Whether it was raised where click prints a text, or where ``main`` sends off what is left."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") in ("click.utils", __name__)


def _open_standard_streams() -> None:
    """Lead closed ones of the three standard streams nowhere.

    The first file that is opened would get its number else, and what a library prints there would get into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    # Python has None in the place of one that was closed when it began, and print takes that for stdout
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def stay_offline() -> None:
    """Tell the libraries that fetch things to fetch nothing, those that are imported already too."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


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
        with suppress(OSError):  # nobody listens, and the work goes on
            print(prefix + text, file=sys.stderr)
