"""Masks of whatever is in an image, its parts and their parts, asked of a SAM point by point.

The mask generator of Segment Anything (Kirillov et al., ICCV 2023, appendix B) as FMA-WSSS (Yang and Gong, WACV 2024)
sets it: crops, a grid of points on each, thresholds, suppression of near duplicates, cleaning of specks, and a filter
that drops parts of what is there as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torchvision.ops import nms

from wsss_pipeline.config import ImagesConfig, Settings
from wsss_pipeline.regions.regions import PART, SUB_PART, WHOLE, Regions
from wsss_pipeline.runtime.device import give_back_memory, is_out_of_memory

# presets by name: settings, by key, that differ from the defaults
PRESETS: Mapping[str, Mapping[str, Any]] = {"fma": {}, "fast": {"points": (16,)}}

# logits enlarged at a time, of all masks together: 64 MB, and up to twice that on the way
LOGITS_AT_A_TIME = 2**24
LEAST_ENLARGED = 2**20  # logits of a mask on the way, however small the crop

# by level, in the order of SAM's outputs
ByLevel = tuple[float, float, float]


class ProposalConfig(Settings):
    """Mask proposals; the defaults are those of FMA-WSSS for SAM."""

    images: ImagesConfig = ImagesConfig()
    points: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (32, 16),
        min_length=1,
        max_length=4,
        strict=False,
        description="A side of the grid, on the whole image and on each crop of the layers below: 2x2, 4x4, ...",
    )
    overlap: float = Field(
        512 / 1500,
        ge=0,
        le=1,
        description="Of 2x2 crops, relative to the image's short side; half of it in each further layer.",
    )
    level: Literal["index", "area"] = Field(
        "index",
        description="Sub-part, part, whole by the place among a point's three masks, or by their areas (SAM 2).",
    )
    iou_threshold: float = Field(
        0.86, ge=0, le=10, description="Masks whose predicted IoU, with its bonus, isn't above it go."
    )
    iou_bonus: ByLevel = Field(
        (0.0, 0.0, 0.1),
        strict=False,
        description="Added to the predicted IoU of sub-parts, parts and wholes before the threshold.",
    )
    stability_threshold: float = Field(
        0.92, ge=0, le=1, description="Masks go whose area shrinks below this share between two thresholds."
    )
    stability_offset: float = Field(
        1.0, ge=0, le=100, description="Of these two thresholds from 0, in logits."
    )
    border: int = Field(
        20,
        ge=0,
        le=100_000,
        description="Masks this near to a crop's edge that isn't the image's go, pixels.",
    )
    nms_threshold: float = Field(
        0.7,
        ge=0,
        le=1,
        description="IoU of boxes above which the lesser mask of a crop goes, and of the image.",
    )
    nms_bonus: ByLevel = Field(
        (0.0, 0.0, 1.0), strict=False, description="Added to the predicted IoU where masks of a crop compete."
    )
    crop_nms_threshold: float = Field(
        0.7, ge=0, le=1, description="The same between crops, of which the smaller one's mask stays."
    )
    smallest_area: int = Field(
        100,
        ge=0,
        le=1_000_000_000,
        description="Smaller holes are filled, smaller islands dropped, pixels.",
    )
    part_filter: bool = Field(
        True, description="Drop parts that lie in wholes, and sub-parts in any of them."
    )
    part_overlap: float = Field(
        0.3, ge=0, le=1, description="Share of a part, inside another mask, from which the filter drops it."
    )


class Predictor(Protocol):
    """A promptable segmenter that looks at one picture at a time.

    Attributes:
        description: text for people.
        digest: SHA-256 (hexadecimal) of weights, architecture and preprocessing.
        points_per_batch: number of points whose answers fit into memory together.
    """

    description: str
    digest: str
    points_per_batch: int

    def encode(self, crop: NDArray[np.uint8]) -> None:
        """Take in the picture, uint8 (h, w, 3) RGB, that further calls are about."""

    def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Three masks a point: logits, float32 (N, 3, a, b) of any size, and predicted IoU, float32 (N, 3).

        Args:
            points: (N, 2), x and y in pixels of the picture.
        """

    def enlarge(self, logits: Tensor) -> Tensor:
        """Logits (M, a, b) out of those of ``predict`` in the picture's size, (M, h, w)."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels.

    Attributes:
        x, y: left and upper edge.
        width, height: its sides.
        points: number of points a side of its grid.
    """

    x: int
    y: int
    width: int
    height: int
    points: int


