"""Masks of FMA-WSSS written plainly, step by step as the published code computes them: what our speed is measured
against.

One image at a time in float32, as in ``plain_method.py``, for each class a forward and a backward pass of the last
block and the whole affinity matrix; then the vote, with every region's mask expanded beside every class's map.
Tests compare CAMs and vote with the published code's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.plain_method import PlainMethod, affinity, box_mask, rescaled

THRESHOLD, BACKGROUND_POWER = 0.5, 0.7  # of the fine round for VOC


class PlainFma(PlainMethod):
    """Masks by the book; arguments as of ``PlainMethod``."""

    rounded_positions = False

    def mask(
        self,
        clip_input: Tensor,
        classes: Sequence[int],
        regions: NDArray[np.bool_],
        levels: NDArray[np.uint8],
    ) -> NDArray[np.uint8]:
        """Label (H, W) out of CLIP's input (1, 3, h, w), ``classes``, rows from 0; regions as for ``vote``."""
        classes = sorted(classes)
        maps = torch.from_numpy(np.stack(self.refined_cams(clip_input, classes)))
        values = np.array([0, *(index + 1 for index in classes)], np.uint8)
        return values[vote(maps, regions, levels)]

    def refined_cams(self, clip_input: Tensor, classes: Sequence[int]) -> list[NDArray[np.float32]]:
        """One map (h, w) for each class, of either sign."""
        hidden, attentions, grid = self.trunk(clip_input)
        texts = torch.cat([self.foreground, self.background])
        self._competing = torch.zeros(len(texts), device=texts.device)
        self._competing[[*classes, *range(len(self.foreground), len(texts))]] = 1
        refined = []
        for target in classes:
            raw, last = self.raw_cam(hidden, texts, target, grid)
            mask = box_mask(rescaled(F.relu(raw).numpy()), THRESHOLD)
            refined.append(affinity(raw, [*attentions, last], grid, mask, rounds=1))
        return refined

    def probabilities(self, texts: Tensor, embedding: Tensor) -> Tensor:
        """A softmax in which only classes that are present and the background words count."""
        logits = self.logit_scale * texts @ embedding
        powers = torch.exp(logits - logits.max()) * self._competing
        return powers / (powers.sum() + 1e-5)


def vote(maps: Tensor, regions: NDArray[np.bool_], levels: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Place of each pixel's winner (H, W) among background and maps (K, h, w), by regions (N, H, W) of levels (N).

    Every level wins over those below it; within one the region whose winner is surer.
    """
    size = regions.shape[1:]
    maps = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].clamp(min=0)
    masks = torch.from_numpy(regions)
    means = (maps[:, None] * masks[None]).sum(dim=(2, 3)) / masks.sum(dim=(1, 2))
    scores = np.stack([rescaled(row) for row in means.numpy()])
    scores = np.concatenate([(1 - scores.max(axis=0, keepdims=True)) ** BACKGROUND_POWER, scores])
    winners = np.zeros(size, np.intp)
    for number in np.lexsort([scores.max(axis=0), levels]):
        winners[regions[number]] = scores[:, number].argmax()
    return winners
