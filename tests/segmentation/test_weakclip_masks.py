"""WeakCLIP's masks: views in a frame, windows, and a CRF of the classes that win, beside the published code's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.weakclip_golden import GOLDEN, SMALL_NAMES, published_network
from wsss_pipeline.config import CrfConfig, InferenceConfig, RelabelConfig, resolve
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import fitted_size
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine import DenseCrf
from wsss_pipeline.segmentation import inference
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.stages.relabel import PRESETS, relabel_config

LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden data of WeakCLIP"
)


class Remembering:
    """A refiner that is a CRF and keeps the scores it was given."""

    def __init__(self, config: CrfConfig) -> None:
        self.crf, self.scores = DenseCrf(config), torch.zeros(0)

    description = "CRF"

    def determinants(self) -> dict[str, Any]:
        return {}

    def __call__(self, images: Any, scores: Any, regions: Any = ()) -> list[Tensor]:
        (self.scores,) = scores
        return self.crf(images, scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("large", "picture", "step"),
    [
        (None, "tiny_odd", 1),
        pytest.param(LARGE, "tiny_odd", 1, marks=needs_large),
        pytest.param(LARGE, "chelsea", 4, marks=needs_large),
    ],
    ids=["small", "large", "chelsea"],
)
def test_masks_of_twelve_views_are_the_published_ones(large: Path | None, picture: str, step: int) -> None:
    """The golden file has the mean of every ``step``-th row and column. Of its 135,300 pixels chelsea has a few in
    which two labels are as probable to seven digits."""
    network, config = published_network(large, edges="cut"), relabel_config("weakclip/voc12")
    folder = GOLDEN / "images" if large is None else large / "clip_es" / "images"
    file = GOLDEN / "weakclip" / "golden.npz"
    golden = np.load(file if large is None else large / "weakclip" / f"predict_{picture}.npz")
    prefix, crf = ("", "crf_") if large else ("predict/", "crf/")
    refiner = Remembering(config.crf)
    names = SMALL_NAMES if large is None else [f"class {value}" for value in range(1, 21)]
    segmenter = Segmenter(network, names, "cpu", config.inference, refiner=refiner)
    image = read_image(folder / f"{picture}.png")
    found = segmenter(image)
    keys, scores = golden[f"{prefix}keys"], refiner.scores
    assert np.abs(scores.numpy()[:, ::step, ::step] - golden[f"{prefix}mean"][keys]).max() < 1e-4
    several = DenseCrf(relabel_config("weakclip/coco14").crf)([image], [scores])[0].argmax(dim=0).numpy()
    for mask, data in ((found.mask, "voc12"), (keys[several], "coco")):
        assert (mask != golden[f"{crf}{data}_mask"]).sum() <= (5 if step > 1 else 0), data


class Brightness(SegmentationNetwork):
    """Two logits for each pixel, its level and what is left; notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.shown = nn.Identity(), list[tuple[int, ...]]()

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(tuple(images.shape[-2:]))
        return torch.cat([images[:, :1], -images[:, :1]], dim=1)


def look(image: Any, **settings: Any) -> tuple[Any, Brightness]:
    network = Brightness()
    config = InferenceConfig.model_validate(settings)
    return Segmenter(network, ("thing",), "cpu", config)(image), network


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_views_have_the_published_sizes_and_windows() -> None:
    golden = np.load(GOLDEN / "weakclip" / "golden.npz")
    inference_config = relabel_config("weakclip/voc12").inference
    _, network = look(noise(49, 67), **inference_config.model_dump())
    windows = golden["predict/windows"].tolist()
    expected = [
        (min(height, 512), min(width, 512))
        for (height, width), count in zip(golden["predict/sizes"].tolist(), windows, strict=True)
        for _ in range(count)
    ]
    assert network.shown == expected