def propose(
    image: NDArray[np.uint8], predictor: Predictor, config: ProposalConfig, *, points_per_batch: int = 0
) -> Regions:
    """Regions of an image: wholes, parts and sub-parts, in this order where the part filter is on; maybe none.

    Args:
        image: uint8 (H, W, 3) RGB.
        predictor: a SAM.
        config: settings.
        points_per_batch: number of points asked for together; 0 is the predictor's own. Regions don't depend on it.
    """
    height, width = image.shape[:2]
    crops = crops_of((height, width), config)
    found = [_regions_of_crop(image, crop, predictor, config, points_per_batch) for crop in crops]
    places = [(crop, index) for crop, regions in enumerate(found) for index in range(len(regions))]
    if len(crops) > 1:
        boxes = [regions.boxes() + [crop.x, crop.y] * 2 for crop, regions in zip(crops, found, strict=True)]
        areas = torch.tensor([crops[crop].width * crops[crop].height for crop, _ in places])
        kept = suppress(np.concatenate(boxes), 1 / areas, config.crop_nms_threshold)
        places = [places[index] for index in kept]
    whole: list[Regions] = []
    changed: list[bool] = []
    for number, index in places:  # one mask at a time: those of a large image together would fill the memory
        crop, regions = crops[number], found[number].select([index])
        mask = np.zeros((height, width), bool)
        mask[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width] = regions.masks()[0]
        mask, is_changed = without_specks(mask, config.smallest_area)
        changed.append(is_changed)
        whole.append(
            Regions.of_masks(
                mask[None],
                regions.levels,
                iou=regions.iou,
                stability=regions.stability,
                points=regions.points,
            )
        )
    regions = Regions.joined((height, width), whole)
    if config.smallest_area:
        untouched = torch.tensor(changed, dtype=torch.bool).logical_not()
        threshold = max(config.nms_threshold, config.crop_nms_threshold)
        regions = regions.select(suppress(regions.boxes(), untouched, threshold))
    return regions.select(filter_parts(regions, config.part_overlap)) if config.part_filter else regions


def crops_of(size: tuple[int, int], config: ProposalConfig) -> list[Crop]:
    """The whole of an image of (H, W), then the crops of each layer, column by column; none is empty."""
    height, width = size
    crops = []
    for layer, points in enumerate(config.points):
        number = 2**layer
        overlap = int(config.overlap * min(size) * 2 / number)
        across, down = (math.ceil((overlap * (number - 1) + side) / number) for side in (width, height))
        for column, row in product(range(number), repeat=2):
            x, y = column * (across - overlap), row * (down - overlap)
            if x < width and y < height:  # an image of a single column has no second half
                crops.append(Crop(x, y, min(across, width - x), min(down, height - y), points))
    return crops


def _regions_of_crop(
    image: NDArray[np.uint8],
    crop: Crop,
    predictor: Predictor,
    config: ProposalConfig,
    points_per_batch: int,
) -> Regions:
    """What is left of a crop's masks, in its pixels; their points are those of the image."""
    corner = np.array([crop.x, crop.y])
    predictor.encode(image[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width])
    centres = (np.arange(crop.points) + 0.5) / crop.points
    points = np.stack(np.meshgrid(centres * crop.width, centres * crop.height), axis=-1).reshape(-1, 2)
    batch, done = points_per_batch or predictor.points_per_batch, 0
    parts: list[Regions] = []
    while done < len(points):
        try:
            parts += _answers(points[done : done + batch], crop, predictor, config)
        except RuntimeError as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            batch //= 2
        else:
            done += batch
            give_back_memory()
    regions = Regions.joined((crop.height, crop.width), parts)
    boxes = regions.boxes() + np.tile(corner, 2)
    edges = np.array([crop.x, crop.y, crop.x + crop.width, crop.y + crop.height])
    image_edges = np.array([0, 0, image.shape[1], image.shape[0]])
    is_cut = (abs(boxes - edges) <= config.border) & (abs(boxes - image_edges) > config.border)
    whole = ~is_cut.any(axis=1) & (regions.areas() > 0)
    regions, boxes = regions.select(whole), boxes[whole]
    scores = torch.from_numpy(regions.iou) + torch.tensor(config.nms_bonus)[regions.levels.astype(np.int64)]
    return regions.select(suppress(boxes, scores, config.nms_threshold))


