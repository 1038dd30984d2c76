"""``wsss run``."""

from __future__ import annotations

import shlex
import sys

import click

from wsss_pipeline.commands.options import say


@click.command(
    "run", short_help="A published system from images to scores: several commands told in one file."
)
@click.argument("chain", required=False)
@click.argument("inputs", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print the commands, and stop.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine already.")
@click.pass_context
def command(
    context: click.Context, /, chain: str | None, inputs: tuple[str, ...], dry_run: bool, offline: bool
) -> None:
    """Run a chain of commands: the name of one in this package, or a YAML file of your own.

    Without a name the chains are listed, with a name and nothing else what it asks for. Each command of a chain
    can be typed by hand just as well; `--dry-run` prints them. What is done already isn't done again, so the same
    line goes on after an interruption.

    \b
    Examples:
      wsss run
      wsss run clip-es/voc12 voc=VOCdevkit/VOC2012 out=runs/clip-es
      wsss run clip-es/demo out=demo-chain --offline
    """
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.stages.chain import INTERRUPTED, chain_names, commands, load_chain, run_chain

    if chain is None:
        for name in chain_names():
            say(f"{name:16} {load_chain(name).about}")
        return
    loaded = load_chain(chain)
    if not inputs and any(given.default is None for given in loaded.inputs.values()):
        say(loaded.about)
        for name, given in loaded.inputs.items():
            shown = "" if given.default is None else f"  [default: {given.default}]"
            say(f"  {name}=...  {given.about}{shown}")
        raise ConfigError("give the inputs that have no default")
    values = loaded.values(inputs)
    if dry_run:
        for words in commands(loaded, values).values():
            say(shlex.join(["wsss", *words]))
        return
    codes = []
    for result in run_chain(loaded, values, offline=offline):
        codes.append(result.code)
        if result.code == INTERRUPTED:
            say(
                f"interrupted in stage {result.name}; go on with: {shlex.join(['wsss', *sys.argv[1:]])}",
                err=True,
            )
        elif result.code > 1:
            say(f"stage {result.name} could not do its work (exit code {result.code}), see above", err=True)
    context.exit(codes[-1] if codes[-1] > 1 else max(codes))
