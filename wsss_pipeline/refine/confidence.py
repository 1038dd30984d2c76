"""How sure a label is: what the refiner says, or what the scores say that it began with.

A CRF is sure of whatever it decides: nearly all of its posteriors lie above the last half percent that a mask set can
tell apart. The scores before it still know where they were torn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import ConfidenceName, ParConfig
from wsss_pipeline.refine.dense_crf import LEAST_SCORE
from wsss_pipeline.refine.par import Par

# Chosen once, on drawn scenes (``benchmarks/confidence.py``, seeds 901 to 903): among 1, 1.25, 1.5, 1.75 and 2 the
# confidence comes nearest to the share of right pixels with the largest, tells errors best with the least.
SHARPNESS = 1.4


def label_confidences(
    kind: ConfidenceName, images: Sequence[NDArray[np.uint8]], scores: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The confidence that each label l would have as a pixel's label.

    With s the scores divided by their sum: ``margin`` is (1 + s_l - s_o) / 2, where o is the best of the other
    labels, so that a label against the scores has less than 0.5. ``product`` is a product of experts (Hinton, Neural
    Computation 2002), of what the scores say at the pixel and of what they say around it, p, the scores after PAR
    with its own constants: (s_l p_l)^1.4, divided by the sum of that over the labels.

    Args:
        kind: choice among them.
        images: uint8 (H, W, 3) RGB, as the refiner saw them.
        scores: per image float (1+K, H, W) in [0, 1], background first, as the refiner got them.

    Returns:
        Per image float32 (1+K, H, W) in [0, 1], or None for ``posterior``, which is the refiner's own.
    """
    if kind == "posterior":
        return [None] * len(scores)
    shares = [(score.float() / score.float().sum(dim=0)).clamp(min=LEAST_SCORE) for score in scores]
    if kind == "margin":
        return [_margins(share) for share in shares]
    around = Par(ParConfig())(images, scores)
    products = [
        (share * other.clamp(min=LEAST_SCORE)) ** SHARPNESS
        for share, other in zip(shares, around, strict=True)
    ]
    return [product / product.sum(dim=0) for product in products]


def _margins(shares: Tensor) -> Tensor:
    """(1 + s_l - s_o) / 2 for each label, (1+K, H, W), K at least 1."""
    best = shares.topk(2, dim=0).values
    others = torch.where(shares == best[0], best[1], best[0])
    return (1 + shares - others) / 2
