"""Inference: scales, flip and windows, with networks whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsss_pipeline.segmentation.inference import InferenceConfig, predict_probabilities
from wsss_pipeline.segmentation.networks import SegmentationNetwork


class ByColour(SegmentationNetwork):
    """Class 1 where red is, pixel by pixel."""

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
def picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 2] = 255
    image[8:32, 10:30] = (255, 0, 0)
    return image


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
def test_however_it_is_looked_at_the_picture_is_the_same(
    picture: np.ndarray, config: InferenceConfig
) -> None:  # type: ignore[type-arg]
    found = predict_probabilities(ByColour().eval(), picture, config)
    assert found.shape == (2, 40, 60)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(axis=0), 1, atol=1e-5)
    wrong = found.argmax(axis=0) != (picture[..., 0] > 0)
    assert wrong.mean() < 0.03, "but for the border, which a scale may move by a pixel"


def test_a_flipped_picture_is_flipped_back(picture: np.ndarray) -> None:  # type: ignore[type-arg]
    once = predict_probabilities(LeftIsOne().eval(), picture, InferenceConfig())
    both = predict_probabilities(LeftIsOne().eval(), picture, InferenceConfig(flip=True))
    assert once[1, :, :10].min() > 0.9
    assert np.allclose(both, both[..., ::-1], atol=1e-5), "left and right answers meet in the middle"
    assert np.allclose(both, 0.5, atol=1e-5)


def test_maximum_is_of_logits(picture: np.ndarray) -> None:  # type: ignore[type-arg]
    found = predict_probabilities(LeftIsOne().eval(), picture, InferenceConfig(flip=True, combine="max"))
    assert np.allclose(found, 0.5, atol=1e-5)
    assert InferenceConfig().is_single
    assert not InferenceConfig(flip=True).is_single
