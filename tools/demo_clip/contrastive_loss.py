"""CLIP's contrastive loss, for images and for patches, in a world where several texts may be true."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 20.0  # of the softmax that looks for a text among patches; cosines lie in [-1, 1]


def contrastive_loss(similarity: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy between images and texts (Radford et al., "CLIP", 2021, figure 3).

    In a small world the same thing is said of many images, so the target is even over all true pairs
    instead of over the diagonal (Yang et al., "Unified Contrastive Learning in Image-Text-Label Space",
    CVPR 2022).

    Args:
        similarity: cosines (B, T), images by texts.
        truth: float (B, T), 1 where the text is true of the image. Every text is true of one at least;
            an image of which none is true counts only among the texts' wrong answers.
        scale: factor on the cosines.
    """
    logits = scale * similarity
    told = truth.sum(dim=1) > 0
    by_image = F.cross_entropy(logits[told], truth[told] / truth[told].sum(dim=1, keepdim=True))
    by_text = F.cross_entropy(logits.T, truth.T / truth.T.sum(dim=1, keepdim=True))
    return (by_image + by_text) / 2


def patch_similarity(patches: Tensor, texts: Tensor) -> Tensor:
    """Similarity (B, T) of each image's patches (B, N, P) with each text (T, P), all unit vectors.

    The mean cosine over the patches, weighted by a softmax of itself: a text is compared with the place
    where it is seen (as in FILIP, Yao et al., ICLR 2022, with a soft maximum). With a plain mean the ground
    learns to speak for whatever usually stands on it, since the ground has most of the patches.
    """
    cosines = torch.einsum("bnp,tp->btn", patches, texts)
    return (torch.softmax(SHARPNESS * cosines, dim=-1) * cosines).sum(dim=-1)
