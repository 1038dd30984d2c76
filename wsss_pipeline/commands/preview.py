"""``wsss preview``."""

from __future__ import annotations

from pathlib import Path

import click

from wsss_pipeline.commands.options import PATH, say
from wsss_pipeline.runtime.output import check_apart


@click.command("preview", short_help="Draw images, masks and confidence on a contact sheet.")
@click.option("--cache", type=PATH, required=True, help="A mask set, or a cache folder that holds one.")
@click.option("--images", type=PATH, required=True, help="Folder of the images that the masks belong to.")
@click.option("--out", type=PATH, default="preview.png", show_default=True, help="PNG file to write.")
@click.option("--id", "image_ids", multiple=True, help="An image to show; may be repeated.")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=12, show_default=True, help="At most so many images."
)
def command(cache: Path, images: Path, out: Path, image_ids: tuple[str, ...], limit: int) -> None:
    """Draw images, pseudo masks, confidence and (where stored) CAMs side by side on a contact sheet.

    Without --id, images are taken evenly from the whole cache. A file that is there is replaced only where this
    program wrote it.

    \b
    Example:
      wsss preview --cache cache --images photos --out preview.png
    """
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.stages.preview import preview

    check_apart(out, "--out", {"--cache": cache, "--images": images})
    say(preview(cache, find_images(images), out, image_ids, limit))
