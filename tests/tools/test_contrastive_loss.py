"""The contrastive loss, and how a text is compared with patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tools.demo_clip.contrastive_loss import contrastive_loss, patch_similarity

SCALE = torch.tensor(10.0)


def test_the_loss_is_clips_where_each_text_is_true_of_one_image() -> None:
    cosines = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).tanh()
    pairs = torch.arange(4)
    expected = (F.cross_entropy(10 * cosines, pairs) + F.cross_entropy(10 * cosines.T, pairs)) / 2
    assert torch.allclose(contrastive_loss(cosines, torch.eye(4), SCALE), expected)


def test_a_true_pair_outside_the_diagonal_is_not_pushed_apart() -> None:
    cosines = torch.zeros(3, 3, requires_grad=True)
    truth = torch.eye(3)
    truth[0, 2] = 1
    contrastive_loss(cosines, truth, SCALE).backward()
    assert cosines.grad is not None
    assert cosines.grad[0, 2] < 0 < cosines.grad[0, 1]


def test_an_image_of_which_nothing_is_said_is_a_wrong_answer_and_no_more() -> None:
    cosines = torch.zeros(2, 1, requires_grad=True)
    loss = contrastive_loss(cosines, torch.tensor([[1.0], [0.0]]), SCALE)
    assert torch.allclose(loss, torch.tensor(2.0).log() / 2)
    loss.backward()
    assert cosines.grad is not None
    assert cosines.grad[0, 0] < 0 < cosines.grad[1, 0]


def test_a_text_is_compared_with_the_patch_that_shows_it() -> None:
    text, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    here = torch.stack([other, other, other, text])[None]
    nowhere = other.expand(1, 4, 2)
    assert patch_similarity(here, text[None]).item() == pytest.approx(1, abs=1e-3)
    assert patch_similarity(nowhere, text[None]).item() == pytest.approx(0, abs=1e-3)
