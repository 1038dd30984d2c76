"""Softmax-GradCAM: class activation maps from CLIP's image-text scores.

Source: CLIP-ES (arXiv 2212.09506), section 3.2: Grad-CAM (Selvaraju et al., ICCV 2017) at the input of
the last self-attention, with the softmax over present classes and background words as the score, so that
classes compete. With an epsilon in the softmax, FMA-WSSS (Yang and Gong, WACV 2024), as its published code has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.clip.trunk import Features


def softmax_gradcam(
    features: Features,
    texts: Sequence[Tensor],
    num_classes: Sequence[int],
    logit_scale: float,
    *,
    everything: Tensor | None = None,
    epsilon: float = 1e-5,
) -> list[Tensor]:
    """Raw class activation maps, before ReLU and normalisation.

    Differentiable in the texts, in the first order: the maps are linear in the gradients of the probabilities, and
    these have a closed form.

    Args:
        features: features of B images.
        texts: per image, float32 (K+G, P) rows: its K present classes, then G background words.
        num_classes: per image, its K; 0 gives no map.
        logit_scale: factor on the cosine (CLIP: about 100).
        everything: float32 (T, P), rows of all classes and background words, for a softmax with an ``epsilon``.
        epsilon: see ``probability_gradients``.

    Returns:
        Per image, float32 (K, h, w).
    """
    maps = []
    for last, rows, count in zip(features.last, texts, num_classes, strict=True):
        if not count:
            maps.append(last.tokens.new_zeros(0, *features.grid))
            continue
        gradients = probability_gradients(
            last.pooled, rows, count, logit_scale, everything=everything, epsilon=epsilon
        )
        weights = last.mean_token_gradients(gradients)
        maps.append((weights @ last.tokens[1:].T).view(count, *features.grid))
    return maps


def probability_gradients(
    embedding: Tensor,
    texts: Tensor,
    num_classes: int,
    logit_scale: float,
    *,
    everything: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Gradient of each class's softmax probability at an image embedding.

    Args:
        embedding: float (P,), not normalised.
        texts: float (K+G, P), the rows that compete.
        num_classes: K, the first rows.
        logit_scale: factor on the cosine.
        everything: float (T, P), all rows, whether they compete or not. The exponentials are then taken relative to
            the largest logit of these, and ``epsilon`` is added to their sum: where a class that isn't there leads,
            the probabilities sum to less than 1 (FMA-WSSS's masked softmax).
        epsilon: number added to the sum.

    Returns:
        float (K, P).
    """
    unit, rows = F.normalize(embedding, dim=0), F.normalize(texts, dim=1)
    logits = logit_scale * rows @ unit
    if everything is not None:
        # the same as one more row that competes: the leading one, its exponential times epsilon
        all_rows = F.normalize(everything, dim=1)
        all_logits = logit_scale * all_rows @ unit
        leading = all_logits.argmax()
        rows = torch.cat([rows, all_rows[leading][None]])
        logits = torch.cat([logits, (all_logits[leading] + math.log(epsilon))[None]])
    probabilities = torch.softmax(logits, dim=0)
    at_logits = torch.diag(probabilities)[:num_classes] - probabilities[:num_classes, None] * probabilities
    at_unit = logit_scale * at_logits @ rows
    tangent = torch.addcmul(at_unit, (at_unit @ unit)[:, None], unit, value=-1)
    gradients: Tensor = tangent / embedding.norm()
    return gradients
