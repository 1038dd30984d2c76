"""Region vote: that of the published code, and what comes of regions that aren't as one wishes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain_fma
from wsss_pipeline.cam.scores import upscale_cams
from wsss_pipeline.config import CrfConfig, VoteConfig
from wsss_pipeline.refine.refiner import label
from wsss_pipeline.refine.region_vote import RegionVote, painted, vote
from wsss_pipeline.regions.regions import PART, SUB_PART, WHOLE, Regions

SMALL = Path(__file__).parents[1] / "golden" / "fma"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere")) / "fma"
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs"
)


def load(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file.items())


def upscaled(cam: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Maps (K, H, W) as the published vote is given them."""
    maps = torch.from_numpy(cam.astype(np.float32))
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0].clamp(min=0)


def seed(maps: Tensor, regions: Regions, power: float, class_ids: np.ndarray) -> np.ndarray:
    """Labels (H, W) of the vote alone."""
    found = vote(maps, regions, power)
    values = np.array([0, *(1 + class_ids)])
    owner = painted(regions, found.order.tolist())
    winners = np.append(found.winners.numpy(), 0)  # uncovered is background
    return values[winners[owner]]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], Regions]:
    numbers = load(SMALL / "vote.npz")
    masks = np.unpackbits(numbers["masks"], axis=2).astype(bool)
    return numbers, Regions.of_masks(masks, numbers["levels"])


@pytest.mark.parametrize("power", ["0.3", "0.4", "0.5", "0.6", "0.7", "1"])
def test_each_power_gives_the_published_seeds(golden: tuple[dict[str, Any], Regions], power: str) -> None:
    numbers, regions = golden
    maps, key = upscaled(numbers["cam"], regions.size), f"p{power}"
    found = vote(maps, regions, float(power))
    assert (seed(maps, regions, float(power), numbers["class_ids"]) == numbers[f"{key}_seed"]).all()
    assert np.abs(found.confidence.numpy() - numbers[f"{key}_conf"]).max() <= 1e-5
    values = np.array([0, *(1 + numbers["class_ids"])])
    assert (values[found.winners.numpy()] == numbers[f"{key}_cls"]).all()
    assert (found.order.numpy() == numbers[f"{key}_order"]).all()


def test_the_plain_form_that_speed_is_measured_against_gives_the_published_seeds(
    golden: tuple[dict[str, Any], Regions],
) -> None:
    numbers, regions = golden
    winners = plain_fma.vote(torch.from_numpy(numbers["cam"]), regions.masks(), numbers["levels"])
    values = np.array([0, *(1 + numbers["class_ids"])])
    assert (values[winners] == numbers["p0.7_seed"]).all()


PHOTOGRAPHS = [
    (picture, prefix, cam, power)
    for picture in ("chelsea", "coffee", "motorcycle")
    for prefix, cam, powers in (
        ("cls", "cls_refined_voc_cls", ("0.3", "0.4", "0.5", "0.6")),
        ("seg", "seg_refined_voc_seg", ("0.7",)),
        ("seg", "seg_cam_raw", ("1",)),
    )
    for power in powers
]


@needs_large
@pytest.mark.parametrize(("picture", "prefix", "cam", "power"), PHOTOGRAPHS)
def test_photographs_get_the_published_seeds(picture: str, prefix: str, cam: str, power: str) -> None:
    numbers, maps = load(LARGE / "votes" / f"{picture}.npz"), load(LARGE / "cams" / f"{picture}.npz")[cam]
    size, count = (int(numbers["height"]), int(numbers["width"])), len(numbers["levels"])
    ones = np.ones(count, np.float32)
    regions = Regions(
        size,
        numbers["rle_counts"].astype(np.int32),
        numbers["rle_lengths"].astype(np.int32),
        numbers["levels"].astype(np.uint8),
        ones,
        ones,
        np.zeros((count, 2), np.float32),
    )
    regions.check(picture)
    found, key = vote(upscaled(maps, size), regions, float(power)), f"{prefix}_p{power}"
    assert (
        seed(upscaled(maps, size), regions, float(power), numbers["label_ids"]) == numbers[f"{key}_seed"]
    ).all()
    assert np.abs(found.confidence.numpy() - numbers[f"{key}_conf"]).max() <= 1e-5
    assert (found.order.numpy() == numbers[f"{key}_order"]).all()


