"""``wsss evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsss_pipeline.commands.options import PATH, inference_options, read_inference

if TYPE_CHECKING:
    from wsss_pipeline.evaluation.report import EvaluationResult
    from wsss_pipeline.stages.evaluate_network import NetworkEvaluation


@click.command("evaluate", short_help="Score masks against ground truth (mIoU).")
@click.option("--gt", "ground_truth", type=PATH, required=True, help="Folder of ground-truth index masks.")
@click.option("--cache", type=PATH, help="Score a mask set, or the only one in a cache folder.")
@click.option("--predictions", type=PATH, help="Score a folder of index masks instead.")
@click.option("--checkpoint", type=PATH, help="Score a trained network: a run, or a checkpoint folder.")
@click.option("--images", type=PATH, help="With --checkpoint: folder of the pictures.")
@click.option("--classes", help="voc12, coco14, a YAML file, or names; a cache brings its own.")
@click.option(
    "--split", type=PATH, help="Text file of image ids to score; without it, all that have ground truth."
)
@click.option("--min-confidence", type=float, help="Cache only: pixels below it count as misses.")
@click.option("--allow-missing", is_flag=True, help="Score the rest where images of the split have no mask.")
@inference_options
@click.option("--device", default="auto", show_default=True, help="Network: auto, cpu, cuda or cuda:N.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the scores as JSON; - for stdout, without the table."
)
@click.pass_context
def command(
    context: click.Context,
    /,
    json_file: str | None,
    **options: Any,
) -> None:
    """Score pseudo masks or a network against ground truth: mIoU as CLIP-ES computes it.

    One confusion matrix over all images, 255 in the ground truth left out, mean over the classes that occur
    in the ground truth. Exit code 1 where images couldn't be scored.

    \b
    Examples:
      wsss evaluate --checkpoint run --images photos --gt masks --scales 0.5,0.75,1 --flip --crf
      wsss evaluate --cache cache --gt VOC2012/SegmentationClass --split VOC2012/ImageSets/Segmentation/train.txt
    """
    from wsss_pipeline.evaluation.report import EvaluationResult

    result = _evaluate_network(options) if options["checkpoint"] else _evaluate_masks(options)
    text = json.dumps(result.as_json(), indent=2, ensure_ascii=False)
    if json_file == "-":
        click.echo(text)
    else:
        click.echo(result.as_text())
        if json_file:
            write_text(Path(json_file), text + "\n")
    last = result if isinstance(result, EvaluationResult) else result.last
    for warning in last.warnings:
        click.echo(f"warning: {warning}", err=True)
    context.exit(1 if last.skipped else 0)


def _evaluate_masks(options: dict[str, Any]) -> EvaluationResult:
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.stages.evaluate import evaluate

    for name in ("images", "scales", "flip", "window", "crf"):
        if options[name]:
            raise ConfigError(f"--{name} goes with --checkpoint; masks are scored as they are")
    classes = options["classes"]
    return evaluate(
        options["ground_truth"],
        cache=options["cache"],
        predictions=options["predictions"],
        class_names=load_class_set(classes).names if classes else None,
        split=options["split"],
        min_confidence=options["min_confidence"],
        allow_missing=options["allow_missing"],
    )


def _evaluate_network(options: dict[str, Any]) -> NetworkEvaluation:
    from wsss_pipeline.errors import ConfigError
    from wsss_pipeline.stages.evaluate_network import evaluate_network

    for name in ("cache", "predictions", "min_confidence", "classes"):
        if options[name] is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} doesn't go with --checkpoint: a network knows its classes")
    if options["images"] is None:
        raise ConfigError("--checkpoint needs --images DIR, the pictures that the ground truth belongs to")
    inference, crf = read_inference(options)
    return evaluate_network(
        options["checkpoint"],
        options["images"],
        options["ground_truth"],
        inference=inference,
        crf=crf,
        split=options["split"],
        allow_missing=options["allow_missing"],
        device=options["device"],
    )


def write_text(file: Path, text: str) -> None:
    """Write a small result file; a ConfigError where that can't be."""
    from wsss_pipeline.errors import ConfigError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error
