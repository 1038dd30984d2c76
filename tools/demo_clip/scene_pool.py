"""Scenes for training: drawn once by several processes, then seen many times, near and far, in other light."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.demo.scenes import CLASS_NAMES, DrawnObject, Scene, draw_scene

POOL_SIZE = (128, 96)  # width, height of a drawn training scene

NEAR_SHARE = 0.6  # of the views: a part of the scene instead of the whole
SMALLEST_PART = 0.05  # of the scene's area
AT_OBJECT_SHARE = 0.6  # of the near views: those around an object instead of anywhere
LEAST_OF_OBJECT = 0.35  # of its pixels, for an object at the edge to be spoken of
LEAST_OF_VIEW = 0.3  # of the view, which is enough for a part of an object too
LEAST_OF_GROUND = 0.1  # of the view, for a background to be spoken of


class View(NamedTuple):
    """An image uint8 (h, w, 3) RGB and what there is to say of it; never nothing."""

    image: NDArray[np.uint8]
    objects: tuple[DrawnObject, ...]
    backgrounds: tuple[str, ...]


@dataclass(frozen=True)
class ScenePool:
    """Images uint8 (N, H, W, 3) RGB, who is where (N, H, W), and what each scene holds."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    contents: Sequence[tuple[tuple[DrawnObject, ...], tuple[str, ...], int]]

    def __len__(self) -> int:
        return len(self.images)

    def view(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Scene ``index`` or a part of it at ``size`` (width, height), mirrored and relit at random.

        As a photograph of a flower may show a meadow or a few petals, so do these. Someone who wrote the
        caption of a near view would name what can be seen in it, and that is what the view tells.
        """
        image, (objects, backgrounds, _) = self.images[index], self.contents[index]
        if rng.random() < NEAR_SHARE:
            image, objects, backgrounds = self._part(index, rng)
        shrinks = image.shape[0] >= size[1]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        light = rng.uniform(0.8, 1.2, 3) * rng.uniform(0.85, 1.15)
        relit = np.clip(image * light.astype(np.float32), 0, 255).astype(np.uint8)
        return View(relit, objects, backgrounds)

    def _part(
        self, index: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], tuple[DrawnObject, ...], tuple[str, ...]]:
        mask, (objects, backgrounds, horizon) = self.masks[index], self.contents[index]
        total = np.bincount(mask.ravel(), minlength=len(CLASS_NAMES) + 1)
        while True:
            rows, columns = _window(mask, objects, rng)
            part = mask[rows, columns]
            seen = np.bincount(part.ravel(), minlength=len(CLASS_NAMES) + 1)
            told = tuple(
                drawn
                for drawn, value in ((drawn, CLASS_NAMES.index(drawn.name) + 1) for drawn in objects)
                if seen[value] >= LEAST_OF_OBJECT * total[value] or seen[value] > LEAST_OF_VIEW * part.size
            )
            # backgrounds: the lower one first, the other above the horizon
            above = int((part[: max(0, horizon - rows.start)] == 0).sum())
            shares = (int(seen[0]) - above, above)
            words = tuple(
                word
                for word, share in zip(backgrounds, shares, strict=False)
                if share > LEAST_OF_GROUND * part.size
            )
            if told or words:
                return self.images[index][rows, columns], told, words


def _window(
    mask: NDArray[np.uint8], objects: Sequence[DrawnObject], rng: np.random.Generator
) -> tuple[slice, slice]:
    """Rows and columns of a part with the image's proportions, around an object or anywhere."""
    height, width = mask.shape
    side = math.exp(rng.uniform(math.log(SMALLEST_PART), 0)) ** 0.5
    h, w = max(1, round(height * side)), max(1, round(width * side))
    if rng.random() < AT_OBJECT_SHARE:
        drawn = objects[int(rng.integers(len(objects)))]
        ys, xs = np.nonzero(mask == CLASS_NAMES.index(drawn.name) + 1)
        cy, cx = ys.mean() + 0.12 * h * rng.normal(), xs.mean() + 0.12 * w * rng.normal()
    else:
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
    top, left = int(np.clip(cy - h / 2, 0, height - h)), int(np.clip(cx - w / 2, 0, width - w))
    return slice(top, top + h), slice(left, left + w)


def draw_pool(seed: int, count: int, processes: int) -> ScenePool:
    """``count`` scenes; scene i depends on ``seed`` and i alone, not on the number of processes."""
    width, height = POOL_SIZE
    images = np.empty((count, height, width, 3), np.uint8)
    masks = np.empty((count, height, width), np.uint8)
    contents = []
    # spawn: a fork of a process that has used torch's threads can hang
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        scenes = workers.imap(partial(_draw, seed), range(count), chunksize=64)
        for index, scene in enumerate(scenes):
            images[index], masks[index] = scene.image, scene.mask
            contents.append((scene.objects, scene.backgrounds, scene.horizon))
    return ScenePool(images, masks, contents)


def _draw(seed: int, index: int) -> Scene:
    return draw_scene((seed, index), *POOL_SIZE)
