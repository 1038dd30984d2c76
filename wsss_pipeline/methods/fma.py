"""FMA-WSSS (Yang and Gong, "Foundation Model Assisted Weakly Supervised Semantic Segmentation", WACV 2024).

Softmax-GradCAM on a frozen CLIP that reads learned prompts, class-aware attention affinity with constants of its own.
Published in two rounds: prompts learned to classify make coarse masks, prompts learned from these the fine ones; in
either, regions of a segmenter vote.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from wsss_pipeline.cam.affinity import box_masks, refine_cams
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import min_max
from wsss_pipeline.clip.learned_prompts import class_rows, prompt_determinants
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import PromptedMaskConfig, RefinerName, ResolvedPrecision, Settings
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.transforms import Prepared, prepare_image

logger = logging.getLogger(__name__)


class FmaSettings(Settings):
    """Class-aware attention affinity of FMA-WSSS's maps."""

    affinity: Literal["raw", "score", "none"] = Field(
        "raw",
        description="What is spread along CLIP's own attention: maps with what speaks against a class, as they are; "
        "maps in 0..1; or none.",
    )
    affinity_layers: int = Field(
        8,
        ge=1,
        le=1000,
        description="How many last layers' attention is averaged; a shallower CLIP has fewer.",
    )
    affinity_iterations: int = Field(
        2, ge=1, le=100, description="How often CAMs are spread; 1 where an object is few patches wide."
    )
    sinkhorn_rounds: int = Field(
        1, ge=0, le=1000, description="Rounds that make the attention doubly stochastic."
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="Of the box mask, relative to the largest value of the map in 0..1."
    )


class FmaConfig(PromptedMaskConfig):
    """Settings of FMA-WSSS."""

    fma: FmaSettings = FmaSettings()


class Fma:
    """CAMs of the classes that are present, of either sign.

    Args:
        config: its settings.
        clip: the frozen CLIP, on the device to use.
        class_set: classes, background words, and templates for where no prompts were learned.
        precision: type of CLIP's matrix products.
    """

    name = "fma"
    version = 1
    refiner: ClassVar[RefinerName] = "vote"
    background_power = 1.0
    ties: ClassVar[Literal["label", "index"]] = "index"
    Config = FmaConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # numbers of the published code
        "voc12-coarse": {
            "classes": "voc12",
            "fma": {"affinity": "score", "threshold": 0.4},
            "vote": {"background_power": 0.6},
            "confidence": "posterior",
        },
        "voc12": {
            "classes": "voc12",
            "fma": {"affinity": "raw", "threshold": 0.5},
            "vote": {"background_power": 0.7},
            "confidence": "posterior",
        },
        # published: the best of 0.3, 0.4 and 0.5 by ground truth of the training images; here the middle one
        "coco14-coarse": {
            "classes": "coco14",
            "fma": {"affinity": "raw", "threshold": 0.6},
            "vote": {"background_power": 0.4},
            "confidence": "posterior",
        },
        "coco14": {
            "classes": "coco14",
            "fma": {"affinity": "none"},
            "vote": {"background_power": 1.0},
            "confidence": "posterior",
        },
        # as for clip-es: the demo's objects are 3 to 6 patches wide
        "demo": {
            "classes": "demo",
            "fma": {"affinity": "score", "affinity_iterations": 1},
            "vote": {"regions": "slic"},
        },
    }

    def __init__(
        self, config: FmaConfig, clip: Clip, class_set: ClassSet, precision: ResolvedPrecision
    ) -> None:
        self._config = config
        self._trunk = Trunk(clip.vision, precision, rounded_positions=False)
        self._logit_scale = clip.logit_scale
        self._statistics = clip.statistics
        if not config.prompts:
            logger.info("prompts: none learned (--prompts FILE), the class set's templates stand in for them")
        rows = class_rows(config, class_set, clip)
        self._foreground = rows.foreground.to(self._trunk.device)
        self._background = rows.background.to(self._trunk.device)

    @classmethod
    def determinants(cls, config: FmaConfig) -> Mapping[str, Any]:
        """See ``Method``."""
        settings = config.fma
        return {"fma": {"affinity": "none"} if settings.affinity == "none" else settings.model_dump()}

    @classmethod
    def class_determinants(cls, config: FmaConfig, class_set: ClassSet) -> Mapping[str, Any]:
        """See ``Method``."""
        return prompt_determinants(config, class_set)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """See ``Method``."""
        return prepare_image(image, self._trunk.patch_size, self._config.max_pixels, self._statistics)

    def scores(self, batch: Tensor, present: Sequence[Sequence[int]]) -> list[Tensor]:
        """See ``Method``: raw CAMs, or what affinity made of them or of their scores; neither is normalised."""
        settings = self._config.fma
        is_spread = settings.affinity != "none"
        features = self._trunk.encode(batch, last_layers=settings.affinity_layers if is_spread else 1)
        texts = [
            torch.cat([self._foreground[[value - 1 for value in values]], self._background])
            for values in present
        ]
        counts = [len(values) for values in present]
        everything = torch.cat([self._foreground, self._background])
        cams = softmax_gradcam(features, texts, counts, self._logit_scale, everything=everything)
        if is_spread:
            cams = [
                self._spread(raw, attention) for raw, attention in zip(cams, features.attention, strict=True)
            ]
        return cams

    def _spread(self, raw: Tensor, attention: Tensor) -> Tensor:
        """Raw maps (K, h, w), or their scores, along the attention (hw, hw), out of the boxes of the scores."""
        settings = self._config.fma
        score = min_max(F.relu(raw))
        return refine_cams(
            score if settings.affinity == "score" else raw,
            attention,
            threshold=None,
            iterations=settings.affinity_iterations,
            rounds=settings.sinkhorn_rounds,
            prior=box_masks(score, settings.threshold),
        )


METHOD = Fma
