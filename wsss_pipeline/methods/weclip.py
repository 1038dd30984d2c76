"""WeCLIP (Zhang et al., "Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic Segmentation", CVPR 2024) and
WeCLIP+ (Zhang et al., TPAMI 2025).

Softmax-GradCAM on a frozen CLIP, class-aware attention affinity, PAR. A network that learns from such masks says
which patches are alike: that gates the attention, and with WeCLIP+ its probabilities weigh the CAMs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from wsss_pipeline.cam.affinity import gated_attention, refine_cams
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import normalise_cams
from wsss_pipeline.clip.learned_prompts import class_rows, prompt_determinants
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import PromptedMaskConfig, RefinerName, ResolvedPrecision, Settings
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, Prepared, prepare_image
from wsss_pipeline.segmentation.checkpoint import decoder_digest, load_frozen_clip


class WeClipSettings(Settings):
    """Softmax-GradCAM, and affinity that a network gates (WeCLIP, RFM; WeCLIP+, RFM+)."""

    affinity_layers: int = Field(
        8, ge=1, le=1000, description="How many last layers' attention is averaged without a gate."
    )
    gated_layers: int = Field(
        6, ge=1, le=1000, description="Among how many last layers the gate chooses; for COCO 10."
    )
    affinity_iterations: int = Field(
        2, ge=1, le=100, description="How often CAMs are spread; 1 where an object is few patches wide."
    )
    sinkhorn_rounds: int = Field(
        3, ge=0, le=1000, description="Rounds that make the attention doubly stochastic."
    )
    boxes: bool = Field(True, description="Spread a CAM out of its boxes alone.")
    threshold: float = Field(
        0.4, ge=0, le=1, description="Of the boxes, relative to the map's largest value; for COCO 0.7."
    )
    prior: bool = Field(False, description="Weigh CAMs with the network's probabilities (WeCLIP+).")
    left_out: int = Field(
        0, ge=0, le=10, description="Blocks left out before the last, for CAMs alone (WeCLIP+ for VOC: 1)."
    )
    checkpoint: str = Field(
        "", description="Run of a frozen-clip network that gates the affinity; empty for none."
    )


class WeClipConfig(PromptedMaskConfig):
    """Settings of WeCLIP."""

    weclip: WeClipSettings = WeClipSettings()


class WeClip:
    """CAMs of the classes that are present, with one softmax per image over them and the background words.

    Args:
        config: its settings.
        clip: the frozen CLIP, on the device to use.
        class_set: classes, background words, templates.
        precision: type of CLIP's matrix products.
    """

    name = "weclip"
    version = 1
    refiner: ClassVar[RefinerName] = "par"
    background_power = 1.0
    helped_by: ClassVar[frozenset[str]] = frozenset({"gate", "prior"})
    Config = WeClipConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # numbers of the published code
        "voc12": {"classes": "voc12", "confidence": "posterior"},
        "coco14": {
            "classes": "coco14",
            "weclip": {"threshold": 0.7, "gated_layers": 10},
            "confidence": "posterior",
        },
        "plus-voc12": {
            "classes": "voc12",
            "weclip": {"boxes": False, "prior": True, "left_out": 1},
            "confidence": "posterior",
        },
        "plus-coco14": {
            "classes": "coco14",
            "weclip": {"threshold": 0.7, "gated_layers": 8, "prior": True},
            "confidence": "posterior",
        },
        # as for clip-es: the demo's objects are 3 to 6 patches wide
        "demo": {"classes": "demo", "weclip": {"affinity_iterations": 1}},
    }

    def __init__(
        self, config: WeClipConfig, clip: Clip, class_set: ClassSet, precision: ResolvedPrecision
    ) -> None:
        self._config = config
        self._trunk = Trunk(clip.vision, precision, rounded_positions=False)
        self._logit_scale = clip.logit_scale
        self._statistics = clip.own_statistics or IMAGENET_STATISTICS
        self._network = None
        if config.weclip.checkpoint:
            path = Path(config.weclip.checkpoint)
            self._network = load_frozen_clip(path, clip, precision, class_set.names, self.name, self.encoding)
        rows = class_rows(config, class_set, clip)
        self._foreground = rows.foreground.to(self._trunk.device)
        self._background = rows.background.to(self._trunk.device)

    @classmethod
    def determinants(cls, config: WeClipConfig) -> Mapping[str, Any]:
        """See ``Method``."""
        settings = config.weclip
        dropped = {"checkpoint", "affinity_layers" if settings.checkpoint else "gated_layers"}
        dropped |= set() if settings.checkpoint else {"prior"}
        dropped |= set() if settings.boxes else {"threshold"}
        found = {"weclip": settings.model_dump(exclude=dropped)}
        return (
            {**found, "network": decoder_digest(Path(settings.checkpoint))} if settings.checkpoint else found
        )

    @classmethod
    def class_determinants(cls, config: WeClipConfig, class_set: ClassSet) -> Mapping[str, Any]:
        """See ``Method``."""
        return prompt_determinants(config, class_set)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """See ``Method``: as CLIP-ES, with ImageNet's statistics where CLIP has none of its own."""
        return prepare_image(image, self._trunk.patch_size, self._config.max_pixels, self._statistics)

    @property
    def encoding(self) -> Mapping[str, Any]:
        """See ``targets.OnlineMethod``."""
        settings = self._config.weclip
        return {
            "attention": "layers",
            "last_layers": max(settings.affinity_layers, settings.gated_layers),
            "left_out": settings.left_out,
        }

    def scores(self, batch: Tensor, present: Sequence[Sequence[int]]) -> list[Tensor]:
        """See ``Method``: the CAMs after affinity, which aren't normalised."""
        if self._network is None:
            cams = self.cams(self._trunk.encode(batch, **self.encoding), present)
        else:
            encoded = self._network.encode(batch, **self.encoding)
            outputs = self._network.decode(encoded)
            gate, prior = outputs["similarity"].sigmoid(), outputs["logits"].softmax(dim=1)
            cams = self.cams(encoded.features, present, gate=gate, prior=prior)
        return cams

    def cams(
        self,
        features: Features,
        present: Sequence[Sequence[int]],
        *,
        gate: Tensor | None = None,
        guide: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> list[Tensor]:
        """See ``targets.OnlineMethod``; a guide isn't looked at."""
        settings = self._config.weclip
        texts = [
            torch.cat([self._foreground[[value - 1 for value in values]], self._background])
            for values in present
        ]
        raw = softmax_gradcam(features, texts, [len(values) for values in present], self._logit_scale)
        cams = []
        for number, (maps, values) in enumerate(zip(raw, present, strict=True)):
            attention = features.attention[:, number]
            if gate is None:
                attention = attention[-settings.affinity_layers :].mean(dim=0)
            else:
                attention = gated_attention(attention[-settings.gated_layers :], gate[number])
            cams.append(
                refine_cams(
                    normalise_cams(maps),
                    attention,
                    settings.threshold if settings.boxes else None,
                    settings.affinity_iterations,
                    settings.sinkhorn_rounds,
                    prior[number, list(values)] if settings.prior and prior is not None else None,
                )
                if values
                else maps
            )
        return cams


METHOD = WeClip