class Given:
    """A ``RegionSource``: regions as they are."""

    description = "given"

    def __init__(self) -> None:
        self.identity: dict[str, object] = {"given": True}

    def __call__(self, image_id: str, pixels: np.ndarray) -> Regions:
        raise AssertionError


def refined(maps: Tensor, regions: Regions, cams: Tensor | None = None, **settings: Any) -> Tensor:
    """Posterior of maps (K, H, W) in [0, 1] with their background, of an image whose left half is dark.

    They vote themselves, or the CAMs that they were made of do.
    """
    image = np.full((*maps.shape[1:], 3), 220, np.uint8)
    image[:, : image.shape[1] // 2] = 30
    scores = torch.cat([1 - maps.amax(dim=0, keepdim=True), maps])
    refiner = RegionVote(VoteConfig(regions="given", **settings), CrfConfig(), Given())
    (posterior,) = refiner([image], [scores], [regions], [maps if cams is None else cams])
    return posterior


def test_the_posterior_has_the_painted_regions_label_and_score(
    golden: tuple[dict[str, Any], Regions],
) -> None:
    numbers, regions = golden
    maps = upscaled(numbers["cam"], regions.size)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True)
    posterior = refined(maps, regions)
    assert posterior.sum(dim=0).allclose(torch.ones(regions.size))
    assert (posterior >= 0).all()
    mask, confidence = label(posterior, [int(value) + 1 for value in numbers["class_ids"]], regions.size)
    assert (mask.numpy() == numbers["p0.6_seed"]).all()
    owner = painted(regions, numbers["p0.6_order"].tolist())
    expected = numbers["p0.6_conf"][owner]
    covered = owner >= 0
    assert np.abs(confidence.numpy()[covered] / 200 - expected[covered]).max() <= 0.0051
    rest = (1 - maps.amax(dim=0)).clamp(min=0.5).numpy()[~covered]
    assert np.abs(posterior[0].numpy()[~covered] - rest).max() < 1e-6


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_later_regions_are_painted_over_earlier_ones(number: int) -> None:
    rng = np.random.default_rng(number)
    masks = rng.random((number, 7, 9)) < 0.3
    order = rng.permutation(number).tolist()
    expected = np.full((7, 9), -1)
    for place in order:
        expected[masks[place]] = place
    assert (painted(Regions.of_masks(masks), order) == expected).all()


def test_one_region_alone_is_background(golden: tuple[dict[str, Any], Regions]) -> None:
    numbers, _ = golden
    alone = Regions.of_masks(
        np.unpackbits(numbers["masks"][1:2], axis=2).astype(bool), numbers["levels"][1:2]
    )
    maps = upscaled(numbers["cam"], alone.size)
    found = vote(maps, alone, 0.6)
    assert found.winners.tolist() == numbers["one_mask_cls"].tolist() == [0]
    assert found.confidence.tolist() == pytest.approx(numbers["one_mask_conf"].tolist(), abs=1e-5)


def test_a_class_without_activation_disappears(golden: tuple[dict[str, Any], Regions]) -> None:
    numbers, regions = golden
    maps = upscaled(-np.abs(numbers["cam"]), regions.size)
    assert seed(maps, regions, 0.6, numbers["class_ids"]).max() == numbers["all_negative_seed_max"]


HALVES = np.zeros((2, 20, 30), bool)
HALVES[0, :, :15], HALVES[1, :, 15:] = True, True


def two_classes() -> Tensor:
    maps = torch.zeros(2, 20, 30)
    maps[0, :, :15], maps[1, 5:15, 20:28] = 0.9, 0.8
    return maps


def test_a_region_is_one_label_as_a_whole() -> None:
    labels = refined(two_classes(), Regions.of_masks(HALVES)).argmax(dim=0)
    assert (labels[:, :15] == 1).all()
    assert (labels[:, 15:] == 2).all()


