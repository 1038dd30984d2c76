"""``wsss cache``: look after the pseudo-mask cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsss_pipeline.commands.options import PATH
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import printable

if TYPE_CHECKING:
    from wsss_pipeline.cache import MaskSetStatus

DEFAULT_CACHE = Path("cache")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def mask_sets_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Mask sets, or folders that hold some: as arguments, or one as ``--cache``."""
    option = click.option(
        "--cache",
        type=PATH,
        show_default=str(DEFAULT_CACHE),
        help="A mask set, or the folder that holds mask sets; the same as PATH.",
    )
    return click.argument("paths", metavar="[PATH]...", nargs=-1, type=PATH)(option(command))


def find_mask_sets(paths: tuple[Path, ...], cache: Path | None) -> list[Path]:
    """The mask sets that a command is about; a folder without one is named on stderr.

    Raises:
        ConfigError: arguments and ``--cache`` name different folders.
        CacheFormatError: one isn't there.
    """
    from wsss_pipeline.cache import list_mask_sets

    if paths and cache is not None and [path.resolve() for path in paths] != [cache.resolve()]:
        raise ConfigError(f"{paths[0]} and --cache {cache} are both given; leave one of them away")
    found: list[Path] = []
    for path in paths or (cache or DEFAULT_CACHE,):
        sets = list_mask_sets(path)
        if not sets:
            click.echo(printable(f"no mask set in {path}"), err=True)
        found += sets
    return list(dict.fromkeys(found))


@click.group("cache", short_help="Look after the pseudo-mask cache.")
def command() -> None:
    """Look after the pseudo-mask cache.

    \b
    Example:
      wsss cache ls cache
    """


@command.command("ls")
@mask_sets_argument
@json_option
def list_sets(paths: tuple[Path, ...], cache: Path | None, as_json: bool) -> None:
    """List the mask sets in a cache, a line each.

    \b
    Example:
      wsss cache ls cache
    """
    from wsss_pipeline.cache import status

    found = [status(path) for path in find_mask_sets(paths, cache)]
    if as_json:
        click.echo(_json(found))
        return
    for item in found:
        state = "complete" if item.complete else "incomplete"
        size = f"{item.bytes / 2**20:.1f} MiB"
        line = f"{item.path}  {item.images} images  {size}  {state}  {item.manifest.created}"
        click.echo(printable(line))


@command.command("status")
@mask_sets_argument
@json_option
def show_status(paths: tuple[Path, ...], cache: Path | None, as_json: bool) -> None:
    """Say what each mask set holds and what its masks were made with.

    \b
    Example:
      wsss cache status cache/voc12-1f0c2a9be45d
    """
    from wsss_pipeline.cache import status

    found = [status(path) for path in find_mask_sets(paths, cache)]
    if as_json:
        click.echo(_json(found))
        return
    for item in found:
        click.echo("\n".join(map(printable, _lines(item))))


@command.command("verify")
@mask_sets_argument
@click.pass_context
def verify_sets(context: click.Context, paths: tuple[Path, ...], cache: Path | None) -> None:
    """Read every record and compare it with its digest; exit code 1 where something is damaged.

    \b
    Example:
      wsss cache verify cache
    """
    from wsss_pipeline.cache import verify

    damaged = False
    for path in find_mask_sets(paths, cache):
        report = verify(path)
        for name, reason in (report.unreadable | report.damaged).items():
            click.echo(printable(f"{name}: {reason}"), err=True)
        summary = (
            f"{path}: {report.sound} images sound, {len(report.damaged)} damaged, "
            f"{len(report.unreadable)} shards unreadable"
        )
        click.echo(printable(summary))
        damaged |= not report.ok
    if damaged:
        click.echo("running the same generate-masks again makes the damaged masks anew", err=True)
        context.exit(1)


@command.command("merge")
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option(
    "--into", "destination", required=True, type=PATH, help="Cache folder or mask set to copy into."
)
def merge_sets(sources: tuple[Path, ...], destination: Path) -> None:
    """Copy mask sets of the same fingerprint, made on several machines, into one.

    \b
    Example:
      wsss cache merge machine1/voc12-1f0c2a9be45d machine2/voc12-1f0c2a9be45d --into cache
    """
    from wsss_pipeline.cache import merge

    report = merge(sources, destination)
    click.echo(
        f"{report.copied} shards copied, {report.already_there} were there already, "
        f"{report.unreadable} shards unreadable; the mask set holds {report.images} images",
        err=True,
    )
    click.echo(printable(str(report.path)))


@command.command("gc")
@mask_sets_argument
def collect_garbage(paths: tuple[Path, ...], cache: Path | None) -> None:
    """Free the disk that replaced or damaged records and left-over files take.

    \b
    Example:
      wsss cache gc cache
    """
    from wsss_pipeline.cache import gc

    for path in find_mask_sets(paths, cache):
        report = gc(path)
        summary = (
            f"{path}: {report.images} images kept, {report.superseded} replaced and {len(report.damaged)} damaged "
            f"records dropped, {report.salvaged} salvaged, {report.bytes_freed / 2**20:.1f} MiB freed"
        )
        click.echo(printable(summary))
        for image_id in report.damaged:
            line = f"  {image_id}: its record was damaged; generate-masks makes it anew"
            click.echo(printable(line), err=True)


def _json(found: list[MaskSetStatus]) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(found))


def _lines(item: MaskSetStatus) -> list[str]:
    mask_set = item.manifest.mask_set
    lines = [
        f"{item.path}",
        f"  fingerprint   {item.manifest.fingerprint}",
        f"  created       {item.manifest.created}",
        f"  complete      {'yes' if item.complete else 'no'}",
        f"  images        {item.images} ({item.images_without_labels} without labels)",
        f"  size          {item.bytes / 2**20:.1f} MiB in {item.shards} shards, "
        f"{item.bytes_per_image / 1024:.1f} KiB an image",
        f"  classes       {', '.join(mask_set.class_names)}",
    ]
    if item.superseded:
        lines.append(f"  replaced      {item.superseded} records (wsss cache gc frees them)")
    lines += [
        f"  being written {name} (or its writer died; the next run takes it over)" for name in item.partial
    ]
    lines += [f"  damaged       {name} (set aside)" for name in item.damaged]
    lines += [f"  unreadable    {name}: {reason}" for name, reason in item.unreadable.items()]
    made_with = {
        key: value for key, value in mask_set.determinants.items() if key not in ("classes", "background")
    }
    lines += [f"  {key:<13} {json.dumps(value, ensure_ascii=False)}" for key, value in made_with.items()]
    lines.append(f"  versions      {', '.join(f'{name} {v}' for name, v in item.manifest.versions.items())}")
    return lines
