"""``wsss evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsss_pipeline.commands.options import (
    CLASSES_FORMS,
    PATH,
    frozen_clip_option,
    given_paths,
    given_settings,
    gt_suffix_option,
    image_suffix_option,
    inference_config,
    inference_options,
    offline_guarantee,
    say,
)
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import check_apart, check_replaceable, write_file


@click.command("evaluate", short_help="Score masks against ground truth (mIoU).")
@click.option(
    "--gt", "ground_truth", type=PATH, help="Folder of ground-truth masks; --report can do without."
)
@gt_suffix_option
@click.option("--cache", type=PATH, help="Score a mask set, or the only one in a cache folder.")
@click.option("--predictions", type=PATH, help="Score a folder of index masks instead.")
@click.option("--checkpoint", type=PATH, help="Score a trained network: a run, or a checkpoint folder.")
@click.option("--images", type=PATH, help="With --checkpoint or --report: folder of the images.")
@image_suffix_option
@click.option("--classes", help=f"{CLASSES_FORMS}; a cache brings its own.")
@click.option(
    "--split", type=PATH, help="Text file of image ids to score; without it, all that have ground truth."
)
@click.option("--min-confidence", type=float, help="Not with --predictions: pixels below it count as misses.")
@click.option("--allow-missing", is_flag=True, help="Score the rest where images of the split have no mask.")
@inference_options
@frozen_clip_option
@click.option("--device", default="auto", show_default=True, help="Network: auto, cpu, cuda or cuda:N.")
@offline_guarantee
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the scores as JSON; - for stdout, without the table."
)
@click.option("--report", type=PATH, metavar="FILE", help="Write a self-contained HTML page; needs --images.")
@click.pass_context
def command(
    context: click.Context,
    /,
    ground_truth: Path | None,
    cache: Path | None,
    predictions: Path | None,
    checkpoint: Path | None,
    images: Path | None,
    classes: str | None,
    split: Path | None,
    min_confidence: float | None,
    allow_missing: bool,
    crf: bool,
    clip: str | None,
    device: str,
    json_file: str | None,
    report: Path | None,
) -> None:
    """Score pseudo masks or a network against ground truth: mIoU as CLIP-ES computes it.

    One confusion matrix over all images, 255 in the ground truth left out, mean over the classes that occur
    in the ground truth. Exit code 1 where images couldn't be scored. Without --gt, --report shows the least
    certain pseudo masks of --cache, and with --checkpoint or --predictions the largest disagreement. Files of
    --json and --report are replaced only where this program wrote them.

    \b
    Examples:
      wsss evaluate --checkpoint run --images photos --gt masks --scales 0.5,0.75,1 --flip --crf
      wsss evaluate --cache cache --images photos --gt masks --report report.html
      wsss evaluate --cache cache --gt VOC2012/SegmentationClass --split VOC2012/ImageSets/Segmentation/train.txt
    """
    if ground_truth is None and report is None:
        raise ConfigError("--gt is missing: the folder of ground-truth masks; only --report can do without")
    if (report or checkpoint) and images is None:
        raise ConfigError("--checkpoint and --report need --images DIR, the folder of the images")
    if checkpoint is None:
        given = {**given_settings(context), "crf": crf, "clip": clip}
        for name in (name for name, value in given.items() if value):
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with --checkpoint; masks are scored as they are"
            )
    elif predictions or classes:
        name = "predictions" if predictions else "classes"
        raise ConfigError(f"--{name} doesn't go with --checkpoint: a network knows its classes")
    elif cache and report is None:
        raise ConfigError("--cache goes with --checkpoint only for a --report, to show its pseudo masks too")
    if ground_truth is None and cache is None:
        raise ConfigError("without --gt a report shows pseudo masks: give --cache")
    inference = inference_config(context)

    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.image_ids import find_images
    from wsss_pipeline.segmentation.checkpoint import find_checkpoint
    from wsss_pipeline.stages.evaluate import evaluate, open_masks, report_without_ground_truth

    inputs = {"--gt": ground_truth, "--cache": cache, "--predictions": predictions, "--images": images}
    inputs |= {"--split": split, "--checkpoint": find_checkpoint(checkpoint) if checkpoint else None}
    scores = Path(json_file) if json_file not in (None, "-") else None
    for option, file in (("--json", scores), ("--report", report)):
        if file is not None:
            check_apart(file, option, inputs)
            check_replaceable(file)
    if scores is not None and report is not None and scores.resolve() == report.resolve():
        raise ConfigError(
            f"--json and --report are both to be written to {report}; give each a file of its own"
        )
    settings: dict[str, object] = {
        name: str(value)
        for name, value in context.params.items()
        if value not in (None, False) and name not in ("json_file", "report")
    }
    if checkpoint is not None:
        settings["inference"] = inference.model_dump(mode="json")
    paths = given_paths(context)
    suffix = paths["image_suffix"]
    files = {} if images is None else find_images(images, suffix, option="--image-suffix")
    class_set = load_class_set(classes) if classes else None
    class_names = class_set.names if class_set is not None else None
    # beside a network, and where nothing is scored, the cache is there to be shown
    pseudo_masks = source = None
    if cache is not None and (checkpoint is not None or ground_truth is None):
        pseudo_masks = open_masks(cache=cache, class_names=class_names)
        cache, class_names = None, pseudo_masks.class_names
    if ground_truth is not None or predictions is not None or checkpoint is not None:
        source = open_masks(
            cache=cache,
            predictions=predictions,
            checkpoint=checkpoint,
            class_names=class_names,
            images=files,
            inference=inference,
            crf=CrfConfig() if crf else None,
            device=device,
            clip=clip,
        )
    if ground_truth is None:
        assert report is not None
        assert pseudo_masks is not None
        count = report_without_ground_truth(report, files, pseudo_masks, source, settings)
        say(f"{count} images looked at, none scored: there is no ground truth", err=True)
        say(report)
        return
    assert source is not None
    result = evaluate(
        source,
        ground_truth,
        colors=class_set.colors if class_set is not None else None,
        split=split,
        min_confidence=min_confidence,
        allow_missing=allow_missing,
        report=report,
        images=files,
        pseudo_masks=pseudo_masks,
        settings=settings,
        gt_suffix=paths["gt_suffix"],
    )
    if json_file == "-":
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        say(result.as_text())
        if scores is not None:
            write_file(scores, json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")
    for warning in result.warnings:
        say(f"warning: {warning}", err=True)
    if report is not None:
        say(f"report: {report}", err=True)
    context.exit(1 if result.skipped else 0)
