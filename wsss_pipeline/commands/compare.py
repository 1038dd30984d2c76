"""``wsss compare``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    CLASSES_FORMS,
    PATH,
    device_option,
    frozen_clip_option,
    given_paths,
    gt_suffix_option,
    image_suffix_option,
    json_option,
    offline_guarantee,
    say,
)
from wsss_pipeline.runtime.output import check_apart


@click.command("compare", short_help="Mask sets, folders of masks and networks side by side.")
@click.argument("masks", metavar="MASKS MASKS...", nargs=-1, required=True, type=PATH)
@click.option("--gt", "ground_truth", type=PATH, help="Folder of ground-truth masks, to score them.")
@gt_suffix_option
@click.option("--images", type=PATH, help="Folder of the images; for networks and --report.")
@image_suffix_option
@click.option("--classes", help=f"{CLASSES_FORMS}; where there are folders of masks alone.")
@click.option("--split", type=PATH, help="Text file of image ids to look at.  [default: all]")
@click.option("--report", type=PATH, metavar="FILE", help="Write a self-contained HTML page; needs --images.")
@frozen_clip_option
@device_option
@offline_guarantee
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    masks: tuple[Path, ...],
    ground_truth: Path | None,
    images: Path | None,
    classes: str | None,
    split: Path | None,
    report: Path | None,
    clip: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Compare masks of the same images: each of MASKS is a mask set, a folder of index masks, or a trained run.

    With --gt the IoU of each by class. Without, the IoU that each can expect where the truth is what all of them,
    with their confidences, make likely: the largest is recommended. Either way, how far they agree, by pair and by
    class, and the images in which they differ most. Images that one of them lacks are left out and counted. Exit
    code 1 where images couldn't be compared.

    \b
    Examples:
      wsss compare cache/voc12-1f0c2a9be45d cache/voc12-77d0e2b1c3aa --images photos --report compare.html
      wsss compare cache/voc12-1f0c2a9be45d run predictions --images photos --gt masks
    """
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.stages.compare import compare, open_compared

    if report is not None:
        inputs = {f"MASKS {number}": path for number, path in enumerate(masks, start=1)}
        check_apart(
            report, "--report", {**inputs, "--gt": ground_truth, "--images": images, "--split": split}
        )
    paths = given_paths(context)
    suffix = paths["image_suffix"]
    files = None if images is None else find_images(images, suffix, option="--image-suffix")
    class_set = load_class_set(classes) if classes else None
    settings = {
        name: [str(path) for path in value] if isinstance(value, tuple) else str(value)
        for name, value in context.params.items()
        if value not in (None, False)
    }
    result = compare(
        open_compared(masks, files, None if class_set is None else class_set.names, device, clip),
        ground_truth=ground_truth,
        colors=None if class_set is None else class_set.colors,
        gt_suffix=paths["gt_suffix"],
        split=split,
        report=report,
        images=files,
        settings=settings,
    )
    if as_json:
        say(
            json.dumps(
                {**result.comparison.as_json(), "skipped": dict(result.skipped), "left_out": result.left_out}
            )
        )
    else:
        say("\n".join(result.lines()))
    if report is not None:
        say(f"report: {report}", err=True)
    context.exit(1 if result.skipped else 0)
