"""Inference: scales, flip and windows, with networks whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from wsss_pipeline.config import ConfidenceName, CrfConfig, InferenceConfig
from wsss_pipeline.data.masks import MaskSource, PseudoMask
from wsss_pipeline.errors import CheckpointError, ImageError, MaskError
from wsss_pipeline.segmentation import inference
from wsss_pipeline.segmentation.checkpoint import save_network
from wsss_pipeline.segmentation.inference import NetworkMasks, Segmenter
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig


class ByColour(SegmentationNetwork):
    """Class 1 where red is, pixel by pixel; it counts how often it looks."""

    looks = 0

    def forward(self, images: Tensor) -> Tensor:
        self.looks += 1
        return super().forward(images)

    def logits(self, images: Tensor) -> Tensor:
        red = 10 * (images[:, :1] - images[:, 2:])
        return torch.cat([-red, red], dim=1)

    def encoder(self) -> nn.Module:
        return self


class LeftIsOne(ByColour):
    """Class 1 on the left half of whatever it sees."""

    def logits(self, images: Tensor) -> Tensor:
        columns = torch.linspace(5, -5, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
        return torch.cat([-columns, columns], dim=1)


@pytest.fixture
def image() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[8:32, 10:30] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig(),
        InferenceConfig(scales=(0.5, 1.0, 2.0)),
        InferenceConfig(flip=True),
        InferenceConfig(window=16),
        InferenceConfig(window=100),
        InferenceConfig(scales=(1.0, 1.5), flip=True, window=32, combine="max"),
    ],
)
def test_however_it_is_looked_at_the_image_is_the_same(image: np.ndarray, config: InferenceConfig) -> None:  # type: ignore[type-arg]
    found = Segmenter(ByColour().eval(), ["red"], inference=config)(image)
    assert found.mask.shape == found.confidence.shape == (40, 60)
    assert found.confidence.min() >= 100, "the larger of two probabilities"
    wrong = found.mask != (image[..., 0] > 0)
    assert wrong.mean() < 0.03, "but for the border, which a scale may move by a pixel"


def test_a_flipped_image_is_flipped_back(image: np.ndarray) -> None:  # type: ignore[type-arg]
    network = LeftIsOne().eval()
    once = Segmenter(network, ["left"])(image)
    both = Segmenter(network, ["left"], inference=InferenceConfig(flip=True))(image)
    assert (once.mask[:, :10] == 1).all()
    assert once.confidence[:, :10].min() > 180
    assert np.isin(both.confidence, (99, 100)).all(), "left and right answers meet in the middle, at a half"


def test_the_mean_is_of_probabilities_and_the_maximum_of_logits(image: np.ndarray) -> None:  # type: ignore[type-arg]
    network = LeftIsOne().eval()
    columns = torch.linspace(4, 0, 60).expand(1, 1, 40, 60)
    network.logits = lambda images: torch.cat([0 * columns, columns], dim=1)  # type: ignore[method-assign]
    mean = Segmenter(network, ["left"], inference=InferenceConfig(flip=True))(image)
    largest = Segmenter(network, ["left"], inference=InferenceConfig(flip=True, combine="max"))(image)
    between = Segmenter(network, ["left"], inference=InferenceConfig(flip=True, combine="logits"))(image)
    at_left = torch.sigmoid(torch.tensor([4.0, 0.0]))
    assert mean.mask[0, 0] == largest.mask[0, 0] == largest.mask[0, -1] == 1
    assert mean.confidence[0, 0] == int(200 * at_left.mean())
    assert between.confidence[0, 0] == int(200 * torch.sigmoid(torch.tensor(2.0))), "or that of logits"
    assert largest.confidence[0, 0] == largest.confidence[0, -1] == int(200 * at_left[0])


def test_the_chosen_confidence_is_that_of_the_most_refined_mask_alone(image: np.ndarray) -> None:  # type: ignore[type-arg]
    def variants(confidence: ConfidenceName) -> dict[str, PseudoMask]:
        flip, network = InferenceConfig(flip=True), LeftIsOne().eval()
        return Segmenter(network, ["left"], inference=flip, confidence=confidence).variants(image)

    plain, margin = variants("posterior"), variants("margin")
    assert list(plain) == list(margin) == ["raw", "scales 1 flip"]
    assert not np.array_equal(plain["raw"].confidence, plain["scales 1 flip"].confidence)
    assert np.array_equal(plain["raw"].confidence, margin["raw"].confidence)


def test_settings_have_names_and_ranges() -> None:
    assert InferenceConfig().name == InferenceConfig(window=32).name == "raw"
    assert InferenceConfig(flip=True).name == "scales 1 flip"
    assert InferenceConfig(scales=(0.5, 1.25)).name == "scales 0.5,1.25"
    assert InferenceConfig(scales=[1, 2]).scales == (1.0, 2.0)  # type: ignore[arg-type]
    for values in (
        {"scales": ()},
        {"scales": (0.01,)},
        {"scales": (1, 21)},
        {"window": 8},
        {"combine": "sum"},
    ):
        with pytest.raises(ValidationError):
            InferenceConfig.model_validate(values)


@pytest.mark.parametrize(
    ("config", "passes", "with_raw"),
    [
        (InferenceConfig(), 1, 1),
        (InferenceConfig(scales=(0.5, 1.0), flip=True), 4, 4),
        (InferenceConfig(scales=(0.5, 2.0)), 2, 3),
        (InferenceConfig(scales=(1.0, 1.0)), 1, 1),
    ],
)
def test_every_look_at_an_image_is_taken_once(
    image: np.ndarray, config: InferenceConfig, passes: int, with_raw: int
) -> None:  # type: ignore[type-arg]
    network = ByColour().eval()
    segmenter = Segmenter(network, ["red"], inference=config, crf=CrfConfig(iterations=1))
    segmenter(image)
    assert network.looks == passes, "the most refined mask needs no plain pass"
    network.looks = 0
    variants = segmenter.variants(image)
    assert network.looks == with_raw
    assert list(variants) == list(dict.fromkeys(["raw", config.name, "+CRF"]))


@pytest.mark.parametrize(
    "size", [(1, 1), (900, 1400), (4000, 3000), (11585, 11585), (1, 120_000), (120_000, 1)]
)
@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig(),
        InferenceConfig(scales=(0.5, 1.0, 1.5, 2.0), flip=True),
        InferenceConfig(scales=(20.0,)),
        InferenceConfig(window=512),
    ],
    ids=lambda config: config.name,
)
def test_each_pixel_of_a_large_image_is_decided_on_once_and_far_from_where_its_tile_ends(
    size: tuple[int, int], config: InferenceConfig
) -> None:
    network = build_network(NetworkConfig(name="segformer", encoder="tiny", weights="none"), 21).eval()
    image = np.broadcast_to(np.uint8(0), (*size, 3))
    tiles = list(inference._tiles(network, image, config, 21, inference.MOST_BYTES, raw=True))
    shapes = {tuple(part.stop - part.start for part in tile.seen) for tile in tiles}
    assert all(
        inference._bytes_needed(network, shape, size, 21, config, raw=True) <= inference.MOST_BYTES
        for shape in shapes
    )
    if size in ((1, 1), (900, 1400)) and max(config.scales) == 1:
        assert tiles == [inference._Tile(*[tuple(slice(0, side) for side in size)] * 3)], "as it is"
    decided = np.zeros(size, np.uint8)
    for tile in tiles:
        decided[tile.kept] += 1
        for seen, kept, inner, side in zip(tile.seen, tile.kept, tile.inner, size, strict=True):
            assert (kept.start, kept.stop) == (seen.start + inner.start, seen.start + inner.stop)
            least = (seen.stop - seen.start) // (2 * inference.MARGIN_PART)
            assert seen.start == 0 or kept.start - seen.start >= least
            assert seen.stop == side or seen.stop - kept.stop >= least
    assert (decided == 1).all()


@pytest.mark.parametrize("size", [(200, 300), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("config", [InferenceConfig(flip=True), InferenceConfig(window=32)])
def test_tiles_give_what_the_whole_image_gives(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], config: InferenceConfig
) -> None:
    """By a network that looks at each pixel alone."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    network = ByColour().eval()
    segmenter = Segmenter(network, ["red"], inference=config)
    expected = segmenter(image)
    network.looks = 0
    monkeypatch.setattr(inference, "MOST_BYTES", 4_000_000)
    found = segmenter(image)
    assert network.looks > 2
    assert np.array_equal(found.mask, expected.mask)
    assert np.abs(found.confidence.astype(int) - expected.confidence).max() <= 1, "softmax rounds as it lies"


