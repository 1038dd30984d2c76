"""Mask classification networks: queries, each with a class and a mask (Cheng et al., "Mask2Former", CVPR 2022;
Kerssies et al., "EoMT", CVPR 2025), through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.errors import NetworkError
from wsss_pipeline.segmentation.hf_networks import CONFIG, TransformersNetwork
from wsss_pipeline.segmentation.losses import Queries, QueryLoss
from wsss_pipeline.segmentation.network import resized, tiles

# so much of a score has each class everywhere: where no query claims a pixel, none is more probable than another
LEAST_SCORE = 1e-6
_MODELS = {
    "mask2former": {"mask2former": "Mask2FormerForUniversalSegmentation"},
    "eomt": {
        "eomt": "EomtForUniversalSegmentation",
        "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
    },
}


class MaskClassification(TransformersNetwork):
    """A network whose queries claim masks for classes, of which the background is one.

    The score of a class at a pixel is the sum over queries of its probability (no object is dropped) times that of
    the mask, the masks' logits brought to the input's size first (Cheng et al., "MaskFormer", NeurIPS 2021, section
    3.4). The logits are the logarithms of scores + ``LEAST_SCORE``: their arg max is the published one, and their
    softmax the scores divided by their sum over classes.

    Args:
        name: ``mask2former`` or ``eomt``.
        architecture, num_classes: see ``TransformersNetwork``.
    """

    def __init__(self, name: str, architecture: Mapping[str, Any], num_classes: int) -> None:
        super().__init__(architecture, num_classes, _MODELS[name])
        model: Any = self.model
        config = model.config
        self._has_pixel_decoder = name == "mask2former"
        if self._has_pixel_decoder:
            self.multiple = 32
        elif type(config.image_size) is int and config.image_size % config.patch_size == 0:
            self.multiple, self.is_fixed = config.image_size, True
        else:
            raise NetworkError(
                f"{CONFIG} has image_size {config.image_size!s:.60}; one multiple of the patch is built"
            )
        # logits and probabilities of each query's mask, in float32
        self.query_bytes = 8 * config.num_queries
        self._loss = QueryLoss(
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            points=config.train_num_points,
            uncertain_weight=config.importance_sample_ratio,
            uncertain_share=config.importance_sample_ratio / config.oversample_ratio,
        )

    def encoder(self) -> nn.Module:
        """Mask2Former's backbone; of EoMT, whose blocks are both, all but queries and heads."""
        model: Any = self.model
        if self._has_pixel_decoder:
            encoder: nn.Module = model.model.pixel_level_module.encoder
            return encoder
        names = ("embeddings", "layers", "layernorm", "norm")
        return nn.ModuleDict({name: getattr(model, name) for name in names if hasattr(model, name)})

    def logits(self, images: Tensor) -> Tensor:
        """At the size of the input."""
        output = self.model(pixel_values=self.pixel_values(images))
        classes = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        masks = resized(output.masks_queries_logits.float(), size=images.shape[-2:]).sigmoid()
        return (torch.einsum("bqc,bqhw->bchw", classes, masks) + LEAST_SCORE).log()

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """``queries`` of each decoder layer or block, the last one's last."""
        model: Any = self.model
        seen = self.seen(images)
        size = (seen.shape[-2], seen.shape[-1])
        pixels = self.pixel_values(tiles(seen, self.multiple) if self.is_fixed else seen)
        if self._has_pixel_decoder:
            output = model(pixel_values=pixels, output_auxiliary_logits=True)
            layers = [
                (one["class_queries_logits"], one["masks_queries_logits"]) for one in output.auxiliary_logits
            ]
            layers.append((output.class_queries_logits, output.masks_queries_logits))
        else:
            # transformers keeps what the blocks before the last predict to itself
            layers, predict = [], model.predict

            def recorded(tokens: Tensor) -> tuple[Tensor, Tensor]:
                masks, classes = predict(tokens)
                layers.append((classes, masks))
                return masks, classes

            model.predict = recorded
            try:
                model(pixel_values=pixels)
            finally:
                del model.predict
        return {"queries": Queries(layers, size, self.multiple if self.is_fixed else None, self._loss)}
