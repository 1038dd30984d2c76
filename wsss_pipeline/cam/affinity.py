"""Class-aware attention-based affinity (CAA): CAMs spread along CLIP's own attention.

Source: CLIP-ES (arXiv 2212.09506), section 3.4, as its published code computes it: three Sinkhorn rounds,
symmetrised, squared, and the class's box mask on the source cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_pipeline.cam.boxes import box_masks


def refine_cams(
    cams: Tensor, attention: Tensor, threshold: float, iterations: int = 2, rounds: int = 3
) -> Tensor:
    """CAMs after affinity: ``S^t (box * cam)`` with S the symmetrised Sinkhorn matrix.

    S is never built, nor its powers: two scaling vectors stand for it, and all classes go through
    together, so the cost is a few products of the attention with K columns.

    Args:
        cams: float32 (K, h, w) in [0, 1].
        attention: float32 (hw, hw), at least 0.
        threshold: of the box mask, see ``box_masks``.
        iterations: t, how often the CAM is spread; at least 1.
        rounds: of Sinkhorn normalisation.

    Returns:
        float32 (K, h, w), at least 0, not normalised; all 0 where the box mask is empty.
    """
    rows, columns = sinkhorn_scaling(attention, rounds)

    def symmetric(vectors: Tensor) -> Tensor:
        forward = rows[:, None] * (attention @ (columns[:, None] * vectors))
        backward = columns[:, None] * (attention.T @ (rows[:, None] * vectors))
        return (forward + backward) / 2

    spread = (cams * box_masks(cams, threshold)).flatten(1).T
    for _ in range(iterations):
        spread = symmetric(spread)
    return spread.T.reshape(cams.shape)


def sinkhorn_scaling(attention: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Vectors r, c such that ``diag(r) A diag(c)`` is A after ``rounds`` Sinkhorn rounds.

    A round divides the columns by their sums, then the rows by theirs.

    Args:
        attention: float32 (n, n), at least 0.
        rounds: 0 gives ones.

    Returns:
        float32 (n,) twice.
    """
    rows = attention.new_ones(len(attention))
    columns = attention.new_ones(len(attention))
    # a cell that nobody attends to has a column of zeros: it stays zero instead of turning into NaN
    smallest = torch.finfo(attention.dtype).tiny
    for _ in range(rounds):
        columns = 1 / (rows @ attention).clamp_min(smallest)
        rows = 1 / (attention @ columns).clamp_min(smallest)
    return rows, columns
