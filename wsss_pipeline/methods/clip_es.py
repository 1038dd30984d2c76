"""CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023, arXiv 2212.09506).

Softmax-GradCAM on a frozen CLIP, class-aware attention affinity, dense CRF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from wsss_pipeline.cam.affinity import refine_cams
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import normalise_cams
from wsss_pipeline.clip.learned_prompts import class_rows, prompt_determinants
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import PromptedMaskConfig, RefinerName, ResolvedPrecision, Settings
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.transforms import Prepared, prepare_image


class CamConfig(Settings):
    """Softmax-GradCAM and class-aware attention affinity (arXiv 2212.09506, section 3)."""

    affinity: bool = Field(True, description="Spread the CAMs along CLIP's own attention.")
    affinity_layers: int = Field(
        8,
        ge=1,
        le=1000,
        description="How many last layers' attention is averaged; a shallower CLIP has fewer.",
    )
    affinity_iterations: int = Field(
        2, ge=1, le=100, description="How often CAMs are spread, t; 1 where an object is few patches wide."
    )
    sinkhorn_rounds: int = Field(
        3, ge=0, le=1000, description="Rounds that make the attention doubly stochastic."
    )
    threshold: float = Field(
        0.4, ge=0, le=1, description="Of the box mask, relative to the map's largest value; for COCO 0.7."
    )


class ClipEsConfig(PromptedMaskConfig):
    """Settings of CLIP-ES."""

    cam: CamConfig = CamConfig()


class ClipEs:
    """CAMs of the classes that are present, with one softmax per image over them and the background words.

    Args:
        config: its settings.
        clip: the frozen CLIP, on the device to use.
        class_set: classes, background words, templates.
        precision: type of CLIP's matrix products.
    """

    name = "clip-es"
    version = 1
    refiner: ClassVar[RefinerName] = "crf"
    background_power = 1.0
    Config = ClipEsConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # numbers of the published code
        "voc12": {"classes": "voc12", "cam": {"threshold": 0.4}, "confidence": "posterior"},
        "coco14": {"classes": "coco14", "cam": {"threshold": 0.7}, "confidence": "posterior"},
        # The demo's objects are 3 to 6 patches wide, and two iterations of affinity spread a CAM over more than
        # that: mIoU of the CAM 68.8, after one iteration 71.0, after two 62.8 (80 scenes of another seed).
        "demo": {"classes": "demo", "cam": {"affinity_iterations": 1}},
    }

    def __init__(
        self, config: ClipEsConfig, clip: Clip, class_set: ClassSet, precision: ResolvedPrecision
    ) -> None:
        self._config = config
        self._trunk = Trunk(clip.vision, precision)
        self._logit_scale = clip.logit_scale
        self._statistics = clip.statistics
        rows = class_rows(config, class_set, clip)
        self._foreground = rows.foreground.to(self._trunk.device)
        self._background = rows.background.to(self._trunk.device)

    @classmethod
    def determinants(cls, config: ClipEsConfig) -> Mapping[str, Any]:
        """See ``Method``."""
        return {"cam": config.cam.model_dump() if config.cam.affinity else {"affinity": False}}

    @classmethod
    def class_determinants(cls, config: ClipEsConfig, class_set: ClassSet) -> Mapping[str, Any]:
        """See ``Method``."""
        return prompt_determinants(config, class_set)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """See ``Method``."""
        return prepare_image(image, self._trunk.patch_size, self._config.max_pixels, self._statistics)

    def scores(self, batch: Tensor, present: Sequence[Sequence[int]]) -> list[Tensor]:
        """See ``Method``: normalised CAMs, or with affinity the refined ones, which aren't normalised."""
        cam = self._config.cam
        # without affinity nobody asks for attention; how much is computed would show in the maps' rounding
        features = self._trunk.encode(batch, last_layers=cam.affinity_layers if cam.affinity else 1)
        texts = [
            torch.cat([self._foreground[[value - 1 for value in values]], self._background])
            for values in present
        ]
        raw = softmax_gradcam(features, texts, [len(values) for values in present], self._logit_scale)
        cams = [normalise_cams(maps) for maps in raw]
        if cam.affinity:
            cams = [
                refine_cams(maps, attention, cam.threshold, cam.affinity_iterations, cam.sinkhorn_rounds)
                for maps, attention in zip(cams, features.attention, strict=True)
            ]
        return cams


METHOD = ClipEs
