"""From scores to a labelled image: a refiner's posterior, and the one arg max and rounding of its confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import MaskConfig, RefinerName, RelabelConfig
from wsss_pipeline.data.masks import CERTAIN, IGNORE
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine.dense_crf import DenseCrf
from wsss_pipeline.refine.par import Par
from wsss_pipeline.refine.region_vote import RegionVote
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.regions.sources import open_regions


class Refiner(Protocol):
    """From scores to a posterior that follows the image's edges; where the scores lie, CPU or GPU.

    Attributes:
        description: text for people.
    """

    description: str

    def determinants(self) -> Mapping[str, Any]:
        """The part of the fingerprint that is its own."""

    def __call__(
        self,
        images: Sequence[NDArray[np.uint8]],
        scores: Sequence[Tensor],
        regions: Sequence[Regions] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Posteriors of several images of any sizes.

        Args:
            images: uint8 (H, W, 3) RGB.
            scores: per image float (1+K, H, W) in [0, 1], background first; they need not sum to 1.
            regions: per image its regions, at its stored size, where the refiner is the region vote.
            cams: per image the CAMs (K, h, w) that its scores were made of, of any range, where it is.

        Returns:
            Per image float32 (1+K, H, W) on the device of its scores, summing to 1 over the labels; of the size of
            its regions where there are some.
        """


class Unrefined:
    """A ``Refiner`` that leaves the scores as they are, divided by their sum."""

    description = "CRF: none"

    def determinants(self) -> Mapping[str, Any]:
        """That nothing is refined."""
        return {"crf": {"backend": "none"}}

    def __call__(
        self,
        images: Sequence[NDArray[np.uint8]],
        scores: Sequence[Tensor],
        regions: Sequence[Regions] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """See ``Refiner``."""
        return [score.float() / score.float().sum(dim=0) for score in scores]


def load_refiner(config: MaskConfig | RelabelConfig, default: RefinerName) -> Refiner:
    """The refiner that a configuration names; ``auto`` is ``default``, and a CRF whose backend is none is none.

    Raises:
        ConfigError: settings that contradict each other, a vote without regions.
        RegionError: regions that can't be used.
        MissingDependencyError: the CRF's backend, or what makes superpixels, isn't installed.
    """
    if config.refine == "crf" and config.crf.backend == "none":
        raise ConfigError("--refine crf and --crf none contradict each other; drop one of them")
    name = default if config.refine == "auto" else config.refine
    if isinstance(config, MaskConfig) and name == "vote":
        if not config.vote.regions:
            raise ConfigError(
                "the region vote needs regions; give --regions slic, or a folder that propose-regions wrote, "
                "or another --refine"
            )
        return RegionVote(config.vote, config.crf, open_regions(config.vote.regions, config.slic))
    if name == "none" or (name == "crf" and config.crf.backend == "none"):
        return Unrefined()
    return Par(config.par) if name == "par" else DenseCrf(config.crf)


def label(
    posterior: Tensor,
    classes: Sequence[int],
    size: tuple[int, int],
    outputs: int = 255,
    confidences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask and confidence of an image.

    Args:
        posterior: float32 (1+K, h, w), background first, summing to 1.
        classes: mask value of each of the K classes.
        size: (H, W) of the mask; the posterior is scaled to it, bilinearly, where it differs from (h, w).
        outputs: number 1+C of values that masks of the class set may have; more than 255 of them take 16 bits.
        confidences: float32 (1+K, h', w'), see ``label_confidences``; the posterior, where None. Scaled likewise.

    Returns:
        The arg max, uint8 or uint16 (H, W), and its confidence in half percents, rounded down, uint8 (H, W): the
        largest n in 0..200 with float32(n / 200) <= p, exactly. 255 stands for a confidence that is no number, which
        ``PseudoMask`` refuses. On the device of the posterior; nothing waits for it.
    """
    if posterior.shape[1:] != size:
        posterior = F.interpolate(posterior[None], size, mode="bilinear", align_corners=False)[0]
    largest, index = posterior.max(dim=0)
    if confidences is not None:
        if confidences.shape[1:] != size:
            confidences = F.interpolate(confidences[None], size, mode="bilinear", align_corners=False)[0]
        # what is no number in the posterior stays none
        largest = confidences.gather(0, index[None])[0].masked_fill(largest.isnan(), torch.nan)
    is_wide = outputs > IGNORE
    # both tables are the host's, which rounds alike everywhere
    values = torch.tensor([0, *classes], dtype=torch.int32 if is_wide else torch.uint8, device="cpu")
    mask = values.to(posterior.device, non_blocking=True)[index]
    thresholds = torch.arange(CERTAIN + 1, dtype=torch.float64, device="cpu") / CERTAIN
    thresholds = thresholds.float().to(posterior.device)
    steps = torch.searchsorted(thresholds, largest.contiguous(), right=True) - 1
    confidence = steps.clamp_(min=0).masked_fill_(largest.isnan(), 255).to(torch.uint8)
    # uint16 at last: not every device indexes it
    return mask.to(torch.uint16) if is_wide else mask, confidence
