"""Draws the picture of the README, ``picture.jpg``: drawn scenes on their way from labels to a network's answer.

``python docs/picture.py``, some two minutes on two cores. The network is trained on pseudo masks of other scenes than
those that are shown. Shown are the first of them with two classes, as they come.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wsss_pipeline import MaskCache, MaskJob, Segmenter, TrainJob, generate_masks, train_seg
from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import CERTAIN
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.pictures.contact_sheet import draw_text
from wsss_pipeline.pictures.overlays import (
    CONFIDENCE_MAP,
    Colour,
    Rgb,
    coloured,
    heat_over_image,
)
from wsss_pipeline.segmentation.train_config import load_train_config

FILE = Path(__file__).parent / "picture.jpg"
COLUMNS = (
    "Image and labels",
    "CAM of the first label",
    "Pseudo mask",
    "Confidence",
    "Network, without labels",
)
ROWS, CELL, GAP, MARGIN, HEADER, CAPTION = 3, (240, 180), 10, 16, 38, 28
LABEL_COLOURS: tuple[Colour, ...] = ((240, 80, 60), (60, 150, 245))  # of the first label and of the second
OTHER_COLOUR: Colour = (250, 200, 60)  # of what the network takes for a class that the image hasn't got
METHOD = ("method=excel", "confidence=product")


def make_masks(data: Path, split: str, cache: Path) -> MaskCache:
    """Pseudo masks of one split of the scenes in ``data``, with their CAMs."""
    job = MaskJob.read(
        voc=data,
        split=split,
        classes="demo",
        overrides=METHOD,
        settings={"clip.weights": "demo"},
        cache=cache,
    )
    return MaskCache.open(generate_masks(replace(job, store_cams=True, offline=True)).path)


def paint(image: Rgb, mask: np.ndarray, values: list[int]) -> Rgb:
    """``image`` in dim grey where ``mask`` is background, elsewhere tinted.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W) class indices.
        values: class indices of the labels, which have the colours of ``LABEL_COLOURS``.
    """
    grey = image.mean(axis=2, keepdims=True)
    painted = np.repeat(0.3 * grey + 20, 3, axis=2)
    for value in set(np.unique(mask).tolist()) - {0}:
        colour = LABEL_COLOURS[values.index(value)] if value in values else OTHER_COLOUR
        painted[mask == value] = (0.35 * grey + 0.65 * np.array(colour))[mask == value]
    return np.rint(painted).astype(np.uint8)


def draw_picture(rows: list[tuple[list[Rgb], tuple[str, ...]]]) -> Image.Image:
    """Rows of pictures below the titles of their columns.

    Args:
        rows: pictures, uint8 (h, w, 3) RGB, and the names of the labels.
    """
    step, drop = CELL[0] + GAP, CELL[1] + CAPTION
    size = (2 * MARGIN + len(COLUMNS) * step - GAP, HEADER + len(rows) * drop + MARGIN // 2)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        draw_text(draw, (MARGIN + column * step, 9), title, 18, CELL[0])
    for row, (pictures, labels) in enumerate(rows):
        top = HEADER + row * drop
        for column, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize(CELL, Image.Resampling.BICUBIC)
            sheet.paste(scaled, (MARGIN + column * step, top))
        left = MARGIN
        for label, colour in zip(labels, LABEL_COLOURS, strict=False):
            draw.rectangle((left, top + CELL[1] + 6, left + 11, top + CELL[1] + 17), colour)
            left = draw_text(draw, (left + 17, top + CELL[1] + 2), label, 15, CELL[0]) + 14
        draw_text(draw, (MARGIN + step, top + CELL[1] + 2), labels[0], 15, CELL[0])
        draw_text(draw, (MARGIN + 3 * step, top + CELL[1] + 2), "dark: unsure", 15, CELL[0])
    return sheet


def main() -> None:
    """Makes masks, trains, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE, help="file to write")
    parser.add_argument(
        "--work", type=Path, help="folder for scenes, masks and network; else a temporary one"
    )
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes to train on")
    parser.add_argument("--iterations", type=int, default=150, help="number of updates of the network")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        data = work / "data"
        write_voc_folder(data, 0, {"train": given.scenes, "val": 4 * ROWS})
        config = load_train_config(
            "demo/frozen-clip", None, (), {"optimisation.iterations": given.iterations, "seed": 0}
        )
        run = TrainJob(
            data / "JPEGImages",
            make_masks(data, "train", work / "cache"),
            work / "run",
            config,
            split=data / "ImageSets/Segmentation/train.txt",
            offline=True,
        )
        network = Segmenter.load(
            train_seg(run).checkpoint,
            inference=InferenceConfig(scales=(0.75, 1.0, 1.25), flip=True),
            crf=CrfConfig(),
        )
        masks = make_masks(data, "val", work / "cache")
        rows = []
        for name in [
            name for name in sorted(masks) if name.startswith("val") and len(masks[name].labels) == 2
        ]:
            image, found = read_image(data / "JPEGImages" / f"{name}.jpg"), masks[name]
            values = [1 + masks.class_names.index(label) for label in found.labels]
            assert found.cams is not None
            cam, confidence = found.cams[0].astype(np.float32), found.confidence / CERTAIN
            pictures = [image, heat_over_image(image, cam), paint(image, found.mask, values)]
            pictures += [coloured(confidence, CONFIDENCE_MAP), paint(image, network(image).mask, values)]
            rows.append((pictures, found.labels))
    draw_picture(rows[:ROWS]).save(given.out, "JPEG", quality=84, optimize=True)


if __name__ == "__main__":
    main()
