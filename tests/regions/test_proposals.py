"""Mask proposals beside those of the published generator, and what holds of them for any predictor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cache.manifest import fingerprint
from wsss_pipeline.regions import proposals
from wsss_pipeline.regions.proposals import (
    PRESETS,
    Crop,
    ProposalConfig,
    crops_of,
    filter_parts,
    propose,
    suppress,
    without_specks,
)
from wsss_pipeline.regions.regions import PART, SUB_PART, WHOLE, Regions

GOLDEN = Path(__file__).parents[1] / "golden" / "fma"
SCENE = dict(np.load(GOLDEN / "proposals_scene.npz"))
IMAGE: NDArray[np.uint8] = SCENE["image"]
# Segment Anything's own settings
UPSTREAM = {
    "points": (32,),
    "iou_threshold": 0.88,
    "iou_bonus": (0.0, 0.0, 0.0),
    "stability_threshold": 0.95,
    "nms_bonus": (0.0, 0.0, 0.0),
    "smallest_area": 0,
    "part_filter": False,
}
PART_OF_IMAGE = np.ascontiguousarray(IMAGE[40:140, 60:180])
COARSE = {"points": (12, 6)}


class ScenePredictor:
    """The stand-in for SAM of the golden data, whose pictures spell their parts; see scene_predictor.py there.

    Its logits are a code of the mask's pixels and the levels above it, and become a mask where they are enlarged.
    """

    description = digest = "scene"
    points_per_batch = 64

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.enlarged: list[int] = []

    def encode(self, crop: NDArray[np.uint8]) -> None:
        self.ids = crop.astype(np.int64) // 10
        codes = self.ids @ [[26 * 26, 26 * 26, 26 * 26], [26, 26, 0], [1, 0, 0]]
        self.codes = torch.from_numpy(codes.transpose(2, 0, 1).astype(np.float32))

    def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        self.asked.append(len(points))
        height, width = self.ids.shape[:2]
        j, i = np.minimum(np.floor(points).astype(int), [width - 1, height - 1]).T
        level = np.arange(3)[:, None]
        k = (self.ids[i, j] @ [131, 37, 17] + 7 * level + 11 * i + 3 * j) % 240
        iou = 0.7505 + 0.001 * k + 0.0004 * (i * width + j) / (height * width)
        logits = torch.stack([self.codes[:, i, j].T, torch.tensor([2.0, 1, 0]).expand(len(points), 3)], dim=2)
        return logits[:, :, None], torch.from_numpy(iou.T).float()

    def enlarge(self, logits: Tensor) -> Tensor:
        self.enlarged.append(len(logits))
        enlarged = np.empty((len(logits), *self.ids.shape[:2]), np.float32)
        for number, (code, above) in enumerate(logits[:, 0].tolist()):
            level = 2 - int(above)
            mask = (self.codes[level] == code).numpy().astype(np.uint8)
            pixels = cv2.boxFilter(mask, -1, (5, 5), normalize=False, borderType=cv2.BORDER_CONSTANT)
            enlarged[number] = (2 * pixels.astype(np.float32) - 25) / (2 if level == 0 else 4)
        return torch.from_numpy(enlarged)


def golden(run: str) -> Regions:
    number = len(SCENE[f"{run}_rle_lengths"])
    return Regions(
        IMAGE.shape[:2],
        SCENE[f"{run}_rle_counts"],
        SCENE[f"{run}_rle_lengths"],
        SCENE.get(f"{run}_level", np.zeros(number)).astype(np.uint8),
        SCENE[f"{run}_iou"].astype(np.float32),
        SCENE[f"{run}_stability"].astype(np.float32),
        SCENE[f"{run}_point"].astype(np.float32),
    )


def differing(one: Regions, other: Regions) -> list[str]:
    names = ("size", "counts", "lengths", "levels", "iou", "stability", "points")
    return [name for name in names if not np.array_equal(getattr(one, name), getattr(other, name))]


def proposed(image: NDArray[np.uint8] = PART_OF_IMAGE, batch: int = 0, **settings: Any) -> Regions:
    regions = propose(image, ScenePredictor(), ProposalConfig(**settings), points_per_batch=batch)
    regions.check("it")
    return regions


def test_the_stand_in_answers_as_the_golden_one() -> None:
    predictor = ScenePredictor()
    predictor.encode(IMAGE)
    logits, iou = predictor.predict(SCENE["predictor_points"])
    enlarged = predictor.enlarge(logits.flatten(0, 1)).unflatten(0, (3, 3))[..., ::8, ::8]
    assert np.array_equal(enlarged, SCENE["predictor_logits"])
    assert np.array_equal(iou, SCENE["predictor_iou"])


@pytest.mark.parametrize(
    ("run", "settings"),
    [("upstream", UPSTREAM), ("nofilter", {"part_filter": False}), ("fma", PRESETS["fma"])],
)
def test_proposals_are_the_published_ones(run: str, settings: dict[str, Any]) -> None:
    regions = proposed(IMAGE, **settings)
    assert differing(regions, golden(run)) == ([] if run != "upstream" else ["levels"])
    boxes = regions.boxes()
    boxes[:, 2:] -= boxes[:, :2]
    assert np.array_equal(boxes, SCENE[f"{run}_bbox"])
    assert np.array_equal(regions.areas(), SCENE[f"{run}_area"])


@pytest.mark.parametrize("name", ["all", "no_wholes", "no_parts", "only_sub_parts"])
def test_the_part_filter_is_the_published_one(name: str) -> None:
    data = np.load(GOLDEN / "part_filter.npz")
    masks = np.unpackbits(data["masks"], axis=2).astype(bool)
    given = data[f"{name}_input"]
    kept = filter_parts(Regions.of_masks(masks[given], data["levels"][given]), 0.3)
    assert given[kept].tolist() == data[f"{name}_kept"].tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"points": (12,)},
        {"points": (12, 5)},
        {"overlap": 0.1},
        {"level": "area"},  # of logits that say nothing of areas
        {"iou_threshold": 0.9},
        {"iou_bonus": (0.1, 0.1, 0.1)},
        {"stability_threshold": 0.97},
        {"stability_offset": 2.0},
        {"border": 5},
        {"nms_threshold": 0.3},
        {"nms_bonus": (0.0, 0.0, 0.0)},
        {"crop_nms_threshold": 0.1},
        {"smallest_area": 10},
        {"part_filter": True},
        {"part_overlap": 0.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_every_setting_changes_proposals(setting: dict[str, Any]) -> None:
    settings = {**COARSE, "part_filter": "part_overlap" in setting}
    assert differing(proposed(**settings), proposed(**{**settings, **setting}))


def test_every_setting_is_in_that_table() -> None:
    table = next(
        mark for mark in test_every_setting_changes_proposals.pytestmark if mark.name == "parametrize"
    )
    # how images are read is shown with files, where the stage is tested
    assert {name for setting in table.args[1] for name in setting} | {"images"} == set(
        ProposalConfig.model_fields
    )


def test_the_defaults_are_those_of_the_region_sets_that_there_are() -> None:
    """With others, all of them would be made anew."""
    assert fingerprint(ProposalConfig().model_dump(mode="json"))[:12] == "30110a62ede0"


@pytest.mark.parametrize("batch", [1, 7, 10_000])
def test_proposals_do_not_depend_on_the_points_of_a_batch(batch: int) -> None:
    assert not differing(proposed(**COARSE), proposed(batch=batch, **COARSE))


def test_masks_of_low_predicted_iou_are_not_enlarged_and_others_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor, config = ScenePredictor(), ProposalConfig(points=(12,), part_filter=False)
    whole = propose(PART_OF_IMAGE, predictor, config)
    _, iou = predictor.predict(
        (np.mgrid[:12, :12][::-1].reshape(2, -1).T + 0.5) / 12 * PART_OF_IMAGE.shape[1::-1]
    )
    assert 0 < sum(predictor.enlarged) == (iou + torch.tensor([0, 0, 0.1]) > 0.86).sum() < 3 * 144
    monkeypatch.setattr(proposals, "LEAST_ENLARGED", 1)
    for limit, together in ((3 * 100 * 120, 3), (1, 1)):
        monkeypatch.setattr(proposals, "LOGITS_AT_A_TIME", limit)
        predictor = ScenePredictor()
        assert not differing(propose(PART_OF_IMAGE, predictor, config), whole)
        assert max(predictor.enlarged) == together


class Limited(ScenePredictor):
    """Runs out of memory where asked for more than so many points."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        if len(points) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(points)


