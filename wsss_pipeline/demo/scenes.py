"""Procedurally drawn scenes with captions' facts and pixel ground truth: the demo's whole world.

A scene is one or two backgrounds (something above a horizon, something below it) with one to three
object classes on it. Size, pose, colour, light and overlap vary; classes prefer some backgrounds, as in
real images, which is what background words are for. No file is read; a seed gives the same scene for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.demo.backgrounds import BACKGROUNDS, noise
from wsss_pipeline.demo.shapes import COLOURS, OBJECT_CLASSES, Colour, ObjectClass, Part, Shape

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
        objects: what stands in it, one entry per class, from back to front.
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
        classes: how many object classes; without it 1, 2 or 3.

    Raises:
        ValueError: a side under 16 pixels, or a number of classes that isn't 1, 2 or 3.
    """
    if min(width, height) < 16:
        raise ValueError(f"a scene of {width} x {height} pixels is too small; draw at least 16 x 16")
    if classes not in (None, 1, 2, 3):
        raise ValueError(f"a scene has 1, 2 or 3 classes, not {classes}")
    rng = np.random.default_rng(seed)
    count = classes or int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]))
    kinds, ground = _choose_classes(rng, count)
    backgrounds, horizon = _choose_backgrounds(rng, ground)
    backdrop = _paint_backgrounds(rng, (height, width), backgrounds, horizon)
    while True:
        canvas, mask = backdrop.copy(), np.zeros((height, width), np.uint8)
        objects, areas = [], []
        for kind in kinds:
            colour, area = _place(rng, canvas, mask, kind, horizon, count)
            objects.append(DrawnObject(kind.name, colour))
            areas.append(area)
        visible = np.bincount(mask.ravel(), minlength=len(CLASS_NAMES) + 1)
        if all(visible[_index(k)] >= max(1, _LEAST_VISIBLE * a) for k, a in zip(kinds, areas, strict=True)):
            break
    return Scene(_light(rng, canvas), mask, tuple(objects), backgrounds, round(horizon * height))


def _index(kind: ObjectClass) -> int:
    return CLASS_NAMES.index(kind.name) + 1


def _choose_classes(rng: np.random.Generator, count: int) -> tuple[list[ObjectClass], str]:
    first = OBJECT_CLASSES[rng.integers(len(OBJECT_CLASSES))]
    usual = rng.random() < _HABITAT_SHARE
    ground = str(rng.choice(first.habitat if usual else list(BACKGROUNDS)))
    weights = np.array(
        [0 if k is first else 2.5 if ground in k.habitat else 1 for k in OBJECT_CLASSES], float
    )
    others = rng.choice(len(OBJECT_CLASSES), count - 1, replace=False, p=weights / weights.sum())
    kinds = [first, *(OBJECT_CLASSES[i] for i in others)]
    return [kinds[i] for i in rng.permutation(count)], ground


def _choose_backgrounds(rng: np.random.Generator, ground: str) -> tuple[tuple[str, ...], float]:
    """Background words, lower first, and the height of the horizon (0: none)."""
    if rng.random() >= _HORIZON_SHARE:
        return (ground,), 0.0
    if ground in ("sky", "brick"):
        above, ground = ground, str(rng.choice(["grass", "sand", "water", "road", "snow", "wood"]))
    else:
        above = "brick" if rng.random() < 0.3 else "sky"
    return (ground, above), float(rng.uniform(0.25, 0.6))


def _paint_backgrounds(
    rng: np.random.Generator, size: tuple[int, int], words: tuple[str, ...], horizon: float
) -> NDArray[np.float32]:
    unit = (size[0] * size[1]) ** 0.5 / 100
    canvas = BACKGROUNDS[words[0]](rng, size, unit).astype(np.float32)
    if len(words) == 2:
        rows = round(horizon * size[0])
        canvas[:rows] = BACKGROUNDS[words[1]](rng, (rows, size[1]), unit)
    return canvas


def _place(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    mask: NDArray[np.uint8],
    kind: ObjectClass,
    horizon: float,
    count: int,
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

    name, main, second = _choose_colours(rng, kind)
    colour, alpha = _paint_shape(kind.draw(u, v, main, second), half)
    light = rng.normal(0, 0.13, 2).astype(np.float32)
    shade = 1 + light[0] * u + light[1] * v + np.float32(0.03) * noise(rng, u.shape, (half / 3, half / 3))
    if kind.name == "ball":
        shade = shade * (1.1 - 0.35 * ((u + 0.25) ** 2 + (v + 0.3) ** 2))
    window = canvas[upper:lower, left:right]
    window += alpha[..., None] * (colour * shade[..., None] - window)
    inside = alpha > 0.5
    mask[upper:lower, left:right][inside] = _index(kind)
    return name, int(inside.sum())


def _choose_colours(rng: np.random.Generator, kind: ObjectClass) -> tuple[str, Colour, Colour]:
    names = list(COLOURS)
    name = str(rng.choice(kind.colours if rng.random() < 0.65 else names))
    second = str(rng.choice([other for other in names if other != name]))
    jitter = rng.normal(0, 9, (2, 3))
    first_rgb, second_rgb = np.asarray(COLOURS[name]) + jitter[0], np.asarray(COLOURS[second]) + jitter[1]
    return name, tuple(first_rgb.tolist()), tuple(second_rgb.tolist())


def _paint_shape(shape: Shape, half: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (h, w, 3) and coverage (h, w) of a shape whose half width is ``half`` pixels."""
    scale = np.float32(half)

    def coverage(part: Part) -> NDArray[np.float32]:
        return np.asarray(np.clip(0.5 - part.distance * scale, 0, 1), np.float32)

    outline = np.minimum.reduce([part.distance for part in shape.body])
    colour = np.empty((*outline.shape, 3), np.float32)
    colour[:] = shape.body[0].colour
    for part in (*shape.body[1:], *shape.details):
        colour += coverage(part)[..., None] * (np.asarray(part.colour, np.float32) - colour)
    return colour, np.clip(0.5 - outline * scale, 0, 1)


def _light(rng: np.random.Generator, canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Exposure, a fall-off of light across the image and sensor noise."""
    height, width = canvas.shape[:2]
    across, down = rng.normal(0, 0.08, 2)
    field = (
        rng.uniform(0.78, 1.1)
        + across * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
        + down * np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    ).astype(np.float32)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(0.5, 2.5))
    return np.asarray(np.clip(canvas * field + grain, 0, 255), np.uint8)