def test_windows_as_many_as_the_stride_needs_give_the_whole_picture() -> None:
    image = noise(40, 100)
    (half, halves), (found, network) = look(image, window=40), look(image, window=40, window_stride=30)
    whole, _ = look(image)
    assert (len(halves.shown), len(network.shown)) == (4, 3)
    assert np.array_equal(whole.mask, found.mask)
    assert np.array_equal(whole.mask, half.mask)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_windows_together_are_windows_alone(together: int) -> None:
    """Of several pictures too, whatever number of them the network sees at a time."""
    network, pixels = Brightness(), torch.randn(2, 3, 50, 90)
    found = inference._in_windows(network, pixels, 40, 30, together)
    assert torch.allclose(found, torch.cat([pixels[:, :1], -pixels[:, :1]], dim=1), atol=1e-6)
    assert len(network.shown) == -(-2 * 2 * 3 // together)


def test_in_a_frame_small_and_large_pictures_are_looked_at_at_one_size() -> None:
    for side in (20, 90):
        _, network = look(noise(side, 2 * side), short_side=40, long_side=100, scales=(1.0, 0.5))
        assert network.shown == [(40, 80), (20, 40)]
    _, network = look(noise(20, 100), short_side=40, long_side=100)
    assert network.shown == [fitted_size((20, 100), 1.0, 40, 100)] == [(20, 100)]


def test_a_tile_of_a_large_picture_has_the_scale_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(6, 30).repeat(10, axis=0).repeat(10, axis=1)
    expected, _ = look(image, short_side=60, long_side=150)
    monkeypatch.setattr(inference, "MOST_BYTES", 4_000_000)
    found, network = look(image, short_side=60, long_side=150)
    assert len(network.shown) > 2
    assert {height for height, _ in network.shown[1:]} == {30}
    assert (found.mask == expected.mask).mean() > 0.95


def test_classes_that_win_nowhere_are_no_part_of_the_crf() -> None:
    scores = torch.tensor([0.2, 0.5, 0.3])[:, None, None].expand(3, 8, 8).clone()
    scores[:, :4] = torch.tensor([0.6, 0.3, 0.1])[:, None, None]

    class Fixed(SegmentationNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return scores.log()[None]

    given = []
    for winners_only in (False, True):
        refiner = Remembering(CrfConfig(iterations=0))
        config = InferenceConfig(winners_only=winners_only)
        found = Segmenter(Fixed(), ("a", "b"), "cpu", config, refiner=refiner)(noise(8, 8))
        given.append(len(refiner.scores))
        assert found.mask.tolist() == [[0] * 8] * 4 + [[1] * 8] * 4
    assert given == [3, 2]


def test_what_isnt_whole_patches_is_stretched_over_or_padded() -> None:
    images = torch.randn(1, 3, 70, 50, generator=torch.Generator().manual_seed(0))
    cut, padded = published_network(edges="cut"), published_network()
    with torch.no_grad():
        whole = cut.decode(images[..., :64, :48])["logits"]
        stretched = nn.functional.interpolate(whole, (70, 50), mode="bilinear", align_corners=False)
        assert torch.equal(cut(images), stretched)
        assert padded(images).shape == stretched.shape
        assert not torch.allclose(padded(images), stretched, atol=0.01)
        assert cut(images[..., :5, :]).shape == (1, 5, 5, 50)
        assert torch.equal(cut(images[..., :64, :48]), padded(images[..., :64, :48]))


def test_scores_may_be_whole_and_the_picture_rgb() -> None:
    image, scores = noise(12, 16), torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(0))
    plain = CrfConfig()
    found = [
        DenseCrf(plain.model_copy(update=changes))([image], [scores])[0]
        for changes in ({}, {"half_scores": False}, {"image": "rgb"})
    ]
    swapped = np.ascontiguousarray(image[..., ::-1])
    assert torch.equal(found[2], DenseCrf(plain)([swapped], [scores])[0])
    assert not torch.equal(found[0], found[1])
    # whatever single precision keeps, half precision rounds away
    rounded = scores.half().float()
    kept = DenseCrf(plain.model_copy(update={"half_scores": False}))
    assert torch.allclose(kept([image], [rounded])[0], kept([image], [scores])[0], atol=1e-2)


def test_what_was_made_before_keeps_its_fingerprint() -> None:
    """The settings that came with WeakCLIP are part of it where they do something."""
    assert InferenceConfig(scales=(0.5, 1.0)).determinants() == {
        "scales": [0.5, 1.0],
        "flip": False,
        "window": None,
        "combine": "mean",
    }
    assert "half_scores" not in DenseCrf(CrfConfig()).determinants()["crf"]
    chosen = relabel_config("weakclip/voc12")
    assert chosen.inference.determinants() == chosen.inference.model_dump(
        mode="json", exclude={"pixel_range"}
    )
    assert DenseCrf(chosen.crf).determinants()["crf"]["half_scores"] is False


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"inference.window_stride": 30}, "inference.window_stride 30 goes with a window"),
        ({"inference.window": 20, "inference.window_stride": 30}, "goes with a window of at least that side"),
        ({"inference.short_side": 3000}, "short_side is larger than inference.long_side"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(RelabelConfig, [("test", layer)])


def test_presets_can_be_had_and_others_are_refused() -> None:
    for name in PRESETS:
        assert relabel_config(name, [("flag", {"inference.flip": False})]).inference.flip is False
    assert relabel_config(None) == RelabelConfig()
    with pytest.raises(ConfigError, match="--preset voc: unknown; known are weakclip/voc12, weakclip/coco14"):
        relabel_config("voc")