def test_fewer_points_are_asked_for_where_memory_runs_out() -> None:
    predictor, config = Limited(9), ProposalConfig(**COARSE)
    assert not differing(propose(PART_OF_IMAGE, predictor, config), proposed(**COARSE))
    assert set(predictor.asked) <= {8, 4}  # the last of 6 x 6 are four
    with pytest.raises(torch.OutOfMemoryError):
        propose(PART_OF_IMAGE, Limited(0), config)


def test_a_predictors_own_fault_is_not_taken_for_want_of_memory() -> None:
    class Faulty(ScenePredictor):
        def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
            self.asked.append(len(points))
            raise RuntimeError("sizes don't match")

    predictor = Faulty()
    with pytest.raises(RuntimeError, match="don't match"):
        propose(PART_OF_IMAGE, predictor, ProposalConfig())
    assert len(predictor.asked) == 1


def test_one_colour_is_one_whole() -> None:
    regions = proposed(np.full((60, 80, 3), 50, np.uint8), **COARSE)
    assert regions.levels.tolist() == [WHOLE]
    assert regions.masks().all()


def test_a_mask_of_just_the_threshold_stays() -> None:
    uniform = np.full((60, 80, 3), 50, np.uint8)
    assert len(proposed(uniform, stability_threshold=1.0, stability_offset=0.0, **COARSE)) == 1


def test_where_nothing_survives_there_are_no_regions() -> None:
    regions = proposed(iou_threshold=10.0, **COARSE)
    assert len(regions) == 0
    assert regions.size == (100, 120)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3), (3, 40)])
