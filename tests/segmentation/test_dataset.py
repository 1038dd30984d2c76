"""Training samples: joint, repeatable in any process, and alive where an image isn't."""

from __future__ import annotations

import colorsys
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, open_mask_set
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import WIDE_IGNORE, MaskFolder, PseudoMask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import MaskError, TrainingError
from wsss_pipeline.prompts.augmentation import PromptAugmentation
from wsss_pipeline.prompts.config import CropConfig
from wsss_pipeline.segmentation.augmentation import Augmentation, OpenCvAugmentation
from wsss_pipeline.segmentation.dataset import (
    ImageLabels,
    JointAugmentation,
    SegmentationDataset,
    sample_order,
    usable_ids,
)
from wsss_pipeline.segmentation.train_config import AugmentationConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
CONFIG = AugmentationConfig(crop=64, scale_min=0.5, scale_max=1.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=3, scenes={"train": 6})
    return folder


def dataset(root: Path, config: AugmentationConfig = CONFIG, seed: int = 0) -> SegmentationDataset:
    images = find_images(root / "JPEGImages")
    masks = MaskFolder(root / "SegmentationClass", load_class_set("demo").names, "ground truth")
    return SegmentationDataset(images, masks, list(images), Augmentation(config, MEAN, STD), seed)


def test_a_sample_is_a_function_of_seed_epoch_and_position(root: Path) -> None:
    data = dataset(root)
    torch.manual_seed(1)
    first = data[(0, 2)]
    torch.manual_seed(2)
    again = data[(0, 2)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["mask"], again["mask"])
    others = [data[(1, 2)], dataset(root, seed=1)[(0, 2)]]
    assert not any(torch.equal(first["image"], other["image"]) for other in others)


def test_the_random_numbers_of_the_run_are_left_alone(root: Path) -> None:
    data = dataset(root)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_shapes_types_and_padding(root: Path) -> None:
    small = AugmentationConfig(crop=96, scale_min=0.4, scale_max=0.5)
    for position in range(6):
        sample = dataset(root, small)[(0, position)]
        assert sample["image"].shape == (3, 96, 96)
        assert sample["image"].dtype == torch.float32
        assert sample["mask"].dtype == torch.int64
        assert sample["confidence"].dtype == torch.uint8
        outside = sample["mask"] == 255
        assert outside.sum() > 96 * 96 // 2
        assert not sample["image"][:, outside].any()
        assert not sample["confidence"][outside].any()
        assert (sample["confidence"][~outside] == 200).all()


def test_image_and_mask_stay_together(root: Path) -> None:
    """Without colour changes a class's pixels are those of the image: a mask drawn as image proves it."""
    images = find_images(root / "JPEGImages")
    data = dataset(root, AugmentationConfig(crop=64, scale_min=1, scale_max=1, photometric=False))
    plain = data[(0, 0)]
    assert set(np.unique(plain["mask"])) <= {*range(11)}

    class Same:
        class_names = data.masks.class_names
        identity = description = "the image's own red"

        def __contains__(self, image_id: object) -> bool:
            return True

        def __getitem__(self, image_id: str) -> PseudoMask:
            red = read_image(images[image_id])[..., 0]
            return PseudoMask((red > 128).astype(np.uint8), np.minimum(red, 200))

    joint = SegmentationDataset(images, Same(), list(images), data.augmentation, 0)
    for key in ((0, 0), (0, 1), (1, 1), (2, 3)):
        sample = joint[key]
        red = sample["image"][0] * STD[0] + MEAN[0]
        assert torch.equal((255 * red).round().clamp(max=200), sample["confidence"].float())
        assert torch.equal(sample["mask"] == 1, red > 128.5 / 255)


@pytest.mark.parametrize(("method", "count"), [("fork", 2), ("spawn", 1)])  # one to spawn takes seconds
def test_workers_give_what_this_process_gives(root: Path, method: str, count: int) -> None:
    data = dataset(root)

    def samples(workers: int) -> list[torch.Tensor]:
        context = {"multiprocessing_context": method} if workers else {}
        order = sample_order(len(data), seed=4)
        loader = DataLoader(data, batch_size=2, sampler=order, num_workers=workers, **context)  # type: ignore[arg-type]
        return [batch["image"] for batch in islice(loader, 4)]

    for here, there in zip(samples(0), samples(count), strict=True):
        assert torch.equal(here, there)


def test_a_damaged_image_counts_nothing_and_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_voc_folder(tmp_path, 1, {"train": 2})
    (tmp_path / "JPEGImages/train_00000.jpg").write_bytes(b"no picture")
    data = dataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        samples = [data[(epoch, 0)] for epoch in range(3)]
    assert len(caplog.records) == 1
    assert "train_00000" in caplog.text
    for sample in samples:
        assert sample["damaged"]
        assert (sample["mask"] == 255).all()
    assert not data[(0, 1)]["damaged"]