def test_where_memory_runs_out_smaller_tiles_are_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    network = ByColour().eval()
    segmenter = Segmenter(network, ["red"])
    expected = segmenter(image)
    logits, sizes = network.logits, []

    def limited(images: Tensor) -> Tensor:
        sizes.append(images.shape[-2:].numel())
        if sizes[-1] > limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"
            )
        return logits(images)

    monkeypatch.setattr(network, "logits", limited)
    monkeypatch.setattr(inference, "MOST_BYTES", 1.2 * 1700 * 200 * 300)
    limit = 15_000
    with caplog.at_level("INFO"):
        found = segmenter(image)
        assert np.array_equal(found.mask, expected.mask)
        assert sizes[0] == 60_000, "the whole image first"
        assert sizes[1] <= limit
        segmenter(image)
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert len(said) == 1, "once"
    assert "such as one of 300x200, are looked at in tiles that overlap" in said[0]
    limit = 0
    sizes.clear()
    with pytest.raises(RuntimeError, match="can't allocate"):
        segmenter(image)
    assert len(sizes) == 3


def test_a_small_machine_has_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inference.most_bytes() == inference.MOST_BYTES or inference.memory_of_this_machine() < 6e9
    monkeypatch.setattr(inference, "memory_of_this_machine", lambda: 2**30)
    assert inference.most_bytes() == 2**29


