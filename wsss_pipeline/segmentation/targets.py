"""Targets that are made while a network learns: pseudo masks of a batch's own crops, out of the pass of CLIP from
which the network's features come.

Source: WeCLIP (CVPR 2024), ExCEL (CVPR 2025), WeCLIP+ (TPAMI 2025), as their published code does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.clip.trunk import Features
from wsss_pipeline.config import ConfidenceName
from wsss_pipeline.data.masks import CERTAIN, ignore_value
from wsss_pipeline.refine import Refiner, label, label_confidences
from wsss_pipeline.segmentation.train_config import OnlineConfig


class OnlineMethod(Protocol):
    """A method whose CAMs a network on the same frozen CLIP can learn from while it is trained.

    Attributes:
        background_power: see ``Method``.
        helped_by: which of ``gate``, ``guide`` and ``prior`` it looks at.
    """

    background_power: float
    helped_by: frozenset[str]

    @property
    def encoding(self) -> Mapping[str, Any]:
        """Arguments of ``Trunk.encode`` that its CAMs need."""

    def cams(
        self,
        features: Features,
        present: Sequence[Sequence[int]],
        *,
        gate: Tensor | None = None,
        guide: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> list[Tensor]:
        """CAMs of each image, affinity done, with what a network says of the same images.

        Args:
            features: result of ``Trunk.encode`` with ``encoding``.
            present: per image its present classes as mask values 1..C; none gives no map.
            gate: float32 (B, hw, hw) in [0, 1], factor on the attention along which CAMs are spread.
            guide: float32 (B, hw, hw), similarity of patches, at least 0 for those that attention is led to.
            prior: float32 (B, 1+C, h, w), probabilities of the classes.

        Returns:
            Per image float32 (K, h, w) at least 0.
        """


class OnlineTarget:
    """Pseudo masks of crops, with the network's help from the updates on that the settings name.

    Args:
        method: maker of the CAMs.
        refiner: from scores to a posterior.
        config: settings.
        mean, std: RGB, for values in [0, 1], with which the crops are normalised.
        confidence: choice of what says how sure a label is.
    """

    def __init__(
        self,
        method: OnlineMethod,
        refiner: Refiner,
        config: OnlineConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        confidence: ConfidenceName = "posterior",
    ) -> None:
        self._confidence: ConfidenceName = confidence
        self.method, self._refiner, self._config = method, refiner, config
        self._mean, self._std = (torch.tensor(row)[:, None, None] for row in (mean, std))

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        outputs: Mapping[str, Any],
        present: Sequence[Sequence[int]],
        beyond: Tensor,
        update: int,
    ) -> tuple[Tensor, Tensor]:
        """Target of a batch.

        A crop keeps all labels of its image, though it may not show them all. One without any is background.

        Args:
            images: float32 (B, 3, S, S), normalised.
            outputs: what the network made of them, see ``FrozenClip.training_outputs``.
            present: per crop the classes of its image as mask values 1..C.
            beyond: bool (B, S, S), True beyond the image's edge.
            update: number of the update, from 1.

        Returns:
            int64 (B, S, S), beyond the edge 255 (65,535 with more than 254 classes), and its confidence in half
            percents, uint8 (B, S, S).
        """
        config, (side, width) = self._config, images.shape[2:]
        similarity = outputs["similarity"].detach()
        is_gated, is_guided = (0 < start <= update for start in (config.gate_from, config.guide_from))
        maps = self.method.cams(
            outputs["encoded"].features,
            present,
            gate=similarity.sigmoid() if is_gated else None,
            guide=similarity if is_guided else None,
            prior=outputs["grid_logits"].detach().float().softmax(dim=1),
        )
        labelled = [number for number, classes in enumerate(present) if classes]
        levels = 255 * (images[labelled].float().cpu() * self._std + self._mean)
        seen = list(levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())
        scores = [
            assemble(upscale_cams(maps[number], (side, width)), self.method.background_power)
            for number in labelled
        ]
        values = outputs["grid_logits"].shape[1]
        mask = torch.zeros_like(beyond, dtype=torch.int64)
        confidence = torch.full_like(mask, CERTAIN, dtype=torch.uint8)
        sure = label_confidences(self._confidence, seen, scores)
        for number, posterior, own in zip(labelled, self._refiner(seen, scores), sure, strict=True):
            labels, confidence[number] = label(
                posterior, present[number], (side, width), values, confidences=own
            )
            mask[number] = labels.long()
        return mask.masked_fill_(beyond, ignore_value(values)), confidence.masked_fill_(beyond, 0)