def test_each_epoch_has_each_image_once_in_another_order() -> None:
    stream = list(islice(sample_order(5, seed=0), 15))
    epochs = [[position for e, position in stream if e == epoch] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(5))] * 3
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_the_stream_goes_on_anywhere_and_is_shared_out() -> None:
    stream = list(islice(sample_order(7, seed=2), 40))
    assert list(islice(sample_order(7, seed=2, start=16), 24)) == stream[16:]
    shares = [list(islice(sample_order(7, 2, 4, rank, 3), 12)) for rank in range(3)]
    assert [place for group in zip(*shares, strict=True) for place in group] == stream[4:40]


def test_images_that_failed_in_stage_one_stop_no_training(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = dataset(root)
    names = ("cat", "dog")
    folder = open_mask_set(tmp_path, MaskSet(name="pets", determinants={}, class_names=names))
    ids = sorted(data.images)
    with MaskWriter(folder) as writer:
        for image_id in ids[1:]:
            record = PseudoMask(np.zeros((4, 4), np.uint8), np.full((4, 4), 200, np.uint8), ())
            writer.write(image_id, record, image_digest="0" * 64, seconds=0.1)
        writer.close()
        unfinished = MaskCache.open(folder)
        with pytest.raises(
            TrainingError, match=f"1 of the 6 images aren't in the mask set .* \\({ids[0]}\\)"
        ):
            usable_ids(data.images, unfinished)
    with MaskWriter(folder) as writer:
        writer.finish(ids)
    masks = MaskCache.open(folder)
    assert usable_ids(data.images, masks) == usable_ids(data.images, masks, ids) == ids[1:]
    assert f"aren't in the {masks.description} ({ids[0]}); they are left out" in caplog.text
    with pytest.raises(TrainingError, match="2 of the 7 images aren't in the mask set"):
        usable_ids({**data.images, "new": Path("new.jpg")}, masks)


def test_missing_masks_are_refused_or_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(root)
    assert usable_ids(data.images, data.masks) == list(data.images)
    assert not caplog.messages, "nothing is left out"
    images = {**data.images, "new": Path("new.jpg")}
    with pytest.raises(TrainingError, match=r"1 of the 7 images aren't in the ground truth .* \(new\)"):
        usable_ids(images, data.masks)
    assert len(usable_ids(images, data.masks, allow_missing=True)) == 6
    with pytest.raises(TrainingError, match="have no image file"):
        usable_ids(data.images, data.masks, ["train_00000", "nowhere"])
    with pytest.raises(TrainingError, match="no image to work on"):
        usable_ids({}, data.masks)


def test_ground_truth_of_other_classes_is_found_before_training(root: Path) -> None:
    with pytest.raises(MaskError, match=r"png holds values \d+, but with 1 classes"):
        MaskFolder(root / "SegmentationClass", ("cat",))


def test_a_scaled_mask_lies_where_the_scaled_image_does() -> None:
    """A step edge, doubled in size: half a pixel of offset would show."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 255
    mask = (image[0] > 0).to(torch.uint8)
    config = AugmentationConfig(crop=64, scale_min=2.0, scale_max=2.0, flip=False, photometric=False)
    pixels, labels, _ = Augmentation(config, MEAN, STD)(image, mask, torch.ones(32, 32, dtype=torch.uint8))
    bright = pixels[0] * STD[0] + MEAN[0] > 0.5
    assert torch.equal(bright, labels == 1)


def augmented(image: torch.Tensor, **values: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The red of a crop in 0..1 and its labels; the mask has the image's own red, halved."""
    config = AugmentationConfig.model_validate({"photometric": False, **values})
    mask = image[0] // 2
    pixels, labels, _ = Augmentation(config, MEAN, STD)(image, mask, torch.ones_like(mask))
    return pixels[0] * STD[0] + MEAN[0], labels


def test_scales_and_places_are_any_between_their_bounds() -> None:
    torch.manual_seed(0)
    heights, widths, tops, lefts = [], [], [], []
    for _ in range(60):
        _, labels = augmented(torch.zeros(3, 40, 60, dtype=torch.uint8), crop=100)
        rows, columns = (labels != 255).nonzero(as_tuple=True)
        tops.append(int(rows.min()))
        lefts.append(int(columns.min()))
        heights.append(int(rows.max()) + 1 - tops[-1])
        widths.append(int(columns.max()) + 1 - lefts[-1])
        assert (labels != 255).sum() == heights[-1] * widths[-1]
    assert 20 <= min(heights) < 24
    assert 56 < max(heights) <= 60
    assert all(abs(width - 1.5 * height) <= 1 for height, width in zip(heights, widths, strict=True))
    for starts, sizes in ((tops, heights), (lefts, widths)):
        places = [start / (100 - size) for start, size in zip(starts, sizes, strict=True) if size < 99]
        assert min(places) < 0.1
        assert max(places) > 0.9


def test_crops_of_a_large_image_lie_within_it_and_reach_its_edges() -> None:
    image = torch.arange(200, dtype=torch.uint8).expand(3, 50, 200)
    torch.manual_seed(0)
    crops = [augmented(image, crop=40, scale_min=1, scale_max=1, flip=False)[1] for _ in range(120)]
    assert not any((labels == 255).any() for labels in crops)
    starts = {2 * int(labels[0, 0]) for labels in crops}
    assert min(starts) < 10
    assert max(starts) > 150


def test_every_second_image_is_mirrored_and_none_stands_on_its_head() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :8, :16] = 200  # above, on the left
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(40):
        red, labels = augmented(image, crop=32, scale_min=1, scale_max=1)
        assert torch.equal(red > 0.5, labels == 100)
        left, right = bool(labels[:8, :16].all()), bool(labels[:8, 16:].all())
        assert left != right
        assert not labels[8:].any()
        mirrored += right
    assert 10 < mirrored < 30
    assert augmented(image, crop=32, scale_min=1, scale_max=1, flip=False)[1][0, 0] == 100


