"""One self-contained, escaped HTML page about an evaluation: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import platform
import random
from collections.abc import Iterable, Mapping
from importlib import metadata

import numpy as np
from PIL import Image

from wsss_pipeline import __version__
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.masks import MaskSource
from wsss_pipeline.evaluation.comparison import Comparison
from wsss_pipeline.evaluation.quality import Quality
from wsss_pipeline.evaluation.result import Evaluation
from wsss_pipeline.pictures.overlays import Rgb, class_colour, encoded
from wsss_pipeline.pictures.rows import Label, make_row
from wsss_pipeline.pictures.templates import render

SHOWN = 12  # images a section
CELL = (320, 320)  # largest width and height of an image
CONFUSIONS_SHOWN = 10
LARGEST_MATRIX = 256  # rows; more would be a page of many megabytes
ESTIMATE = "from the masks' own confidence; no ground truth was looked at"
SMALLEST_SHOWN = 0.05  # percent: less would read 0.0
_LIBRARIES = ("torch", "transformers", "segmentation-models-pytorch", "numpy", "h5py", "Pillow")


def evaluation_page(
    evaluation: Evaluation,
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
) -> str:
    """The page of an evaluation against ground truth: scores, confusions, worst and random images.

    Args:
        images: image id to file.
        masks: pictures of an image, by title, see ``make_row``.
        settings: settings of the run, nested; shown as YAML.
    """
    scores, names = evaluation.scores, ("background", *evaluation.class_names, "no label")
    known = {image_id: miou for image_id, miou in evaluation.image_miou.items() if miou is not None}
    notes = {image_id: f"mIoU over its own classes {100 * miou:.1f} %" for image_id, miou in known.items()}
    worst = sorted(known, key=known.__getitem__)[:SHOWN]
    others = sorted(set(known) - set(worst))
    chance = sorted(random.Random(0).sample(others, min(SHOWN, len(others))))
    # percent of each row's pixels, 0 in an empty row
    matrix = 100 * evaluation.matrix / np.maximum(1, evaluation.matrix.sum(axis=1, keepdims=True))
    confused = matrix.copy()
    np.fill_diagonal(confused, 0)
    largest = np.unravel_index(np.argsort(-confused, axis=None)[:CONFUSIONS_SHOWN], confused.shape)
    return _page(
        images,
        masks,
        settings,
        title=f"Evaluation on {evaluation.split}",
        score=f"{100 * scores.miou:.2f} %",
        warnings=evaluation.warnings,
        summary=[
            ("Images", f"{evaluation.images:,} of split {evaluation.split} (ids {evaluation.id_digest})"),
            *(line.split(": ", 1) for line in evaluation.origin_lines() if ": " in line),
            ("Pixel accuracy", f"{100 * scores.pixel_accuracy:.2f} %"),
            ("Mean accuracy", f"{100 * scores.mean_accuracy:.2f} %"),
            ("Frequency-weighted IoU", f"{100 * scores.frequency_weighted_iou:.2f} %"),
        ],
        classes=_legend(names[:-1]),
        per_class_iou=list(scores.per_class_iou.values()),
        confusions=[
            f"{confused[row, column]:.1f} % of {names[row]} is taken for {names[column]}"
            for row, column in zip(*largest, strict=True)
            if confused[row, column] >= SMALLEST_SHOWN
        ],
        matrix_heads=names,
        matrix=matrix.tolist() if len(names) <= LARGEST_MATRIX else None,
        smallest_shown=SMALLEST_SHOWN,
        sections={
            "Worst images": {image_id: notes[image_id] for image_id in worst},
            "Random images": {image_id: notes[image_id] for image_id in chance},
        },
    )


def confidence_page(
    confidence: Mapping[str, float],
    agreement: Mapping[str, float],
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
    quality: Quality | None = None,
) -> str:
    """The page where nobody knows what is right: the pseudo masks that are most likely wrong, the least sure ones,
    and the largest disagreement.

    Args:
        confidence: image id to the mean confidence of its pseudo mask, in percent; one at least.
        agreement: image id to the share of pixels in which pseudo mask and prediction agree, in percent.
        images, masks, settings: arguments as for ``evaluation_page``.
        quality: estimate of the pseudo masks' IoU.
    """
    names = next(iter(masks.values())).class_names
    legend = _legend(("background", *names))
    summary = [
        ("Images", f"{len(confidence):,}"),
        *((title, source.description) for title, source in masks.items()),
    ]
    sections, estimates = {}, {} if quality is None else quality.by_class
    if quality is not None and quality.mean is not None:
        summary.append(("Estimated mIoU", f"{100 * quality.mean:.1f} % ({ESTIMATE})"))
        worst = list(quality.by_image)[:SHOWN]
        sections["Most likely wrong"] = {image_id: quality.note(image_id) for image_id in worst}
    disagreement = "Largest disagreement between pseudo mask and prediction"
    for title, name, values, note in (
        ("Lowest mean confidence", "confidence", confidence, "mean confidence {:.1f} %"),
        (disagreement, "agreement", agreement, "{:.1f} % of the pixels agree"),
    ):
        if values:
            summary.append((f"Mean {name}", f"{np.mean(list(values.values())):.1f} %"))
            lowest = sorted(values, key=values.__getitem__)[:SHOWN]
            sections[title] = {image_id: note.format(values[image_id]) for image_id in lowest}
    return _page(
        images,
        masks,
        settings,
        title="Masks without ground truth",
        summary=summary,
        sections=sections,
        iou_heading="Estimated IoU by class, worst first",
        classes=[legend[1 + list(names).index(name)] for name in estimates],
        per_class_iou=list(estimates.values()),
        legend=legend,
    )


def comparison_page(
    comparison: Comparison,
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
) -> str:
    """The page of several masks side by side: IoU or expected IoU, agreement, and the images that differ most.

    Args:
        images, masks, settings: arguments as for ``evaluation_page``.
    """
    shown = comparison.most_different[:SHOWN]
    agreement = [
        [f"{one} and {other}", f"{100 * share:.1f}"] for (one, other), share in comparison.agreement.items()
    ]
    by_class = [[name, f"{100 * iou:.1f}"] for name, iou in comparison.agreement_by_class.items()]
    return _page(
        images,
        masks,
        settings,
        title="Masks side by side",
        warnings=[comparison.conclusion()],
        summary=[
            ("Images", f"{len(comparison.different):,}"),
            *((name, source.description) for name, source in masks.items()),
        ],
        tables=[
            ("By class", *comparison.table()),
            ("Agreement of pairs", ["masks", "% of the pixels"], agreement),
            ("Agreement by class, least first", ["class", "IoU % of one with another"], by_class),
        ],
        sections={
            "Largest differences": {
                image_id: f"{100 * comparison.different[image_id]:.1f} % of the pixels differ"
                for image_id in shown
            }
        },
        legend=_legend(comparison.class_names),
    )


def _legend(names: Iterable[str]) -> list[Label]:
    return [Label(name, class_colour(value)) for value, name in enumerate(names)]


def _page(
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
    sections: Mapping[str, Mapping[str, str]],
    **values: object,
) -> str:
    """The page; ``sections``: heading to image id to its note."""
    import yaml

    versions = [("Python", platform.python_version()), ("wsss_pipeline", __version__)]
    versions += [(name, metadata.version(name)) for name in _LIBRARIES]
    rows = {
        heading: [make_row(name, images.get(name), masks, CELL, note) for name, note in notes.items()]
        for heading, notes in sections.items()
    }
    shown = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    shared = {"settings": shown, "versions": versions}
    return render("report.html.j2", sections=rows, data_uri=_data_uri, **shared, **values)


def _data_uri(pixels: Rgb) -> str:
    content = encoded(Image.fromarray(pixels), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