def _answers(
    points: NDArray[np.float64], crop: Crop, predictor: Predictor, config: ProposalConfig
) -> Iterator[Regions]:
    """The predictor's masks at some points of a crop that pass both thresholds, a few at a time."""
    logits, iou = predictor.predict(points)
    levels = torch.arange(3, device=iou.device).expand(len(points), 3)
    if config.level == "area":
        levels = (logits > 0).sum(dim=(2, 3)).argsort(dim=1, stable=True).argsort(dim=1)
    # before any is enlarged: in low resolution a mask takes a tenth of the memory and less
    good = iou + torch.tensor(config.iou_bonus, device=iou.device)[levels] > config.iou_threshold
    owners = good.nonzero()[:, 0].cpu().numpy()
    if not len(owners):
        return
    most = max(1, LOGITS_AT_A_TIME // max(LEAST_ENLARGED, crop.width * crop.height))
    columns = (logits[good], iou[good], levels[good], torch.from_numpy(points[owners] + [crop.x, crop.y]))
    for some, some_iou, some_levels, some_points in zip(
        *(torch.split(column, most) for column in columns), strict=True
    ):
        enlarged = predictor.enlarge(some)
        inner, outer = ((enlarged > sign * config.stability_offset).sum(dim=(1, 2)) for sign in (1, -1))
        stability = inner / outer  # no number where both are empty, which passes no threshold
        kept = stability >= config.stability_threshold
        yield Regions.of_masks(
            (enlarged[kept] > 0).cpu().numpy(),
            some_levels[kept].cpu().numpy(),
            iou=some_iou[kept].cpu().numpy(),
            stability=stability[kept].cpu().numpy(),
            points=some_points[kept.cpu()].numpy(),
        )
        if crop.width * crop.height > LEAST_ENLARGED:
            give_back_memory()


def suppress(boxes: NDArray[np.int64], scores: Tensor, threshold: float) -> NDArray[np.int64]:
    """Indices left by non-maximum suppression, by falling score and, where scores are equal, in the order given.

    Args:
        boxes: (N, 4), x0, y0, x1, y1, whose sides are x1 - x0 and y1 - y0.
        scores: (N,).
        threshold: IoU above which the box of the lower score goes.
    """
    # which sorts stably, as batched_nms of the same library doesn't for many boxes: almost all scores may be equal
    kept: Tensor = nms(torch.from_numpy(boxes).float(), scores.float(), threshold)
    return kept.numpy()


def without_specks(mask: NDArray[np.bool_], smallest: int) -> tuple[NDArray[np.bool_], bool]:
    """A mask (H, W) with holes below ``smallest`` pixels filled, then islands dropped, and whether that changed it.

    Pixels that touch at a corner hang together. Of a mask all of whose islands are small the largest stays.
    """
    is_changed = False
    for inside in (False, True):
        _, pieces, statistics, _ = cv2.connectedComponentsWithStats(
            (mask == inside).astype(np.uint8), connectivity=8
        )
        sizes = statistics[:, cv2.CC_STAT_AREA]
        is_small = sizes < smallest
        is_small[0] = False  # all the rest of the image
        if not is_small.any():
            continue
        is_changed = True
        if inside and is_small[1:].all():
            is_small[1 + sizes[1:].argmax()] = False
        mask = np.where(is_small[pieces], not inside, mask)
    return mask, is_changed


def filter_parts(regions: Regions, limit: float) -> NDArray[np.int64]:
    """Indices of wholes, of parts outside wholes, and of sub-parts outside both, each level in its order.

    FMA-WSSS, section 3.3. A part is outside another mask where less than ``limit`` of it lies in there. A level above
    which there is nothing stays as it is.
    """
    owner, start, end = regions.runs_inside()
    areas = regions.areas()
    kept: list[int] = []
    for level in (WHOLE, PART, SUB_PART):
        candidates = regions.levels == level
        own = candidates[owner]
        covered = np.zeros(len(regions))
        for other in kept:
            # pixels of the other before a pixel: a line that rises along its runs, and is level between them
            runs = owner == other
            edges = np.stack([start[runs], end[runs]], axis=1).reshape(-1)
            before = np.repeat(np.cumsum(end[runs] - start[runs]), 2)
            before[::2] -= end[runs] - start[runs]
            common = np.interp(end[own], edges, before) - np.interp(start[own], edges, before)
            shared = np.bincount(owner[own], common, minlength=len(regions))
            covered = np.maximum(covered, shared / np.maximum(areas, 1))
        kept += np.flatnonzero(candidates & ((covered < limit) if kept else True)).tolist()
    return np.array(kept, np.int64)
