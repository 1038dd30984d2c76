"""Softmax-GradCAM: class activation maps from CLIP's image-text scores.

Source: CLIP-ES (arXiv 2212.09506), section 3.2: Grad-CAM (Selvaraju et al., ICCV 2017) at the input of
the last self-attention, with the softmax over present classes and background words as the score, so that
classes compete.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Part of the method, not a guard against zero: raw maps can be as weak as 1e-12, and the published code
# keeps such a map weak by it.
EPSILON = 1e-7


def softmax_gradcam(
    tokens: Tensor,
    pooled: Tensor,
    grid: tuple[int, int],
    texts: Sequence[Tensor],
    num_classes: Sequence[int],
    logit_scale: float,
) -> list[Tensor]:
    """Raw class activation maps, before ReLU and normalisation.

    Args:
        tokens: float32 (B, 1+hw, D), class token first; requires grad.
        pooled: float32 (B, P), image embeddings as a differentiable function of ``tokens``.
        grid: (h, w).
        texts: per image, float32 (K+G, P) unit rows: its K present classes, then G background words.
        num_classes: per image, its K (at least 1).
        logit_scale: factor on the cosine (CLIP: about 100).

    Returns:
        Per image, float32 (K, h, w).
    """
    probabilities = [
        torch.softmax(logit_scale * F.normalize(embedding, dim=0) @ F.normalize(rows, dim=1).T, dim=0)
        for embedding, rows in zip(pooled, texts, strict=True)
    ]
    rounds = max(num_classes)
    maps: list[list[Tensor]] = [[] for _ in texts]
    for position in range(rounds):
        members = [image for image, count in enumerate(num_classes) if position < count]
        # images don't touch each other, so the gradient of the sum holds each image's own
        target = torch.stack([probabilities[image][position] for image in members]).sum()
        (gradient,) = torch.autograd.grad(target, tokens, retain_graph=position < rounds - 1)
        for image in members:
            weights = gradient[image, 1:].mean(dim=0)
            maps[image].append((tokens[image, 1:].detach() @ weights).view(grid))
    return [torch.stack(found) for found in maps]


def normalise_cams(raw: Tensor) -> Tensor:
    """Raw maps (K, h, w) to [0, 1]: twice ReLU and min-max, as the published code does.

    A map without a positive cell stays 0; a very weak one stays below 1 (see ``EPSILON``).
    """
    return min_max(F.relu(min_max(F.relu(raw))))


def min_max(maps: Tensor) -> Tensor:
    """Each map of (K, h, w) shifted to minimum 0 and divided by its maximum plus ``EPSILON``."""
    shifted = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return shifted / (EPSILON + shifted.amax(dim=(-2, -1), keepdim=True))
