"""Softmax-GradCAM: class activation maps from CLIP's image-text scores.

Source: CLIP-ES (arXiv 2212.09506), section 3.2: Grad-CAM (Selvaraju et al., ICCV 2017) at the input of
the last self-attention, with the softmax over present classes and background words as the score, so that
classes compete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    mean_token_gradients: Callable[[int, Tensor], Tensor],
) -> list[Tensor]:
    """Raw class activation maps, before ReLU and normalisation.

    Args:
        tokens: float32 (B, 1+hw, D), class token first.
        pooled: float32 (B, P), image embeddings.
        grid: (h, w).
        texts: per image, float32 (K+G, P) unit rows: its K present classes, then G background words.
        num_classes: per image, its K (at least 1).
        logit_scale: factor on the cosine (CLIP: about 100).
        mean_token_gradients: of image i and gradients (K, P) at its row of ``pooled``, the mean over its
            patches of the gradients (K, D) at its ``tokens``.

    Returns:
        Per image, float32 (K, h, w).
    """
    maps = []
    for image, (rows, count) in enumerate(zip(texts, num_classes, strict=True)):
        gradients = probability_gradients(pooled[image], rows, count, logit_scale)
        weights = mean_token_gradients(image, gradients)
        maps.append((weights @ tokens[image, 1:].T).view(count, *grid))
    return maps


def probability_gradients(embedding: Tensor, texts: Tensor, num_classes: int, logit_scale: float) -> Tensor:
    """Gradient of each class's softmax probability at an image embedding.

    Args:
        embedding: float (P,), not normalised.
        texts: float (K+G, P), the rows that compete.
        num_classes: K, the first rows.
        logit_scale: factor on the cosine.

    Returns:
        float (K, P).
    """
    unit, rows = F.normalize(embedding, dim=0), F.normalize(texts, dim=1)
    probabilities = torch.softmax(logit_scale * rows @ unit, dim=0)
    at_logits = torch.diag(probabilities)[:num_classes] - probabilities[:num_classes, None] * probabilities
    at_unit = logit_scale * at_logits @ rows
    tangent = torch.addcmul(at_unit, (at_unit @ unit)[:, None], unit, value=-1)
    gradients: Tensor = tangent / embedding.norm()
    return gradients


def normalise_cams(raw: Tensor) -> Tensor:
    """Raw maps (K, h, w) to [0, 1]: twice ReLU and min-max, as the published code does.

    A map without a positive cell stays 0; a very weak one stays below 1 (see ``EPSILON``).
    """
    return min_max(F.relu(min_max(F.relu(raw))))


def min_max(maps: Tensor) -> Tensor:
    """Each map of (K, h, w) shifted to minimum 0 and divided by its maximum plus ``EPSILON``."""
    shifted = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return shifted / (EPSILON + shifted.amax(dim=(-2, -1), keepdim=True))
