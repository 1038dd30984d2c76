"""``wsss cache``: look after the pseudo-mask cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsss_pipeline.commands.options import PATH

if TYPE_CHECKING:
    from wsss_pipeline.cache import MaskSetStatus

cache_option = click.option(
    "--cache",
    type=PATH,
    default="cache",
    show_default=True,
    help="A mask set, or the folder that holds mask sets.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group("cache", short_help="Look after the pseudo-mask cache.")
def command() -> None:
    """Look after the pseudo-mask cache.

    \b
    Example:
      wsss cache ls --cache cache
    """


@command.command("ls")
@cache_option
@json_option
def list_sets(cache: Path, as_json: bool) -> None:
    """List the mask sets in a cache, a line each.

    \b
    Example:
      wsss cache ls --cache cache
    """
    from wsss_pipeline.cache import list_mask_sets, status

    found = [status(path) for path in list_mask_sets(cache)]
    if as_json:
        click.echo(json.dumps([_as_dict(item) for item in found]))
        return
    for item in found:
        state = "complete" if item.complete else "incomplete"
        size = f"{item.bytes / 2**20:.1f} MiB"
        click.echo(f"{item.path}  {item.images} images  {size}  {state}  {item.manifest.created}")
    if not found:
        click.echo(f"no mask set in {cache}", err=True)


@command.command("status")
@cache_option
@json_option
def show_status(cache: Path, as_json: bool) -> None:
    """Say what each mask set holds and what its masks were made with.

    \b
    Example:
      wsss cache status --cache cache/voc12-1f0c2a9be45d
    """
    from wsss_pipeline.cache import list_mask_sets, status

    found = [status(path) for path in list_mask_sets(cache)]
    if as_json:
        click.echo(json.dumps([_as_dict(item) for item in found]))
        return
    for item in found:
        click.echo("\n".join(_lines(item)))
    if not found:
        click.echo(f"no mask set in {cache}", err=True)


@command.command("verify")
@cache_option
@click.pass_context
def verify_sets(context: click.Context, cache: Path) -> None:
    """Read every record and compare it with its digest; exit code 1 where something is damaged.

    \b
    Example:
      wsss cache verify --cache cache
    """
    from wsss_pipeline.cache import list_mask_sets, verify

    damaged = False
    for path in list_mask_sets(cache):
        report = verify(path)
        for name, reason in (report.unreadable | report.damaged).items():
            click.echo(f"{name}: {reason}", err=True)
        click.echo(
            f"{path}: {report.sound} images sound, {len(report.damaged)} damaged, "
            f"{len(report.unreadable)} shards unreadable"
        )
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
        f"{report.copied} records copied, {report.already_there} were there already, "
        f"{report.unreadable} shards unreadable; the mask set holds {report.images} images",
        err=True,
    )
    click.echo(report.path)


@command.command("gc")
@cache_option
def collect_garbage(cache: Path) -> None:
    """Free the disk that replaced or damaged records and left-over files take.

    \b
    Example:
      wsss cache gc --cache cache
    """
    from wsss_pipeline.cache import gc, list_mask_sets

    for path in list_mask_sets(cache):
        report = gc(path)
        click.echo(
            f"{path}: {report.images} images kept, {report.superseded} replaced and {len(report.damaged)} damaged "
            f"records dropped, {report.salvaged} salvaged, {report.bytes_freed / 2**20:.1f} MiB freed"
        )
        for image_id in report.damaged:
            click.echo(f"  {image_id}: its record was damaged; generate-masks makes it anew", err=True)


def _as_dict(item: MaskSetStatus) -> dict[str, object]:
    values = asdict(item)
    return {**values, "path": str(item.path), "complete": item.complete, "unreadable": dict(item.unreadable)}


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
