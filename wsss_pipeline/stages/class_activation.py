"""From pictures and labels to refined CAMs: CLIP, softmax-GradCAM, affinity. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cam.affinity import refine_cams
from wsss_pipeline.cam.prompts import ClassEmbeddings, class_embeddings
from wsss_pipeline.cam.softmax_gradcam import normalise_cams, softmax_gradcam
from wsss_pipeline.clip.image_encoder import ImageEncoder
from wsss_pipeline.clip.text_encoder import TextEncoder
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.transforms import to_clip_tensor
from wsss_pipeline.errors import ImageError
from wsss_pipeline.methods.clip_es import CamConfig
from wsss_pipeline.stages.mask_plan import MaskPlan


class ClassActivation:
    """CAMs of the classes that are present, with one softmax per picture over them and the background.

    Args:
        encoder: the frozen image encoder.
        embeddings: unit rows of all classes (C, P) and of the background words (G, P).
        logit_scale: CLIP's factor on the cosine.
        config: affinity on or off, box threshold, iterations, Sinkhorn rounds.
    """

    def __init__(
        self, encoder: ImageEncoder, embeddings: ClassEmbeddings, logit_scale: float, config: CamConfig
    ) -> None:
        self._encoder = encoder
        self._foreground = embeddings.foreground.to(encoder.device)
        self._background = embeddings.background.to(encoder.device)
        self._logit_scale = logit_scale
        self._config = config

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; images must be multiples of it."""
        return self._encoder.patch_size

    def cams(self, images: Sequence[NDArray[np.uint8]], classes: Sequence[Sequence[int]]) -> list[Tensor]:
        """CAMs of a batch.

        Args:
            images: B times uint8 (H, W, 3) RGB, all of one size that is a multiple of the patch.
            classes: per image its present classes as mask values 1..C, at least one, in label order.

        Returns:
            Per image float32 (K, h, w) on the patch grid, at least 0: normalised CAMs, or with affinity
            the refined ones, which aren't normalised.

        Raises:
            ImageError: CLIP's output isn't finite (broken weights, or half precision overflowed).
        """
        batch = torch.stack([to_clip_tensor(image) for image in images]).to(self._encoder.device)
        features = self._encoder.encode(batch)
        texts = [
            torch.cat([self._foreground[[value - 1 for value in present]], self._background])
            for present in classes
        ]
        counts = [len(present) for present in classes]
        raw = softmax_gradcam(
            features.tokens,
            features.pooled,
            features.grid,
            texts,
            counts,
            self._logit_scale,
            features.mean_token_gradients,
        )
        cams = [normalise_cams(maps) for maps in raw]
        if self._config.affinity:
            cams = [
                refine_cams(
                    maps,
                    attention,
                    self._config.threshold,
                    self._config.affinity_iterations,
                    self._config.sinkhorn_rounds,
                )
                for maps, attention in zip(cams, features.attention, strict=True)
            ]
        # one answer for all: each waits for the device
        if not bool(torch.stack([torch.isfinite(maps).all() for maps in cams]).all()):
            raise ImageError(
                "CLIP's class activation isn't finite; try --precision fp32, or check the weights"
            )
        return cams


def load_class_activation(plan: MaskPlan) -> ClassActivation:
    """Load CLIP and embed the classes, once for the whole run.

    Raises:
        WeightsError: CLIP can't be loaded.
    """
    clip = load_clip(plan.clip, torch.device(plan.device))
    encoder = ImageEncoder(clip.vision, plan.precision, plan.config.cam.affinity_layers)
    text = TextEncoder(clip.text, clip.tokenizer)
    embeddings = class_embeddings(plan.class_set, plan.config.templates, text.encode)
    return ClassActivation(encoder, embeddings, clip.logit_scale, plan.config.cam)
