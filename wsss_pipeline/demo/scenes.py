"""Procedurally drawn scenes with captions' facts and pixel ground truth: the demo's whole world.

A scene is one or two backgrounds (something above a horizon, something below it) with one to three
object classes on it. Size, pose, colour, light and overlap vary; classes prefer some backgrounds, as in
real images, which is what background words are for. No file is read; a seed gives the same scene for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from wsss_pipeline.demo.backgrounds import BACKGROUNDS, noise
from wsss_pipeline.demo.shapes import COLOURS, OBJECT_CLASSES, Array, ObjectClass, Shape

CLASS_NAMES: tuple[str, ...] = tuple(entry.name for entry in OBJECT_CLASSES)

_HABITAT_SHARE = 0.5  # how often a scene's ground is one that its first class prefers
_HORIZON_SHARE = 0.45
_LEAST_VISIBLE = 0.6  # of an object's own pixels; with less the scene is laid out anew


@dataclass(frozen=True)
class DrawnObject:
    """What a caption may say of an object: its class name and the name of its main colour."""

    name: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """One drawn image.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), 0 background, 1.. the position in ``CLASS_NAMES`` plus one.
        objects: things that stand in it, one entry per class, from back to front.
        backgrounds: one or two background words, the lower one first.
        horizon: first row of the lower background where there are two, else 0.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    objects: tuple[DrawnObject, ...]
    backgrounds: tuple[str, ...]
    horizon: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in order of appearance."""
        return tuple(entry.name for entry in self.objects)


def draw_scene(
    seed: int | tuple[int, ...], width: int = 160, height: int = 120, classes: int | None = None
) -> Scene:
    """A scene, the same for the same arguments.

    Args:
        seed: any number, or several (such as a run's seed and a scene's number).
        width, height: pixels, at least 16 each; things scale with the image.
        classes: number of object classes; without it 1, 2 or 3.

    Raises:
        ValueError: a side under 16 pixels, or a number of classes that isn't 1, 2 or 3.
    """
    if min(width, height) < 16:
        raise ValueError(f"a scene of {width} x {height} pixels is too small; draw at least 16 x 16")
    if classes not in (None, 1, 2, 3):
        raise ValueError(f"a scene has 1, 2 or 3 classes, not {classes}")
    rng = np.random.default_rng(seed)
    count = classes or int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]))
    first = OBJECT_CLASSES[rng.integers(len(OBJECT_CLASSES))]
    usual = rng.random() < _HABITAT_SHARE
    ground = str(rng.choice(first.habitat if usual else list(BACKGROUNDS)))
    weights = [0.0 if k is first else 2.5 if ground in k.habitat else 1.0 for k in OBJECT_CLASSES]
    others = rng.choice(len(OBJECT_CLASSES), count - 1, replace=False, p=np.array(weights) / sum(weights))
    kinds = [first, *(OBJECT_CLASSES[i] for i in others)]
    kinds = [kinds[i] for i in rng.permutation(count)]

    unit = (height * width) ** 0.5 / 100
    backgrounds: tuple[str, ...] = (ground,)
    horizon = 0.0  # height of the upper background, as a part of the image's
    if rng.random() < _HORIZON_SHARE:
        if ground in ("sky", "brick"):
            above, ground = ground, str(rng.choice(["grass", "sand", "water", "road", "snow", "wood"]))
        else:
            above = "brick" if rng.random() < 0.3 else "sky"
        backgrounds, horizon = (ground, above), float(rng.uniform(0.25, 0.6))
    rows = round(horizon * height)
    backdrop = BACKGROUNDS[ground](rng, (height, width), unit).astype(np.float32)
    if horizon:
        backdrop[:rows] = BACKGROUNDS[backgrounds[1]](rng, (rows, width), unit)

    while True:
        canvas, mask = backdrop.copy(), np.zeros((height, width), np.uint8)
        colours, areas = zip(*(_draw(rng, canvas, mask, kind, horizon, count) for kind in kinds), strict=True)
        visible = [np.count_nonzero(mask == CLASS_NAMES.index(kind.name) + 1) for kind in kinds]
        if all(v >= max(1, _LEAST_VISIBLE * area) for v, area in zip(visible, areas, strict=True)):
            break
    objects = tuple(DrawnObject(kind.name, colour) for kind, colour in zip(kinds, colours, strict=True))

    # exposure, a fall-off of light across the image and sensor noise
    across, down = rng.normal(0, 0.08, 2)
    field = (
        rng.uniform(0.78, 1.1)
        + across * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
        + down * np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    ).astype(np.float32)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.5, 2.5))
    image = np.clip(canvas * field + grain, 0, 255).astype(np.uint8)
    return Scene(image, mask, objects, backgrounds, rows)


def _draw(
    rng: Generator, canvas: Array, mask: NDArray[np.uint8], kind: ObjectClass, horizon: float, count: int
) -> tuple[str, int]:
    """Draws an object of a class into both arrays; the name of its colour and its pixels in the image."""
    height, width = mask.shape
    largest = {1: 0.42, 2: 0.35, 3: 0.29}[count]
    half = float(rng.uniform(0.19, largest)) * min(width, height)
    margin = 0.7 * half
    top, bottom = margin, height - margin
    if horizon and "sky" in kind.habitat:
        bottom = max(top + 1, horizon * height)
    elif horizon:
        top = min(bottom - 1, horizon * height)
    cx, cy = rng.uniform(margin, width - margin), rng.uniform(top, bottom)
    left, right = max(0, int(cx - 1.5 * half)), min(width, int(cx + 1.5 * half) + 2)
    upper, lower = max(0, int(cy - 1.5 * half)), min(height, int(cy + 1.5 * half) + 2)
    y, x = np.mgrid[upper:lower, left:right].astype(np.float32)
    angle = np.deg2rad(rng.uniform(-kind.turn, kind.turn))
    stretch = rng.uniform(0.88, 1.12)
    mirror = rng.choice([-1, 1])
    cos, sin = np.float32(np.cos(angle) / half), np.float32(np.sin(angle) / half)
    x, y = x - np.float32(cx), y - np.float32(cy)
    u, v = (cos * x + sin * y) * np.float32(mirror * stretch), (cos * y - sin * x) * np.float32(1 / stretch)

    name = str(rng.choice(kind.colours if rng.random() < 0.65 else list(COLOURS)))
    other = str(rng.choice([word for word in COLOURS if word != name]))
    main, second = np.asarray([COLOURS[name], COLOURS[other]]) + rng.normal(0, 9, (2, 3))
    shape = kind.draw(u, v, tuple(main.tolist()), tuple(second.tolist()))
    colour, alpha = _paint_shape(shape, np.float32(half))
    light = rng.normal(0, 0.13, 2).astype(np.float32)
    shade = 1 + light[0] * u + light[1] * v + np.float32(0.03) * noise(rng, u.shape, (half / 3, half / 3))
    if kind.name == "ball":
        shade = shade * (1.1 - 0.35 * ((u + 0.25) ** 2 + (v + 0.3) ** 2))
    window = canvas[upper:lower, left:right]
    window += alpha[..., None] * (colour * shade[..., None] - window)
    inside = alpha > 0.5
    mask[upper:lower, left:right][inside] = CLASS_NAMES.index(kind.name) + 1
    return name, int(inside.sum())


def _paint_shape(shape: Shape, scale: np.float32) -> tuple[Array, Array]:
    """Colours (h, w, 3) and coverage (h, w) of a shape whose half width is ``scale`` pixels."""
    outline = np.minimum.reduce([distance for distance, _ in shape.body])
    colour = np.empty((*outline.shape, 3), np.float32)
    colour[:] = shape.body[0][1]
    for distance, paint in (*shape.body[1:], *shape.details):
        coverage = np.clip(0.5 - distance * scale, 0, 1)[..., None]
        colour += coverage * (np.asarray(paint, np.float32) - colour)
    return colour, np.clip(0.5 - outline * scale, 0, 1)
