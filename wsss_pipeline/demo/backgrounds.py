"""The background kinds of the demo: noise at several scales, gradients and repeating textures.

Lengths are in units of a hundredth of the image's side, so a scene looks alike at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float32]
Size = tuple[int, int]  # height, width


def noise(rng: Generator, size: Size, cell: tuple[float, float]) -> Array:
    """Smooth noise float32 (H, W), about standard normal, with grains of ``cell`` (height, width) pixels."""
    rows = max(2, round(size[0] / max(cell[0], 1)) + 1)
    columns = max(2, round(size[1] / max(cell[1], 1)) + 1)
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def _tint(colour: tuple[float, float, float], rng: Generator, spread: float = 12) -> Array:
    jitter = rng.normal(0, 5, 3) + rng.normal(0, spread)
    return (np.asarray(colour) + jitter).astype(np.float32)


def _grass(rng: Generator, size: Size, unit: float) -> Array:
    blades = 13 * noise(rng, size, (7 * unit, 1.7 * unit)) + 8 * noise(rng, size, (25 * unit, 25 * unit))
    return blades[..., None] * np.array([0.8, 1, 0.5], np.float32) + _tint((85, 140, 55), rng)


def _sand(rng: Generator, size: Size, unit: float) -> Array:
    bend = 1.5 * noise(rng, size, (25 * unit, 30 * unit))
    rows = np.arange(size[0], dtype=np.float32)[:, None] / unit
    ripples = 4 * np.sin(rows * np.float32(0.55) + bend) + 6 * noise(rng, size, (1.6 * unit, 1.6 * unit))
    return _tint((212, 184, 135), rng) + ripples[..., None]


def _water(rng: Generator, size: Size, unit: float) -> Array:
    bend = 2.2 * noise(rng, size, (12 * unit, 16 * unit))
    rows = np.arange(size[0], dtype=np.float32)[:, None] / unit
    waves = 14 * np.sin(rows * np.float32(rng.uniform(0.7, 1.0)) + bend)
    return _tint((50, 115, 160), rng) + (waves + 5 * noise(rng, size, (2 * unit, 7 * unit)))[..., None]


def _sky(rng: Generator, size: Size, unit: float) -> Array:
    top, bottom = _tint((95, 155, 225), rng, 15), _tint((175, 205, 235), rng, 8)
    down = np.linspace(0, 1, size[0], dtype=np.float32)[:, None, None]
    clear = top * (1 - down) + bottom * down
    billows = noise(rng, size, (18 * unit, 32 * unit)) + 0.4 * noise(rng, size, (7 * unit, 10 * unit))
    cloud = np.clip(billows - np.float32(rng.uniform(0.2, 1.2)), 0, 0.9)[..., None]
    return np.asarray(clear * (1 - cloud) + np.float32(242) * cloud, np.float32)


def _brick(rng: Generator, size: Size, unit: float) -> Array:
    height, width = unit * rng.uniform(7, 10), unit * rng.uniform(16, 22)
    y = np.arange(size[0], dtype=np.float32)[:, None] / np.float32(height) + np.float32(rng.uniform())
    x = np.arange(size[1], dtype=np.float32)[None] / np.float32(width) + np.float32(rng.uniform())
    row = np.floor(y)
    x = x + row % 2 * np.float32(0.5)
    shades = 12 * rng.standard_normal((32, 32), dtype=np.float32)
    shade = shades[row.astype(int) % 32, np.floor(x).astype(int) % 32]
    edge = np.minimum(np.minimum(y % 1, 1 - y % 1) * height, np.minimum(x % 1, 1 - x % 1) * width)
    mortar = np.clip(1.4 - edge / unit, 0, 1)[..., None]
    stone = _tint((165, 82, 62), rng) + (shade + 4 * noise(rng, size, (2 * unit, 2 * unit)))[..., None]
    return np.asarray(stone * (1 - mortar) + _tint((190, 180, 168), rng, 6) * mortar, np.float32)


def _wood(rng: Generator, size: Size, unit: float) -> Array:
    width = unit * rng.uniform(14, 22)
    y = np.arange(size[0], dtype=np.float32)[:, None] / np.float32(width) + np.float32(rng.uniform())
    shade = 9 * rng.standard_normal(32, dtype=np.float32)[np.floor(y).astype(int) % 32]
    groove = np.clip(1.3 - np.minimum(y % 1, 1 - y % 1) * width / unit, 0, 1)
    grain = 9 * noise(rng, size, (1.8 * unit, 30 * unit)) + 4 * noise(rng, size, (1.2 * unit, 9 * unit))
    return np.asarray(_tint((160, 115, 70), rng) + (shade + grain - 55 * groove)[..., None], np.float32)


def _road(rng: Generator, size: Size, unit: float) -> Array:
    grit = 8 * noise(rng, size, (1.4 * unit, 1.4 * unit)) + 7 * noise(rng, size, (22 * unit, 30 * unit))
    tar = _tint((95, 95, 100), rng) + grit[..., None]
    y = np.abs(np.arange(size[0], dtype=np.float32) - size[0] * rng.uniform(0.3, 0.95))[:, None] / unit
    x = np.arange(size[1], dtype=np.float32)[None] / (unit * rng.uniform(24, 40)) + rng.uniform()
    dashes = np.clip(2.6 - y, 0, 1) * np.clip((np.abs(x % 1 - 0.5) - 0.2) * 20, 0, 1)
    paint = dashes[..., None].astype(np.float32)
    return np.asarray(tar * (1 - paint) + np.float32(225) * paint, np.float32)


def _snow(rng: Generator, size: Size, unit: float) -> Array:
    drifts = 9 * noise(rng, size, (16 * unit, 34 * unit)) + 2 * noise(rng, size, (2 * unit, 2 * unit))
    return drifts[..., None] * np.array([1, 0.9, 0.6], np.float32) + _tint((226, 232, 242), rng, 6)


# word in the captions and in the class set -> painter of float32 (H, W, 3), about 0 to 255
BACKGROUNDS: dict[str, Callable[[Generator, Size, float], Array]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "sky": _sky,
    "brick": _brick,
    "wood": _wood,
    "road": _road,
    "snow": _snow,
}