def test_the_crf_refines_tile_by_tile(monkeypatch: pytest.MonkeyPatch, image: np.ndarray) -> None:  # type: ignore[type-arg]
    image = np.tile(image, (4, 4, 1))
    segmenter = Segmenter(ByColour().eval(), ["red"], crf=CrfConfig())
    expected = segmenter(image)
    monkeypatch.setattr(inference, "MOST_BYTES", 20_000_000)
    found = segmenter(image)
    assert (found.mask != expected.mask).mean() < 0.01
    assert 0.05 < found.mask.mean() < 0.5


def test_variants_are_what_the_single_ways_give(image: np.ndarray) -> None:  # type: ignore[type-arg]
    config, crf = InferenceConfig(scales=(0.5, 1.0), flip=True), CrfConfig()
    network = LeftIsOne().eval()
    variants = Segmenter(network, ["left"], inference=config, crf=crf).variants(image)
    single = {
        "raw": Segmenter(network, ["left"]),
        config.name: Segmenter(network, ["left"], inference=config),
        "+CRF": Segmenter(network, ["left"], inference=config, crf=crf),
    }
    for name, segmenter in single.items():
        expected = segmenter(image)
        assert np.array_equal(variants[name].mask, expected.mask), name
        assert np.array_equal(variants[name].confidence, expected.confidence), name
    probabilities = network.logits(torch.zeros(1, 3, *image.shape[:2]))[0].softmax(dim=0).numpy()
    assert np.array_equal(variants["raw"].mask, probabilities.argmax(axis=0))
    off = probabilities.max(axis=0) * 200 - variants["raw"].confidence
    assert off.min() > -1e-3, "rounded down"
    assert off.max() < 1
    assert not np.array_equal(variants["raw"].confidence, variants["+CRF"].confidence)


def test_a_mask_of_an_array_a_pillow_image_and_a_path_is_the_same(image: np.ndarray, tmp_path: Path) -> None:  # type: ignore[type-arg]
    segmenter = Segmenter(ByColour().eval(), ["red"])
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = segmenter(image)
    assert expected.mask[20, 20] == 1
    assert expected.mask[0, 0] == 0
    for given in (Image.fromarray(image), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(segmenter(given).mask, expected.mask)
    with pytest.raises(ImageError, match="uint8 array"):
        segmenter(image.astype(np.float32))


def test_a_network_is_a_source_of_masks(image: np.ndarray, tmp_path: Path) -> None:  # type: ignore[type-arg]
    Image.fromarray(image).save(tmp_path / "image.png")
    images = {"a": tmp_path / "image.png", "gone": tmp_path / "gone.png"}
    segmenter = Segmenter(ByColour().eval(), ["red"], description="network run/best")
    masks: MaskSource = NetworkMasks(segmenter, images)
    assert (masks.class_names, masks.description) == (("red",), "network run/best")
    assert "a" in masks
    assert "b" not in masks
    assert np.array_equal(masks["a"].mask, segmenter(image).mask)
    with pytest.raises(MaskError, match="no image 'b'"):
        masks["b"]
    with pytest.raises(ImageError, match="gone"):
        masks["gone"]


def test_an_answer_that_is_no_number_is_no_mask(image: np.ndarray) -> None:  # type: ignore[type-arg]
    network = ByColour().eval()
    network.logits = lambda images: torch.full((1, 2, *images.shape[-2:]), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(MaskError):
        Segmenter(network, ["red"])(image)


def test_a_checkpoint_is_loaded_and_its_identity_follows_what_determines_the_masks(
    image: np.ndarray, tmp_path: Path
) -> None:  # type: ignore[type-arg]
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    torch.manual_seed(0)
    network = build_network(config, 3).eval()
    save_network(network, tmp_path / "run" / "best", config, ["cat", "dog"])
    segmenter = Segmenter.load(tmp_path / "run", device="cpu")
    assert segmenter.class_names == ("cat", "dog")
    assert segmenter.description == f"network {tmp_path / 'run' / 'best'}"
    direct = Segmenter(network, ["cat", "dog"])
    assert np.array_equal(segmenter(image).confidence, direct(image).confidence)
    assert segmenter.identity == direct.identity
    others = [
        Segmenter(network, ["cat", "cow"]),
        Segmenter(network, ["cat", "dog"], inference=InferenceConfig(flip=True)),
        Segmenter(network, ["cat", "dog"], crf=CrfConfig()),
        Segmenter(build_network(config, 3), ["cat", "dog"]),
    ]
    assert len({direct.identity, *(other.identity for other in others)}) == 5
    assert Segmenter(network, ["cat", "dog"], crf=CrfConfig(backend="none")).identity == direct.identity
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Segmenter.load(tmp_path / "nowhere")
