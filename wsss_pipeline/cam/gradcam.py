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

from wsss_pipeline.clip.trunk import Features


def softmax_gradcam(
    features: Features, texts: Sequence[Tensor], num_classes: Sequence[int], logit_scale: float
) -> list[Tensor]:
    """Raw class activation maps, before ReLU and normalisation.

    Args:
        features: features of B images.
        texts: per image, float32 (K+G, P) unit rows: its K present classes, then G background words.
        num_classes: per image, its K; 0 gives no map.
        logit_scale: factor on the cosine (CLIP: about 100).

    Returns:
        Per image, float32 (K, h, w).
    """
    maps = []
    for last, rows, count in zip(features.last, texts, num_classes, strict=True):
        if not count:
            maps.append(last.tokens.new_zeros(0, *features.grid))
            continue
        gradients = probability_gradients(last.pooled, rows, count, logit_scale)
        weights = last.mean_token_gradients(gradients)
        maps.append((weights @ last.tokens[1:].T).view(count, *features.grid))
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
