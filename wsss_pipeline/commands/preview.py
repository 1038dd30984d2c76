"""``wsss preview``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    PATH,
    device_option,
    frozen_clip_option,
    given_paths,
    image_suffix_option,
    say,
)
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import check_apart

SHEET = Path("preview.png")
ROWS, MOST_ROWS = 12, 200


@click.command("preview", short_help="Look at masks: a contact sheet, or a page to look through them.")
@click.option("--cache", type=PATH, help="A mask set, or a cache folder that holds one.")
@click.option("--predictions", type=PATH, help="With --html: a folder of index masks instead.")
@click.option("--checkpoint", type=PATH, help="With --html: a trained network's masks instead.")
@click.option("--classes", help="With --predictions: voc12, coco14, demo, a file of classes, or names.")
@click.option("--images", type=PATH, required=True, help="Folder of the images that the masks belong to.")
@image_suffix_option
@click.option("--out", type=PATH, help=f"PNG file to write, the contact sheet.  [default: {SHEET}]")
@click.option(
    "--html", type=PATH, metavar="DIR", help="Folder to write instead: a page to look through masks."
)
@click.option("--id", "image_ids", multiple=True, help="An image to show; may be repeated.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help=f"At most so many images.  [default: {ROWS} on a sheet, at most {MOST_ROWS}; all on a page]",
)
@click.option(
    "--worst",
    is_flag=True,
    help="On a sheet: the images that are most likely wrong, worst first; reads every mask.",
)
@frozen_clip_option
@device_option
@click.pass_context
def command(
    context: click.Context,
    cache: Path | None,
    predictions: Path | None,
    checkpoint: Path | None,
    classes: str | None,
    images: Path,
    out: Path | None,
    html: Path | None,
    image_ids: tuple[str, ...],
    limit: int | None,
    worst: bool,
    clip: str | None,
    device: str,
) -> None:
    """Draw images, pseudo masks, confidence and (where stored) CAMs side by side on a contact sheet.

    Without --id, images are taken evenly from the whole cache, or with --worst by the IoU that the masks' own
    confidence lets one expect, which stands beside every image. A file that is there is replaced only where this
    program wrote it.

    With --html, write a folder instead, with a page to look through the masks of thousands of images: open its
    index.html, no server needed. It shows the most doubtful first, by class where you like, with the mask over
    the image or without; mark what is bad, save rejected.txt, and give it to train-seg as --leave-out. Pictures
    that are there aren't drawn again.

    \b
    Examples:
      wsss preview --cache cache --images photos --out preview.png
      wsss preview --cache cache --images photos --html look
    """
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.stages.preview import preview, preview_folder

    suffix = given_paths(context)["image_suffix"]
    inputs = {"--cache": cache, "--images": images, "--predictions": predictions, "--checkpoint": checkpoint}
    if html is None:
        if cache is None or predictions or checkpoint or classes or clip:
            raise ConfigError(
                "a contact sheet shows the masks of --cache DIR; others are shown with --html DIR"
            )
        if (limit or 0) > MOST_ROWS:
            raise ConfigError(f"--limit {limit}: a sheet has up to {MOST_ROWS} rows; --html shows more")
        check_apart(out or SHEET, "--out", inputs)
        if worst and image_ids:
            raise ConfigError("--worst chooses the images, and so does --id; drop one of them")
        files = find_images(images, suffix, option="--image-suffix")
        say(preview(cache, files, out or SHEET, image_ids, limit or ROWS, worst=worst))
        return
    if worst:
        raise ConfigError("--worst is for a contact sheet; the page of --html shows the worst first anyway")
    if out is not None:
        raise ConfigError("--out is for a contact sheet, --html for a page; give one of them")
    if clip is not None and checkpoint is None:
        raise ConfigError("--clip goes with --checkpoint")
    if classes is not None and predictions is None:
        raise ConfigError("--classes goes with --predictions; a mask set and a network know theirs")
    from wsss_pipeline.segmentation.checkpoint import find_checkpoint
    from wsss_pipeline.stages.evaluate import open_masks

    inputs |= {"--checkpoint": find_checkpoint(checkpoint) if checkpoint else None}
    check_apart(html, "--html", inputs)
    files = find_images(images, suffix, option="--image-suffix")
    masks = open_masks(
        cache=cache,
        predictions=predictions,
        checkpoint=checkpoint,
        class_names=load_class_set(classes).names if classes else None,
        images=files,
        device=device,
        clip=clip,
    )
    report = preview_folder(masks, files, html, image_ids, limit)
    for image_id, reason in report.failed.items():
        say(f"{image_id}: {reason}", err=True)
    say(
        f"{report.images:,} images on the page, {report.drawn:,} pictures drawn, {len(report.failed):,} failed",
        err=True,
    )
    if report.interrupted:
        say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    say(report.page)
    context.exit(130 if report.interrupted else 1 if report.failed else 0)
