"""``wsss cache``: look after the pseudo-mask cache, and after region sets, which are kept alike."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsss_pipeline.commands.options import PATH, say
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import printable

if TYPE_CHECKING:
    from wsss_pipeline.cache import MaskSetStatus
    from wsss_pipeline.evaluation.quality import Quality

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def takes_mask_sets(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the mask sets that are named, or lie in folders that are: as arguments, or one as --cache."""

    @click.argument("paths", metavar="[PATH]...", nargs=-1, type=PATH)
    @click.option(
        "--cache",
        type=PATH,
        show_default="cache",
        help="A mask set, or the folder that holds mask sets; the same as PATH.",
    )
    @functools.wraps(command)
    def with_mask_sets(*arguments: Any, paths: tuple[Path, ...], cache: Path | None, **options: Any) -> None:
        from wsss_pipeline.cache import list_mask_sets

        if paths and cache is not None and [path.resolve() for path in paths] != [cache.resolve()]:
            raise ConfigError(f"{paths[0]} and --cache {cache} are both given; leave one of them away")
        found: dict[Path, None] = {}
        for path in paths or (cache or Path("cache"),):
            mask_sets = list_mask_sets(path)
            if not mask_sets:
                say(f"no mask set in {path}", err=True)
            found |= dict.fromkeys(mask_sets)
        command(*arguments, mask_sets=list(found), **options)

    return with_mask_sets


@click.group("cache", short_help="Look after the pseudo-mask cache.")
def command() -> None:
    """Look after the pseudo-mask cache, and after region sets, which are kept alike.

    \b
    Example:
      wsss cache ls cache
    """


@command.command("ls")
@takes_mask_sets
@json_option
def list_sets(mask_sets: list[Path], as_json: bool) -> None:
    """List the mask sets in a cache, a line each.

    \b
    Example:
      wsss cache ls cache
    """
    _show(mask_sets, as_json, _summary)


@command.command("status")
@takes_mask_sets
@click.option(
    "--quality",
    is_flag=True,
    help="Also estimate IoU by class and image out of the masks' own confidence, worst first; reads every mask.",
)
@json_option
def show_status(mask_sets: list[Path], quality: bool, as_json: bool) -> None:
    """Say what each mask set holds and what its masks were made with.

    \b
    Examples:
      wsss cache status cache/voc12-1f0c2a9be45d
      wsss cache status cache/voc12-1f0c2a9be45d --quality
    """
    _show(mask_sets, as_json, _details, quality)


@command.command("verify")
@takes_mask_sets
@click.pass_context
def verify_sets(context: click.Context, mask_sets: list[Path]) -> None:
    """Read every record and compare it with its digest; exit code 1 where something is damaged.

    \b
    Example:
      wsss cache verify cache
    """
    from wsss_pipeline.cache import verify

    damaged = False
    for path in mask_sets:
        report = verify(path)
        for name, reason in (report.unreadable | report.damaged).items():
            say(f"{name}: {reason}", err=True)
        say(
            f"{path}: {report.sound} images sound, {len(report.damaged)} damaged, "
            f"{len(report.unreadable)} shards unreadable"
        )
        damaged |= not report.ok
    if damaged:
        say("the same generate-masks, relabel or propose-regions again makes the damaged ones anew", err=True)
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
    say(
        f"{report.copied} shards copied, {report.already_there} were there already, "
        f"{report.unreadable} shards unreadable; the mask set holds {report.images} images",
        err=True,
    )
    say(f"{report.path}")


@command.command("gc")
@takes_mask_sets
def collect_garbage(mask_sets: list[Path]) -> None:
    """Free the disk that replaced or damaged records and left-over files take.

    \b
    Example:
      wsss cache gc cache
    """
    from wsss_pipeline.cache import gc

    for path in mask_sets:
        report = gc(path)
        say(
            f"{path}: {report.images} images kept, {report.superseded} replaced and {len(report.damaged)} damaged "
            f"records dropped, {report.salvaged} salvaged, {report.bytes_freed / 2**20:.1f} MiB freed"
        )
        for image_id in report.damaged:
            say(f"  {image_id}: its record was damaged; the command that made it makes it anew", err=True)


def _show(
    mask_sets: list[Path],
    as_json: bool,
    lines: Callable[[MaskSetStatus], Iterable[str]],
    with_quality: bool = False,
) -> None:
    from pydantic_core import to_jsonable_python

    from wsss_pipeline.cache import MaskCache, status

    found = [status(path) for path in mask_sets]
    estimates: dict[Path, Quality] = {}
    if with_quality:
        from wsss_pipeline.evaluation.quality import POSTERIOR_REMARK, estimate, is_sure_of_everything

        for item in found:
            if item.manifest.mask_set.holds == "masks":
                with MaskCache.open(item.path) as masks:
                    estimates[item.path] = estimate(masks, list(masks))
    if as_json:
        values = to_jsonable_python(found)
        for item, of_item in zip(found, values, strict=True):
            if item.path in estimates:
                of_item["quality"] = estimates[item.path].as_json()
        say(json.dumps(values))
        return
    for item in found:
        further = estimates[item.path].lines() if item.path in estimates else []
        for line in itertools.chain(lines(item), (f"  {line}" for line in further)):
            say(printable(line))  # a line break in a foreign manifest makes no further line
        if further and is_sure_of_everything(item.manifest.mask_set.determinants):
            say(f"  remark        {POSTERIOR_REMARK}")


def _summary(item: MaskSetStatus) -> Iterable[str]:
    state, size = "complete" if item.complete else "incomplete", f"{item.bytes / 2**20:.1f} MiB"
    yield f"{item.path}  {item.images} images  {size}  {state}  {item.manifest.created}"


def _details(item: MaskSetStatus) -> Iterable[str]:
    manifest = item.manifest
    size = f"{item.bytes / 2**20:.1f} MiB in {item.shards} shards, {item.bytes_per_image / 1024:.1f} KiB an image"
    yield f"{item.path}"
    yield f"  fingerprint   {manifest.fingerprint}"
    yield f"  created       {manifest.created}"
    yield f"  complete      {'yes' if item.complete else 'no'}"
    is_of_masks = manifest.mask_set.holds == "masks"
    unlabelled = f" ({item.images_without_labels} without labels)" if is_of_masks else ""
    yield f"  holds         {manifest.mask_set.holds}"
    yield f"  images        {item.images}{unlabelled}"
    yield f"  size          {size}"
    if is_of_masks:
        yield f"  classes       {', '.join(manifest.mask_set.class_names)}"
    if item.superseded:
        yield f"  replaced      {item.superseded} records (wsss cache gc frees them)"
    for name in item.partial:
        yield f"  being written {name} (or its writer died; the next run takes it over)"
    for name in item.damaged:
        yield f"  damaged       {name} (set aside)"
    for name, reason in item.unreadable.items():
        yield f"  unreadable    {name}: {reason}"
    for key, value in manifest.mask_set.determinants.items():
        if key not in ("classes", "background"):
            yield f"  {key:<13} {json.dumps(value, ensure_ascii=False)}"
    yield f"  versions      {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}"