def test_a_higher_level_is_painted_over_a_surer_part() -> None:
    masks = np.stack([np.ones((20, 30), bool), HALVES[0], HALVES[1]])
    levels = {name: [level, WHOLE, WHOLE] for name, level in (("part", PART), ("sub-part", SUB_PART))}
    for level in levels.values():
        labels = refined(two_classes(), Regions.of_masks(masks, level)).argmax(dim=0)
        assert (labels[:, :15] == 1).all()
    # of one level, the surer one
    labels = refined(two_classes(), Regions.of_masks(masks)).argmax(dim=0)
    assert (labels[:, :15] == 1).all()
    assert (labels[:, 15:] == 2).all()


def test_no_regions_and_empty_regions_leave_all_to_what_is_uncovered() -> None:
    for masks in (np.zeros((0, 20, 30), bool), np.zeros((2, 20, 30), bool)):
        posterior = refined(two_classes(), Regions.of_masks(masks))
        assert torch.isfinite(posterior).all()
        assert (posterior.argmax(dim=0) == 0).all()
    # beside others an empty one changes nothing
    masks = np.concatenate([HALVES, np.zeros((1, 20, 30), bool)])
    with_empty = refined(two_classes(), Regions.of_masks(masks, [WHOLE, WHOLE, WHOLE]))
    assert with_empty.equal(refined(two_classes(), Regions.of_masks(HALVES)))


def test_the_crf_labels_what_no_region_covers() -> None:
    left = Regions.of_masks(np.stack([HALVES[0], HALVES[0] & (np.arange(30) < 5)]))
    maps = two_classes()
    maps[1, :, 15:] = 0.8
    plain, with_crf = refined(maps, left), refined(maps, left, uncovered="crf")
    assert (plain.argmax(dim=0)[:, 15:] == 0).all()
    assert (with_crf.argmax(dim=0)[:, 15:] == 2).all()
    assert with_crf[:, :, :15].equal(plain[:, :, :15])


def test_scores_of_a_scaled_image_meet_regions_of_its_own_size() -> None:
    small = F.interpolate(two_classes()[None], (10, 15), mode="nearest")[0]
    posterior = refined(small, Regions.of_masks(HALVES))
    assert posterior.shape == (3, 20, 30)
    assert (posterior.argmax(dim=0)[:, 15:] == 2).all()


def test_maps_vote_before_they_are_scaled(golden: tuple[dict[str, Any], Regions]) -> None:
    # as weak as CLIP's own gradients can be: the constant of the min-max keeps them weak
    numbers, regions = golden
    weak = torch.from_numpy(numbers["cam"]) * (3e-8 / np.abs(numbers["cam"]).max())
    scaled = upscale_cams(weak, regions.size)
    covered = torch.from_numpy(painted(regions, list(range(len(regions))))) >= 0
    expected = vote(F.interpolate(weak[None], regions.size, mode="bilinear")[0].clamp(min=0), regions, 1.0)
    assert expected.scores[1:].nan_to_num().max() < 0.25
    posterior = refined(scaled, regions, weak, background_power=1.0)
    assert (posterior.argmax(dim=0)[covered] == 0).all()
    # where they were scaled first, most would have won
    assert (refined(scaled, regions, scaled, background_power=1.0).argmax(dim=0)[covered] > 0).any()


@pytest.mark.parametrize(("power", "winner"), [(0.2, 0), (5.0, 1)])
def test_the_background_power_decides_close_calls(power: float, winner: int) -> None:
    thirds = np.zeros((3, 20, 30), bool)
    for third, columns in enumerate((slice(0, 10), slice(10, 20), slice(20, 30))):
        thirds[third, :, columns] = True
    maps = torch.zeros(1, 20, 30)
    maps[0, :, :10], maps[0, :, 10:20] = 1.0, 0.4
    posterior = refined(maps, Regions.of_masks(thirds), background_power=power)
    assert (posterior.argmax(dim=0)[:, 10:20] == winner).all()
    assert posterior.sum(dim=0).allclose(torch.ones(20, 30))


def test_what_decides_is_in_the_fingerprint() -> None:
    def determinants(**settings: Any) -> object:
        return RegionVote(VoteConfig(regions="x", **settings), CrfConfig(), Given()).determinants()

    assert determinants() == determinants()
    assert determinants() != determinants(background_power=0.7)
    assert determinants() != determinants(uncovered="crf")
    assert "regions" in determinants()["vote"]  # type: ignore[index]
