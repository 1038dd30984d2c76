"""Patch-text CAMs against the form with one array for each token, text and channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.cam.patch_text import patch_text_cams


def by_definition(tokens: Tensor, texts: Tensor) -> Tensor:
    """(T, hw) of one image: the products of every channel are kept, weighted and centred, then summed."""
    features = tokens / tokens.norm(dim=0)
    products = features[:, None] * texts[None]  # (N, T, P)
    likeness = (2 * (features[0] * texts).sum(dim=-1)).softmax(dim=0)
    products = products * (likeness / likeness.mean())[None, :, None]
    products = products - products.mean(dim=1, keepdim=True)
    maps = products.sum(dim=-1)
    maps = (maps - maps.amin(dim=0)) / (maps.amax(dim=0) - maps.amin(dim=0))
    return maps[1:].T


def test_is_what_the_definition_says_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 13, 8, generator=generator)
    texts = F.normalize(torch.randn(5, 8, generator=generator), dim=1)
    found = patch_text_cams(tokens, texts)
    assert found.shape == (2, 5, 12)
    for image, maps in zip(tokens, found, strict=True):
        torch.testing.assert_close(maps, by_definition(image, texts), rtol=1e-4, atol=1e-5)
    assert found.amin() >= 0
    assert found.amax() <= 1


def test_the_largest_may_be_the_class_tokens() -> None:
    tokens = torch.zeros(1, 5, 3)
    tokens[0, 0, 0], tokens[0, 1:, 0] = 4.0, torch.tensor([0.0, 1.0, 2.0, 3.0])
    maps = patch_text_cams(tokens, torch.eye(3))
    assert 0.7 < float(maps[0, 0].max()) < 0.8


def test_a_map_without_a_difference_is_nothing() -> None:
    assert torch.equal(patch_text_cams(torch.zeros(1, 5, 3), torch.eye(3)), torch.zeros(1, 3, 4))
