"""``wsss evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsss_pipeline.commands.options import PATH


@click.command("evaluate", short_help="Score masks against ground truth (mIoU).")
@click.option("--gt", "ground_truth", type=PATH, required=True, help="Folder of ground-truth index masks.")
@click.option("--cache", type=PATH, help="Score a mask set, or the only one in a cache folder.")
@click.option("--predictions", type=PATH, help="Score a folder of index masks instead.")
@click.option("--classes", help="voc12, coco14, a YAML file, or names; a cache brings its own.")
@click.option(
    "--split", type=PATH, help="Text file of image ids to score; without it, all that have ground truth."
)
@click.option("--min-confidence", type=float, help="Cache only: pixels below it count as misses.")
@click.option("--allow-missing", is_flag=True, help="Score the rest where images of the split have no mask.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the scores as JSON; - for stdout, without the table."
)
@click.pass_context
def command(
    context: click.Context,
    /,
    ground_truth: Path,
    cache: Path | None,
    predictions: Path | None,
    classes: str | None,
    split: Path | None,
    min_confidence: float | None,
    allow_missing: bool,
    json_file: str | None,
) -> None:
    """Score pseudo masks against ground truth: mIoU as CLIP-ES computes it.

    One confusion matrix over all images, 255 in the ground truth left out, mean over the classes that occur
    in the ground truth. Exit code 1 where images couldn't be scored.

    \b
    Example:
      wsss evaluate --cache cache --gt VOC2012/SegmentationClass --split VOC2012/ImageSets/Segmentation/train.txt
    """
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.stages.evaluate import evaluate

    result = evaluate(
        ground_truth,
        cache=cache,
        predictions=predictions,
        class_names=load_class_set(classes).names if classes else None,
        split=split,
        min_confidence=min_confidence,
        allow_missing=allow_missing,
    )
    text = json.dumps(result.as_json(), indent=2, ensure_ascii=False)
    if json_file == "-":
        click.echo(text)
    else:
        click.echo(result.as_text())
        if json_file:
            write_text(Path(json_file), text + "\n")
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    context.exit(1 if result.skipped else 0)


def write_text(file: Path, text: str) -> None:
    """Write a small result file; a ConfigError where that can't be."""
    from wsss_pipeline.errors import ConfigError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error
