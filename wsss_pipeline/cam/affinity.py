"""Class-aware attention-based affinity (CAA): CAMs spread along CLIP's own attention.

Source: CLIP-ES (arXiv 2212.09506), section 3.4, as its published code computes it: three Sinkhorn rounds,
symmetrised, squared, and the class's box mask on the source cells. With a gate, as WeCLIP (CVPR 2024) and ExCEL
(CVPR 2025) train with.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor


def refine_cams(
    cams: Tensor,
    attention: Tensor,
    threshold: float | None,
    iterations: int = 2,
    rounds: int = 3,
    prior: Tensor | None = None,
) -> Tensor:
    """CAMs after affinity: ``S^t (box * cam)`` with S the symmetrised Sinkhorn matrix.

    S is never built, nor its powers: two scaling vectors stand for it, and all classes go through
    together, so the cost is a few products of the attention with K columns.

    Args:
        cams: float32 (K, h, w) in [0, 1]; of any range without a threshold.
        attention: float32 (hw, hw), at least 0.
        threshold: bound of the box mask, see ``box_masks``; None for no mask.
        iterations: t, how often the CAM is spread; at least 1.
        rounds: number of rounds of Sinkhorn normalisation.
        prior: float32 (K, h, w), at least 0, a factor on each map before it is spread (WeCLIP+: the probability that
            a network gives the class; FMA-WSSS: boxes of other maps than these). The box mask doesn't look at it.

    Returns:
        float32 (K, h, w), at least 0 if the maps are, not normalised; all 0 where the box mask is empty.
    """
    rows, columns = sinkhorn_scaling(attention, rounds)
    rows, columns = rows[:, None], columns[:, None]
    source = cams if threshold is None else cams * box_masks(cams, threshold)
    if prior is not None:
        source = source * prior
    spread = source.flatten(1).T
    for _ in range(iterations):
        forward = rows * (attention @ (columns * spread))
        backward = columns * (attention.T @ (rows * spread))
        spread = (forward + backward) / 2
    return spread.T.reshape(cams.shape)


def gated_attention(attention: Tensor, gate: Tensor) -> Tensor:
    """Mean attention of the layers that look at patches most, times what a decoder finds alike.

    WeCLIP (CVPR 2024) keeps the layers whose difference to the gate is at most the mean. Its published code sums the
    difference with its sign, so that the gate cancels out: a layer is kept where at least as much of its attention as
    in the mean of the layers goes to patches, and the less to the class token.

    Args:
        attention: float32 (L, hw, hw), at least 0, without the class token.
        gate: float32 (hw, hw) in [0, 1].

    Returns:
        float32 (hw, hw).
    """
    # in float64, and with a little to spare: where layers are alike, rounding would choose
    looks = attention.sum(dim=(1, 2), dtype=torch.float64)
    kept = (looks >= looks.mean() * (1 - 1e-9)).to(attention.dtype)
    return torch.einsum("l,lij->ij", kept, attention) / (kept.sum() + 1e-5) * gate


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


def box_masks(cams: Tensor, threshold: float) -> Tensor:
    """Per class, the union of the bounding boxes of the CAM's connected parts above a threshold.

    The CAM is rounded down to 256 steps and compared with ``int(threshold * its largest step)``; parts
    are 8-connected. As in the published code no box reaches the last row or column of the grid, so a part
    that lies there alone has an empty box.

    Args:
        cams: float32 (K, h, w) in [0, 1].
        threshold: bound in [0, 1], relative to the largest value.

    Returns:
        float32 (K, h, w) of 0 and 1 on the device of ``cams``.
    """
    steps = (cams.detach() * 255).to(torch.uint8)
    # in float64, as Python's own product of the two would be
    limits = (threshold * steps.amax(dim=(1, 2), keepdim=True).double()).floor()
    foreground = steps > limits
    boxes = boxes_by_labelling if cams.device.type == "cpu" else boxes_by_reachability
    return boxes(foreground).to(cams.dtype)


def boxes_by_labelling(foreground: Tensor) -> Tensor:
    """Boxes of the 8-connected parts, part by part.

    Args:
        foreground: bool (K, h, w) on the CPU.

    Returns:
        bool (K, h, w).
    """
    height, width = foreground.shape[1:]
    masks = np.zeros(foreground.shape, dtype=bool)
    for cells, mask in zip(foreground.numpy().view(np.uint8), masks, strict=True):
        _, _, boxes, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
        for left, top, box_width, box_height, _ in boxes[1:]:  # the first is the background
            mask[top : min(top + box_height, height - 1), left : min(left + box_width, width - 1)] = True
    return torch.from_numpy(masks)


def boxes_by_reachability(foreground: Tensor) -> Tensor:
    """The same as ``boxes_by_labelling`` in a fixed number of matrix products, so a GPU waits for nothing.

    Which cells are neighbours is an (hw, hw) matrix; squared ceil(log2(hw)) times it says which belong to
    one part. One class at a time: the matrix of a 64 x 64 grid takes 32 MB.

    Args:
        foreground: bool (K, h, w) on any device.

    Returns:
        bool (K, h, w).
    """
    height, width = foreground.shape[1:]
    # half precision counts up to 2048 exactly and beyond it never down to 0
    kind = torch.float32 if foreground.device.type == "cpu" else torch.float16
    rows = torch.arange(height, device=foreground.device).repeat_interleave(width)
    columns = torch.arange(width, device=foreground.device).repeat(height)
    adjacent = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    doublings = (height * width - 1).bit_length()
    masks = []
    for cells in foreground.flatten(1):
        reach = (adjacent & cells & cells[:, None]).to(kind)
        for _ in range(doublings):
            reach = (reach @ reach).clamp_(max=1)
        masks.append(_union_of_boxes(reach > 0, rows, columns, (height, width)))
    return torch.stack(masks) if masks else foreground


def _union_of_boxes(reach: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool (h, w): in the box of some part. ``reach``: bool (hw, hw), cells of one part."""
    height, width = grid
    count = height * width
    top, bottom = rows.where(reach, count).amin(1), rows.where(reach, -1).amax(1)
    left, right = columns.where(reach, count).amin(1), columns.where(reach, -1).amax(1)
    # 1 at a box's corner and behind its end, summed up along both axes: over 0 inside a box; the corners of an empty
    # one fall together and sum to 0
    corners = torch.zeros((height + 1) * (width + 1), device=reach.device, dtype=torch.int32)
    exists = bottom >= 0
    bottom, right = (bottom + 1).clamp(max=height - 1), (right + 1).clamp(max=width - 1)
    ones = exists.int()
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        place = (row * (width + 1) + column).where(exists, 0)
        corners.scatter_add_(0, place, sign * ones)
    inside = corners.view(height + 1, width + 1).cumsum(0).cumsum(1)[:height, :width]
    return inside > 0
