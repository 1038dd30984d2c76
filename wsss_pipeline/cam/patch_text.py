"""Class activation maps out of the likeness of patches and texts, without a gradient.

Source: ExCEL (Yang et al., CVPR 2025), as its published code computes it, which takes the removal of what all classes
have in common from CLIP Surgery (Li et al., arXiv 2304.05653, section 3.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 2.0  # of the softmax that says how much a text has to do with the whole image


def patch_text_cams(tokens: Tensor, texts: Tensor) -> Tensor:
    """Maps of all texts for a batch: likeness, less what all texts share at a place.

    Likeness of token n and text t is S[n, t] = p_n . t, with the tokens' features normalised over the tokens, each
    channel by itself. It is weighted by how much the class token is like the text, w_t = T softmax_t(2 S[0, t]), and
    the mean of all texts is taken away. Then each map is brought to 0..1 over all tokens, the class token too, whose
    value isn't returned: a map's largest value may be under 1.

    Classes that aren't in the image take part, so all texts of the class set belong in.

    Args:
        tokens: float32 (B, 1+hw, P), projected, class token first, not normalised.
        texts: float32 (T, P), unit rows, background words among them.

    Returns:
        float32 (B, T, hw) in 0..1; a map without any difference is 0.
    """
    features = F.normalize(tokens, dim=1)
    likeness = features @ texts.T
    weights = len(texts) * torch.softmax(SHARPNESS * likeness[:, :1], dim=-1)
    maps = likeness * weights
    maps = maps - maps.mean(dim=-1, keepdim=True)
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    spread = torch.where(high > low, high - low, torch.ones_like(high))
    return ((maps - low) / spread)[:, 1:].transpose(1, 2)
