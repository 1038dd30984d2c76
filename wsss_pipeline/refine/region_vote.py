"""Region vote: class-agnostic regions take the class that their pixels' scores speak for.

FMA-WSSS (Yang and Gong, "Foundation Model Assisted Weakly Supervised Semantic Segmentation", WACV 2024, section 3.4)
with the regions of SAM. Every step is that of its published code; what regions leave uncovered can be given to the
dense CRF besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cam.scores import EPSILON
from wsss_pipeline.config import CrfConfig, VoteConfig
from wsss_pipeline.refine.dense_crf import DenseCrf, check_arrays
from wsss_pipeline.regions.regions import Regions, RegionSource

_LEAST = 0.5  # of a winner's posterior, so that it stays the winner


@dataclass(frozen=True)
class Vote:
    """What the N regions of an image voted for.

    Attributes:
        scores: float32 (1+K, N), background first. A region without pixels has NaN and takes no part.
        order: int64 (M,), the regions that have pixels, in the order of painting, later ones over earlier.
    """

    scores: Tensor
    order: Tensor

    @property
    def winners(self) -> Tensor:
        """Each region's place in ``scores``, 0 for the background, int64 (N,)."""
        return self.scores.argmax(dim=0)

    @property
    def confidence(self) -> Tensor:
        """Each region's largest score, float32 (N,)."""
        return self.scores.amax(dim=0)


def vote(maps: Tensor, regions: Regions, background_power: float) -> Vote:
    """The vote of an image's regions.

    A class's score for a region is its map's mean there, brought to [0, 1] over the regions by the least and the
    largest of them; the background's is (1 - m)^p, m the largest class score. Ties go to the background, then to the
    class that comes first.

    Args:
        maps: float (K, H, W) at least 0, of any range, K at least 1.
        regions: regions of that size.
        background_power: p.
    """
    height, width = regions.size
    ends = np.cumsum(regions.counts, dtype=np.int64)
    first = np.cumsum(regions.lengths) - regions.lengths
    owner = np.repeat(np.arange(len(regions)), regions.lengths)
    inside = (np.arange(len(ends)) - np.repeat(first, regions.lengths)) % 2 == 1
    base = owner[inside] * height * width
    # a region's sum out of running sums down the columns: no mask is ever expanded
    stops = torch.from_numpy(ends[inside] - base).to(maps.device)
    starts = torch.from_numpy((ends - regions.counts)[inside] - base).to(maps.device)
    owners = torch.from_numpy(owner[inside]).to(maps.device)
    means = []
    areas = torch.from_numpy(regions.areas()).to(maps.device)
    for cam in maps:
        running = F.pad(cam.T.reshape(-1).cumsum(0, dtype=torch.float64), (1, 0))
        sums = running.new_zeros(len(regions)).index_add_(0, owners, running[stops] - running[starts])
        means.append((sums / areas).float())
    mean = torch.stack(means)
    there = areas > 0
    if not bool(there.any()):
        return Vote(mean.new_full((1 + len(maps), len(regions)), torch.nan), areas.new_zeros(0))
    shifted = mean - mean[:, there].amin(dim=1, keepdim=True)
    scores = shifted / (EPSILON + shifted[:, there].amax(dim=1, keepdim=True))
    scores = torch.cat([(1 - scores.amax(dim=0, keepdim=True)) ** background_power, scores])
    levels = torch.from_numpy(regions.levels.astype(np.float64)).to(maps.device)
    # scores lie in 0..1, so that a level outweighs them all
    rank = (2 * levels + scores.amax(dim=0).double()).masked_fill(~there, torch.inf)
    order = rank.argsort(stable=True)[: int(there.sum())]
    return Vote(scores, order)


def painted(regions: Regions, order: Sequence[int]) -> NDArray[np.int64]:
    """Number of the region that is seen at each pixel, int64 (H, W), -1 where none is.

    Args:
        regions: regions.
        order: numbers of regions, later ones over earlier.
    """
    height, width = regions.size
    flat = np.full(height * width, -1, np.int64)
    ends = np.cumsum(regions.counts, dtype=np.int64)
    first = np.cumsum(regions.lengths) - regions.lengths
    for number in order:
        start = first[number]
        base = number * height * width
        for run in range(start + 1, start + regions.lengths[number], 2):
            flat[ends[run - 1] - base : ends[run] - base] = number
    return flat.reshape(width, height).T


class RegionVote:
    """A ``Refiner``: the class that most of a region speaks for.

    A region's posterior is its winner's score, at least a half, and for the others what is left, in proportion to
    their scores; so the confidence of a mask is the published one. Pixels that no region covers are background with
    a score of 1 less the largest class score there, or what the dense CRF makes of them.

    Args:
        config: settings.
        crf: those of the CRF for uncovered pixels.
        source: where regions come from.
    """

    def __init__(self, config: VoteConfig, crf: CrfConfig, source: RegionSource) -> None:
        self.config, self.source = config, source
        self._crf = DenseCrf(crf) if config.uncovered == "crf" else None
        uncovered = "as the CRF has them" if self._crf else "background"
        self.description = f"region vote: {source.description}; pixels that none covers: {uncovered}"

    def determinants(self) -> Mapping[str, Any]:
        """What determines the regions, and the settings that are of use."""
        settings = {"background_power": self.config.background_power, "uncovered": self.config.uncovered}
        # "raw": masks for which scaled maps voted aren't to be taken for these
        found = {"vote": {**settings, "maps": "raw", "regions": dict(self.source.identity)}}
        return {**found, **self._crf.determinants()} if self._crf else found

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[NDArray[np.uint8]],
        scores: Sequence[Tensor],
        regions: Sequence[Regions] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """See ``Refiner``; the posterior has the size of the regions."""
        check_arrays(images, scores, "the region vote", (np.uint8,))
        found = []
        for image, score, of_image, raw in zip(images, scores, regions, cams, strict=True):
            size = of_image.size
            # not the scores: they are scaled to 0..1, and a weak map would be scaled twice
            result = vote(_resized(raw.float(), size).clamp(min=0), of_image, self.config.background_power)
            owner = torch.from_numpy(painted(of_image, result.order.tolist())).to(score.device)
            beyond = owner < 0
            if self._crf is None:
                maps = _resized(score[1:].float(), size)
                strongest = maps.amax(dim=0, keepdim=True)
                rest = _winning(torch.cat([1 - strongest, maps]), torch.zeros_like(owner))
            elif bool(beyond.any()):
                (rest,) = self._crf([image], [score])
                rest = _resized(rest, size)
            else:
                rest = result.scores.new_zeros(1, *size)
            table = _winning(result.scores, result.winners)
            inside = table[:, owner.clamp(min=0)] if len(of_image) else rest
            found.append(torch.where(beyond, rest, inside))
        return found


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w), bilinearly at ``size``."""
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _winning(scores: Tensor, winners: Tensor) -> Tensor:
    """Posterior (1+K, ...) out of scores in [0, 1], in which the labels ``winners`` (...) win."""
    own = scores.gather(0, winners[None]).clamp(min=_LEAST)
    others = scores.scatter(0, winners[None], 0)
    total = others.sum(dim=0, keepdim=True)
    # where nothing else has a score, the winner has it all
    share = torch.where(total > 0, (1 - own) / total.clamp(min=torch.finfo(total.dtype).tiny), 0)
    return (others * share).scatter(0, winners[None], torch.where(total > 0, own, 1.0))
