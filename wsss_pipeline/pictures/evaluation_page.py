"""One self-contained, escaped HTML page about an evaluation: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import platform
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline import __version__
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.masks import MaskSource
from wsss_pipeline.evaluation.metrics import Scores
from wsss_pipeline.evaluation.result import Evaluation
from wsss_pipeline.pictures.overlays import Rgb, encoded
from wsss_pipeline.pictures.rows import Colour, Row, make_row

SHOWN = 12  # images a section
CELL = (320, 320)  # largest width and height of a picture
CONFUSIONS_SHOWN = 10
_LIBRARIES = ("torch", "transformers", "segmentation-models-pytorch", "numpy", "h5py", "Pillow")


@dataclass(frozen=True)
class ClassEntry:
    """A class's colour, IoU as text and in percent."""

    name: str
    colour: Colour
    text: str = ""
    percent: float = 0.0


def evaluation_page(
    evaluation: Evaluation,
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
) -> str:
    """The page of an evaluation against ground truth: scores, confusions, worst and random images.

    Args:
        images: image id to file.
        masks: what to show of an image, by title, see ``make_row``.
        settings: of the run, nested; shown as YAML.
    """
    scores, matrix = evaluation.scores, evaluation.matrix
    known = {image_id: miou for image_id, miou in evaluation.image_miou.items() if miou is not None}
    worst = sorted(known, key=known.__getitem__)[:SHOWN]
    rest = sorted(set(known) - set(worst))
    chance = sorted(random.Random(0).sample(rest, min(SHOWN, len(rest))))

    def rows(image_ids: Iterable[str]) -> list[Row]:
        note = "mIoU over its own classes {:.1f} %"
        return [
            make_row(image_id, images.get(image_id), masks, CELL, note.format(100 * known[image_id]))
            for image_id in image_ids
        ]

    names = ("background", *evaluation.class_names)
    return _page(
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
        classes=class_entries(scores, evaluation.class_names),
        confusions=confusion_texts(matrix, evaluation.class_names),
        matrix_heads=(*names, "no label"),
        matrix_rows=list(zip(names, row_percentages(matrix).tolist(), strict=True)),
        sections={"Worst images": rows(worst), "Random images": rows(chance)},
        settings=settings,
    )


def confidence_page(
    confidence: Mapping[str, float],
    agreement: Mapping[str, float],
    images: Mapping[str, ImageFile],
    masks: Mapping[str, MaskSource],
    settings: Mapping[str, object],
) -> str:
    """The page where nobody knows what is right: the least sure pseudo masks, and the largest disagreement.

    Args:
        confidence: image id to the mean confidence of its pseudo mask, in percent; one at least.
        agreement: image id to the share of pixels in which pseudo mask and prediction agree, in percent.
        images, masks, settings: as for ``evaluation_page``.
    """

    def lowest(values: Mapping[str, float], note: str) -> list[Row]:
        chosen = sorted(values, key=values.__getitem__)[:SHOWN]
        return [
            make_row(image_id, images.get(image_id), masks, CELL, note.format(values[image_id]))
            for image_id in chosen
        ]

    summary = [
        ("Images", f"{len(confidence):,}"),
        *((title, source.description) for title, source in masks.items()),
        ("Mean confidence", f"{np.mean(list(confidence.values())):.1f} %"),
    ]
    sections = {"Lowest mean confidence": lowest(confidence, "mean confidence {:.1f} %")}
    if agreement:
        summary.append(("Mean agreement", f"{np.mean(list(agreement.values())):.1f} %"))
        title = "Largest disagreement between pseudo mask and prediction"
        sections[title] = lowest(agreement, "{:.1f} % of the pixels agree")
    class_names = next(iter(masks.values())).class_names
    return _page(
        title="Masks without ground truth",
        summary=summary,
        sections=sections,
        legend=class_entries(None, class_names),
        settings=settings,
    )


def _page(*, settings: Mapping[str, object], **values: object) -> str:
    """The template filled in; it escapes every bit of text."""
    import yaml
    from jinja2 import Environment

    text = (resources.files("wsss_pipeline.pictures") / "report.html.j2").read_text("utf-8")
    versions = [("Python", platform.python_version()), ("wsss_pipeline", __version__)]
    versions += [(name, metadata.version(name)) for name in _LIBRARIES]
    shown = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    page = Environment(autoescape=True).from_string(text)
    return page.render(data_uri=data_uri, versions=versions, settings=shown, **values)


def data_uri(pixels: Rgb) -> str:
    """uint8 (H, W, 3) RGB as a JPEG data URI."""
    content = encoded(Image.fromarray(pixels), "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def class_entries(scores: Scores | None, class_names: Sequence[str]) -> list[ClassEntry]:
    """Background and classes with their colours; IoU where there are scores."""
    palette = voc_palette()
    entries = []
    for value, name in enumerate(("background", *class_names)):
        iou = scores.per_class_iou[name] if scores is not None else None
        text = "" if scores is None else "not in the ground truth" if iou is None else f"{100 * iou:.2f}"
        red, green, blue = (int(channel) for channel in palette[value])
        entries.append(ClassEntry(name, (red, green, blue), text, round(100 * (iou or 0.0), 2)))
    return entries


def confusion_texts(matrix: NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    """The largest shares of a class's pixels that were taken for another class, as sentences.

    Args:
        matrix: int64 (1+C, 2+C) as ``confusion_matrix`` returns it.
        class_names: of mask values 1..C.
    """
    shares = row_percentages(matrix)
    names = ("background", *class_names, "no label")
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None)[:CONFUSIONS_SHOWN]
    found = [np.unravel_index(place, shares.shape) for place in order]
    return [
        f"{shares[row, column]:.1f} % of {names[row]} is taken for {names[column]}"
        for row, column in found
        if shares[row, column] >= 0.05
    ]


def row_percentages(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 of the same shape: percent of each row's pixels, 0 in an empty row."""
    totals = matrix.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    return 100 * shares
