"""``wsss evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsss_pipeline.commands.options import PATH, inference_options, read_inference

if TYPE_CHECKING:
    from wsss_pipeline.evaluation.report import EvaluationResult
    from wsss_pipeline.stages.evaluate_network import NetworkEvaluation, NetworkMasks
    from wsss_pipeline.stages.evaluation_report import ReportImages


@click.command("evaluate", short_help="Score masks against ground truth (mIoU).")
@click.option(
    "--gt",
    "ground_truth",
    type=PATH,
    help="Folder of ground-truth index masks; --report can do without.",
)
@click.option("--cache", type=PATH, help="Score a mask set, or the only one in a cache folder.")
@click.option("--predictions", type=PATH, help="Score a folder of index masks instead.")
@click.option("--checkpoint", type=PATH, help="Score a trained network: a run, or a checkpoint folder.")
@click.option("--images", type=PATH, help="With --checkpoint or --report: folder of the pictures.")
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
@click.option(
    "--report",
    type=PATH,
    metavar="FILE",
    help="Write a self-contained HTML page with pictures; needs --images.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    json_file: str | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Score pseudo masks or a network against ground truth: mIoU as CLIP-ES computes it.

    One confusion matrix over all images, 255 in the ground truth left out, mean over the classes that occur
    in the ground truth. Exit code 1 where images couldn't be scored. Without --gt, --report shows the least
    certain pseudo masks of --cache, and with --checkpoint or --predictions the largest disagreement.

    \b
    Examples:
      wsss evaluate --checkpoint run --images photos --gt masks --scales 0.5,0.75,1 --flip --crf
      wsss evaluate --cache cache --images photos --gt masks --report report.html
      wsss evaluate --cache cache --gt VOC2012/SegmentationClass --split VOC2012/ImageSets/Segmentation/train.txt
    """
    from wsss_pipeline.evaluation.report import EvaluationResult
    from wsss_pipeline.stages.evaluation_report import report_with_truth, report_without_truth

    _check(options, report)
    network = _network(options) if options["checkpoint"] else None
    images = _report_images(options, network) if report else None
    settings = {name: str(value) for name, value in options.items() if value not in (None, False)}
    if options["ground_truth"] is None:
        assert report is not None
        assert images is not None
        count = report_without_truth(report, images, settings)
        click.echo(f"{count} images looked at, none scored: there is no ground truth", err=True)
        click.echo(report)
        return
    result = _evaluate_network(network, options, images) if network else _evaluate_masks(options, images)
    last = result if isinstance(result, EvaluationResult) else result.last
    text = json.dumps(result.as_json(), indent=2, ensure_ascii=False)
    if json_file == "-":
        click.echo(text)
    else:
        click.echo(result.as_text())
        if json_file:
            write_text(Path(json_file), text + "\n")
    for warning in last.warnings:
        click.echo(f"warning: {warning}", err=True)
    if report is not None and images is not None:
        report_with_truth(report, last, images, settings)
        click.echo(f"report: {report}", err=True)
    context.exit(1 if last.skipped else 0)


def _check(options: dict[str, Any], report: Path | None) -> None:
    """Options that contradict each other, before anything is read."""
    from wsss_pipeline.errors import ConfigError

    if options["ground_truth"] is None and report is None:
        raise ConfigError("--gt is missing: the folder of ground-truth masks; only --report can do without")
    if (report or options["checkpoint"]) and options["images"] is None:
        raise ConfigError("--checkpoint and --report need --images DIR, the folder of the pictures")
    if options["checkpoint"]:
        for name in ("predictions", "min_confidence", "classes"):
            if options[name] is not None:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} doesn't go with --checkpoint: a network knows its classes")
        if options["cache"] and report is None:
            raise ConfigError(
                "--cache goes with --checkpoint only for a --report, to show its pseudo masks too"
            )
        return
    for name in ("scales", "flip", "window", "crf"):
        if options[name]:
            raise ConfigError(f"--{name} goes with --checkpoint; masks are scored as they are")


def _network(options: dict[str, Any]) -> NetworkMasks:
    from wsss_pipeline.stages.evaluate_network import load_network_masks

    inference, crf = read_inference(options)
    return load_network_masks(
        options["checkpoint"], options["images"], inference=inference, crf=crf, device=options["device"]
    )


def _report_images(options: dict[str, Any], network: NetworkMasks | None) -> ReportImages:
    from wsss_pipeline.cache import MaskCache
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.data.images import read_mask
    from wsss_pipeline.stages.evaluation_report import ReportImages

    cache = MaskCache.open(options["cache"]) if options["cache"] else None
    predict = network.mask if network else None
    if options["predictions"]:
        files = find_images(options["predictions"])
        predict = lambda image_id: read_mask(files[image_id])  # noqa: E731
    names = network.class_names if network else cache.class_names if cache else ()
    if options["classes"]:
        names = load_class_set(options["classes"]).names
    truth = find_images(options["ground_truth"]) if options["ground_truth"] else {}
    return ReportImages(find_images(options["images"]), tuple(names), cache, predict, truth)


def _evaluate_masks(options: dict[str, Any], images: ReportImages | None) -> EvaluationResult:
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.stages.evaluate import evaluate

    classes = options["classes"]
    return evaluate(
        options["ground_truth"],
        cache=options["cache"],
        predictions=options["predictions"],
        class_names=load_class_set(classes).names if classes else None,
        split=options["split"],
        min_confidence=options["min_confidence"],
        allow_missing=options["allow_missing"],
        on_image=images.add if images else None,
    )


def _evaluate_network(
    network: NetworkMasks, options: dict[str, Any], images: ReportImages | None
) -> NetworkEvaluation:
    from wsss_pipeline.stages.evaluate_network import evaluate_network

    return evaluate_network(
        network,
        options["ground_truth"],
        split=options["split"],
        allow_missing=options["allow_missing"],
        on_image=images.add if images else None,
    )


def write_text(file: Path, text: str) -> None:
    """Write a small result file; a ConfigError where that can't be."""
    from wsss_pipeline.errors import ConfigError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error