def test_images_of_few_pixels_have_proposals(size: tuple[int, int]) -> None:
    class Everything(ScenePredictor):
        def enlarge(self, logits: Tensor) -> Tensor:
            return torch.full((len(logits), *self.ids.shape[:2]), 10.0)

    regions = propose(np.zeros((*size, 3), np.uint8), Everything(), ProposalConfig(points=(8, 4, 2)))
    assert len(regions)  # boxes of one row or column have no area, and none is suppressed
    assert regions.size == size
    assert regions.masks()[0].all()
    assert (regions.areas() > 0).all()


def test_crops_overlap_and_cover_the_image() -> None:
    config = ProposalConfig(points=(32, 16), overlap=0.25)
    assert crops_of(
        (80, 121), config
    ) == [  # 20 pixels of overlap: 50 rows, 71 columns, the last of them outside
        Crop(0, 0, 121, 80, 32),
        Crop(0, 0, 71, 50, 16),
        Crop(0, 30, 71, 50, 16),
        Crop(51, 0, 70, 50, 16),
        Crop(51, 30, 70, 50, 16),
    ]
    for size in [(1, 1), (5, 2), (300, 301)]:
        for layer in (1, 2, 3):
            covered = np.zeros(size, bool)
            for crop in crops_of(size, ProposalConfig(points=(1,) * (layer + 1)))[1:]:
                covered[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width] = True
            assert covered.all()


def test_levels_by_area_are_those_of_the_masks_sizes() -> None:
    """SAM 2's three masks may come in any order."""

    class Whole(ScenePredictor):
        """Logits are masks of the picture's size, in an order of one's own."""

        order = (0, 1, 2)

        def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
            logits, iou = super().predict(points)
            full = super().enlarge(logits.flatten(0, 1)).unflatten(0, (-1, 3))
            return full[:, self.order], iou[:, self.order]

        def enlarge(self, logits: Tensor) -> Tensor:
            return logits

    class Shuffled(Whole):
        order = (2, 0, 1)

    settings = {"part_filter": False, **COARSE}
    straight = propose(PART_OF_IMAGE, Whole(), ProposalConfig(**settings))
    assert not differing(straight, proposed(**settings))
    shuffled = propose(PART_OF_IMAGE, Shuffled(), ProposalConfig(level="area", **settings))
    found = [
        {
            (*point, area): level
            for point, area, level in zip(one.points.tolist(), one.areas(), one.levels, strict=True)
        }
        for one in (straight, shuffled)
    ]
    common = found[0].keys() & found[1].keys()
    assert {found[0][key] for key in common} == {SUB_PART, PART, WHOLE}
    # of masks of one size the first is the lesser
    assert sum(found[0][key] != found[1][key] for key in common) <= len(common) / 10


def test_equal_scores_leave_the_order_given() -> None:
    boxes = np.array([[20 * n, 0, 20 * n + 10, 10] for n in range(1500)])
    boxes = np.repeat(boxes, 2, axis=0)[:, [0, 1, 2, 3]]
    assert suppress(boxes, torch.ones(3000), 0.7).tolist() == list(range(0, 3000, 2))
    scores = torch.arange(3000) % 2
    assert suppress(boxes, scores, 0.7).tolist() == list(range(1, 3000, 2))


def test_specks_are_filled_and_dropped() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:18, 2:18] = True
    mask[5, 5] = mask[6, 6] = False  # a hole of two pixels, hanging together at a corner
    mask[10:13, 10:13] = False  # one of nine
    mask[0, 29] = True  # an island
    cleaned, is_changed = without_specks(mask, 9)
    expected = np.zeros_like(mask)
    expected[2:18, 2:18] = True
    expected[10:13, 10:13] = False
    assert is_changed
    assert (cleaned == expected).all()
    assert without_specks(expected, 9)[1] is False
    small = np.zeros((20, 30), bool)
    small[0, :3] = small[9, :5] = True
    cleaned, is_changed = without_specks(small, 100)  # all islands are small: the largest stays
    assert is_changed
    assert np.argwhere(cleaned).tolist() == [[9, column] for column in range(5)]


@pytest.mark.slow
def test_memory_is_bounded_for_large_pictures() -> None:
    """The logits of all 108 masks, of 4000 x 3000 pixels, would take 5 GB."""
    code = (
        "import resource, numpy as np, torch\n"
        "from wsss_pipeline.regions.proposals import ProposalConfig, propose\n"
        "from wsss_pipeline.regions.sam import load_predictor\n"
        f"predictor = load_predictor({str(GOLDEN / 'sam_tiny')!r}, torch.device('cpu'), offline=True)\n"
        f"small = np.load({str(GOLDEN / 'sam_tiny.npz')!r})['image']\n"
        "image = np.kron(small, np.ones((25, 23, 1), np.uint8))[:3000, :4000]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "regions = propose(image, predictor, ProposalConfig(points=(6,), part_filter=False))\n"
        "print(len(regions), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, kilobytes = map(int, done.stdout.split())
    assert number
    assert kilobytes < 500_000