def test_brightness_contrast_and_saturation_change_by_two_fifths_and_the_hue_by_a_tenth() -> None:
    """Greys tell brightness and contrast; beside them a red patch has its saturation and its hue."""
    image = torch.full((3, 16, 16), 60, dtype=torch.uint8)
    image[..., 6:] = 140
    image[1:, :, 12:] = 80
    config = AugmentationConfig(crop=16, scale_min=1, scale_max=1, flip=False)
    torch.manual_seed(0)
    found = []
    for _ in range(60):
        pixels, *_ = Augmentation(config, MEAN, STD)(image, image[0], image[0])
        levels = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        dark, light, patch = (levels[:, 0, column].tolist() for column in (0, 8, 14))
        steepness = (light[0] - dark[0]) * 255 / 80
        saturation = (max(patch) - min(patch)) * 255 / 60 / steepness
        hue, _, _ = colorsys.rgb_to_hsv(*patch)
        found.append((steepness, saturation, (hue + 0.5) % 1 - 0.5))
    lowest, highest = ([choose(values) for values in zip(*found, strict=True)] for choose in (min, max))
    assert 0.35 < lowest[0] < 0.6 < 1.5 < highest[0] < 1.98, "brightness times contrast"
    assert 0.55 < lowest[1] < 0.7 < 1.3 < highest[1] < 1.45
    assert -0.11 < lowest[2] < -0.08 < 0.08 < highest[2] < 0.11


def test_what_is_finer_than_a_pixel_of_a_smaller_image_is_its_mean() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[..., 1::4] = image[..., 2::4] = 255  # the very columns that interpolation alone would look at
    red, _ = augmented(image, crop=16, scale_min=0.25, scale_max=0.25)
    assert 0.3 < red.min() <= red.max() < 0.7


@pytest.mark.parametrize(
    "style", [Augmentation, OpenCvAugmentation, None], ids=["plain", "opencv", "prompts"]
)
def test_with_more_than_254_classes_255_is_one_and_nothing_beyond_the_edge_is(
    root: Path, style: type[Augmentation | OpenCvAugmentation] | None
) -> None:
    images = dict(find_images(root / "JPEGImages"))

    class Many:
        class_names = tuple(map(str, range(1, 301)))
        identity = description = "made"

        def __contains__(self, image_id: object) -> bool:
            return True

        def __getitem__(self, image_id: str) -> PseudoMask:
            mask = np.full(read_image(images[image_id]).shape[:2], 255, np.uint16)
            mask[:, ::2] = 300
            return PseudoMask(mask, np.full(mask.shape, 200, np.uint8), ("300",))

    config = AugmentationConfig(crop=640, scale_min=1, scale_max=1)
    augmentation: JointAugmentation = PromptAugmentation(CropConfig())
    if style is not None:
        augmentation = style(config, MEAN, STD)
    data = SegmentationDataset(images, Many(), list(images), augmentation, 0)
    sample = data[(0, 0)]
    expected = {255, 300} if style is None else {255, 300, WIDE_IGNORE}
    assert set(sample["mask"].unique().tolist()) == expected
    assert sample["present"].nonzero().flatten().tolist() == [300]
    labels = ImageLabels(Many.class_names, dict.fromkeys(images, (300,)), "made", "made")
    blank = SegmentationDataset(images, labels, list(images), augmentation, 0)[(0, 0)]
    assert set(blank["mask"].unique().tolist()) == expected - {255, 300} | {0}
    images[data.image_ids[0]] = root / "gone.png"
    assert set(data[(0, 0)]["mask"].unique().tolist()) == {WIDE_IGNORE}
