"""One self-contained, escaped HTML page about an evaluation: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline import __version__
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.evaluation.metrics import Scores

CONFUSIONS_SHOWN = 10
_LIBRARIES = ("torch", "transformers", "segmentation-models-pytorch", "numpy", "h5py", "Pillow")


@dataclass(frozen=True)
class Cell:
    """A captioned picture; ``source`` is a data URI, see ``data_uri``."""

    caption: str
    source: str


@dataclass(frozen=True)
class ImageRow:
    """An image's pictures side by side, with a note on how well it did."""

    image_id: str
    note: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Section:
    """A heading and the images under it."""

    title: str
    rows: Sequence[ImageRow]


@dataclass(frozen=True)
class ClassEntry:
    """A class's colour, IoU as text and in percent."""

    name: str
    colour: tuple[int, int, int]
    text: str = ""
    percent: float = 0.0


@dataclass(frozen=True)
class ReportPage:
    """All that stands on the page, as plain text and data URIs; the template escapes every bit of it."""

    title: str
    summary: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    settings: str
    score: str = ""
    warnings: Sequence[str] = ()
    classes: Sequence[ClassEntry] = ()
    legend: Sequence[ClassEntry] = ()
    confusions: Sequence[str] = ()
    matrix_heads: Sequence[str] = ()
    matrix_rows: Sequence[tuple[str, Sequence[float]]] = ()

    @property
    def versions(self) -> list[tuple[str, str]]:
        """Python, this package and the libraries that decide over the numbers."""
        found = [("Python", platform.python_version()), ("wsss_pipeline", __version__)]
        return found + [(name, metadata.version(name)) for name in _LIBRARIES]


def write_report(file: Path, page: ReportPage) -> None:
    """Renders ``page`` into ``file``.

    Raises:
        ConfigError: the file can't be written.
    """
    from jinja2 import Environment

    text = (resources.files("wsss_pipeline.evaluation") / "report.html.j2").read_text("utf-8")
    html = Environment(autoescape=True).from_string(text).render(page=page)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html, "utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the report {file} can't be written: {error.strerror or error}") from error


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 (H, W, 3) RGB as a JPEG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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


def settings_text(settings: Mapping[str, object]) -> str:
    """Nested settings as YAML."""
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
