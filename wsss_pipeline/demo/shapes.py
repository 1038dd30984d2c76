"""The object classes of the demo, each a handful of signed distances.

Every shape lives in its own frame: x to the right, y down, both from -1 to 1 at its widest. A signed
distance is negative inside; drawing it at any scale, angle and place is a change of coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Colour = tuple[float, float, float]


# a region of one colour: its signed distance (h, w), in units of the object's half width, and the colour
Part = tuple[Array, Colour]


class Shape(NamedTuple):
    """An object: ``body`` parts make its outline; ``details`` are painted on it, never beside it."""

    body: tuple[Part, ...]
    details: tuple[Part, ...]


@dataclass(frozen=True)
class ObjectClass:
    """How one class looks and where it is found.

    Attributes:
        name: class name.
        draw: shape in frame coordinates, from x, y, main and second colour.
        colours: names of its usual colours.
        turn: largest angle of its pose, degrees either way.
        habitat: background kinds that it prefers.
    """

    name: str
    draw: Callable[[Array, Array, Colour, Colour], Shape]
    colours: tuple[str, ...]
    turn: float
    habitat: tuple[str, ...]


COLOURS: dict[str, Colour] = {
    "red": (200, 45, 40),
    "orange": (232, 135, 40),
    "yellow": (235, 205, 60),
    "green": (70, 150, 60),
    "teal": (40, 150, 150),
    "blue": (50, 90, 190),
    "purple": (125, 65, 165),
    "pink": (230, 130, 170),
    "brown": (130, 85, 50),
    "white": (235, 232, 225),
    "grey": (130, 130, 132),
    "black": (45, 42, 48),
}
_DARK: Colour = (40, 38, 45)
_PALE: Colour = (240, 236, 224)
_GLASS: Colour = (170, 205, 220)
_BARK: Colour = (110, 75, 45)


def _disc(x: Array, y: Array, cx: float, cy: float, radius: float) -> Array:
    return np.asarray(np.hypot(x - cx, y - cy) - radius, np.float32)


def _oval(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    return np.asarray((np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry), np.float32)


def _box(x: Array, y: Array, cx: float, cy: float, half_width: float, half_height: float) -> Array:
    return np.asarray(np.maximum(np.abs(x - cx) - half_width, np.abs(y - cy) - half_height), np.float32)


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """A convex polygon, corners clockwise on the screen."""
    sides = [
        ((y2 - y1) * (x - x1) - (x2 - x1) * (y - y1)) / math.hypot(x2 - x1, y2 - y1)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True)
    ]
    return np.asarray(np.maximum.reduce(sides), np.float32)


def _ball(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    angle = np.arctan2(y - 0.15, x - 0.1)
    wedges = (np.sin(3 * angle) * 0.35 * np.hypot(x, y)).astype(np.float32)
    hub = _disc(x, y, 0.1, 0.15, 0.14)
    return Shape(((_disc(x, y, 0, 0, 0.95), main),), ((wedges, second), (hub, _PALE)))


def _boat(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    hull = _polygon(x, y, [(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.65, 0.85)])
    sail = _polygon(x, y, [(0.06, -0.95), (0.75, 0.22), (0.06, 0.22)])
    jib = _polygon(x, y, [(-0.06, -0.75), (-0.06, 0.22), (-0.65, 0.22)])
    mast = _box(x, y, 0, -0.25, 0.07, 0.65)
    line = _box(x, y, 0, 0.47, 1, 0.05)
    return Shape(((mast, _BARK), (sail, _PALE), (jib, second), (hull, main)), ((line, _PALE),))


def _car(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    lower = _box(x, y, 0, 0.15, 0.95, 0.24)
    cabin = _polygon(x, y, [(-0.4, -0.5), (0.3, -0.5), (0.62, 0), (-0.65, 0)])
    wheels = np.minimum(_disc(x, y, -0.52, 0.4, 0.24), _disc(x, y, 0.52, 0.4, 0.24))
    hubs = np.minimum(_disc(x, y, -0.52, 0.4, 0.1), _disc(x, y, 0.52, 0.4, 0.1))
    windows = np.minimum(
        _polygon(x, y, [(-0.35, -0.4), (-0.05, -0.4), (-0.05, -0.08), (-0.5, -0.08)]),
        _polygon(x, y, [(0.05, -0.4), (0.26, -0.4), (0.46, -0.08), (0.05, -0.08)]),
    )
    line = _box(x, y, 0, 0.12, 0.95, 0.04)
    details = (windows, _GLASS), (line, second), (hubs, (180, 180, 185))
    return Shape(((cabin, main), (lower, main), (wheels, _DARK)), details)


def _cup(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    body = _polygon(x, y, [(-0.7, -0.7), (0.45, -0.7), (0.3, 0.85), (-0.55, 0.85)])
    handle = np.abs(_oval(x, y, 0.5, -0.05, 0.36, 0.38)) - np.float32(0.09)
    stripes = np.minimum(_box(x, y, 0, 0.0, 1, 0.1), _box(x, y, 0, 0.42, 1, 0.1))
    rim = _oval(x, y, -0.125, -0.68, 0.5, 0.12)
    return Shape(((handle, main), (body, main)), ((stripes, second), (rim, _BARK)))


def _fish(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    body = _oval(x, y, 0.12, 0, 0.8, 0.48)
    tail = _polygon(x, y, [(-0.98, -0.5), (-0.45, 0), (-0.98, 0.5)])
    fin = _polygon(x, y, [(-0.2, -0.68), (0.35, -0.4), (-0.2, -0.35)])
    waves = np.abs(np.sin(9 * x)) + np.abs(np.sin(9 * y + 4.5 * x))
    scales = np.maximum((0.05 - 0.09 * (waves - 0.9)).astype(np.float32), _box(x, y, -0.05, 0, 0.45, 0.5))
    eye, pupil = _disc(x, y, 0.6, -0.12, 0.13), _disc(x, y, 0.62, -0.12, 0.065)
    details = (scales, second), (eye, _PALE), (pupil, _DARK)
    return Shape(((tail, second), (fin, second), (body, main)), details)


def _flower(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    petals = (radius - (0.68 + 0.27 * np.cos(7 * angle))).astype(np.float32) * np.float32(0.6)
    veins = (np.abs(np.sin(3.5 * angle)) * radius * 0.3 - 0.035).astype(np.float32)
    core = _disc(x, y, 0, 0, 0.3)
    yellow = COLOURS["yellow"] if main != COLOURS["yellow"] else _BARK
    return Shape(((petals, main),), ((veins, second), (core, yellow)))


def _house(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    wall = _box(x, y, 0, 0.38, 0.72, 0.5)
    roof = _polygon(x, y, [(0, -0.9), (0.95, -0.08), (-0.95, -0.08)])
    chimney = _box(x, y, 0.48, -0.6, 0.12, 0.25)
    windows = np.minimum(_box(x, y, -0.4, 0.25, 0.17, 0.17), _box(x, y, 0.4, 0.25, 0.17, 0.17))
    bars = np.minimum(np.abs(np.abs(x) - 0.4), np.abs(y - 0.25)) - np.float32(0.03)
    tiles = np.maximum(roof + 0.06, (0.04 - 0.07 * np.abs(np.sin(16 * y))).astype(np.float32))
    door = _box(x, y, 0, 0.6, 0.15, 0.29)
    details = (tiles, _BARK), (windows, _GLASS), (np.maximum(windows, bars), _PALE), (door, _BARK)
    return Shape(((chimney, _DARK), (wall, main), (roof, second)), details)


def _kite(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    diamond = _polygon(x, y, [(0, -0.95), (0.62, -0.25), (0, 0.6), (-0.62, -0.25)])
    tail = np.maximum(np.abs(x - 0.14 * np.sin(9 * y)) - 0.07, np.abs(y - 0.7) - 0.27).astype(np.float32)
    quarters = np.maximum(x * (y + 0.25) * np.float32(1.5), diamond)
    spars = np.maximum(np.minimum(np.abs(x), np.abs(y + 0.25)) - np.float32(0.04), diamond)
    return Shape(((tail, second), (diamond, main)), ((quarters, second), (spars, _DARK)))


def _mushroom(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    cap = np.maximum(_oval(x, y, 0, 0.1, 0.95, 0.95), y - 0.1)
    stem = _polygon(x, y, [(-0.22, 0), (0.22, 0), (0.32, 0.92), (-0.32, 0.92)])
    centres = ((-0.5, -0.2, 0.17), (0.05, -0.5, 0.2), (0.52, -0.15, 0.15), (0.0, -0.08, 0.12))
    spots = np.minimum.reduce([_disc(x, y, cx, cy, radius) for cx, cy, radius in centres])
    return Shape(((stem, _PALE), (cap, main)), ((np.maximum(spots, y - 0.1), _PALE),))


def _starfish(x: Array, y: Array, main: Colour, second: Colour) -> Shape:
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    arms = radius * np.cos(folded) * 0.35 + radius * np.sin(folded) * 0.94 - 0.33
    dots = np.abs(radius - 0.42 - 0.22 * np.round((radius - 0.42) / 0.22))
    dots = np.hypot(dots, radius * folded) - 0.075
    details = (dots.astype(np.float32), second), (_disc(x, y, 0, 0, 0.12), second)
    return Shape(((arms.astype(np.float32), main),), details)


OBJECT_CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass("ball", _ball, ("red", "blue", "yellow"), 180, ("sand", "grass")),
    ObjectClass("boat", _boat, ("white", "red", "brown"), 8, ("water",)),
    ObjectClass("car", _car, ("red", "blue", "grey", "green"), 8, ("road",)),
    ObjectClass("cup", _cup, ("white", "teal", "brown"), 14, ("wood",)),
    ObjectClass("fish", _fish, ("orange", "blue", "teal"), 30, ("water",)),
    ObjectClass("flower", _flower, ("pink", "yellow", "purple", "white"), 180, ("grass",)),
    ObjectClass("house", _house, ("white", "yellow", "grey"), 4, ("grass", "snow")),
    ObjectClass("kite", _kite, ("red", "green", "purple"), 40, ("sky",)),
    ObjectClass("mushroom", _mushroom, ("red", "brown", "orange"), 14, ("grass", "wood")),
    ObjectClass("starfish", _starfish, ("orange", "red", "purple"), 180, ("sand", "water")),
)
