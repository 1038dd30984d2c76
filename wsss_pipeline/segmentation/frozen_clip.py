"""Networks whose encoder is a frozen CLIP, maybe with a frozen DINOv2 beside it; what is trained is a light decoder.

Sources: WeCLIP (Zhang et al., "Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic Segmentation", CVPR
2024); WeCLIP+ (Zhang et al., TPAMI 2025); ExCEL (Yang et al., CVPR 2025). Where they and their published code differ,
the code is followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import ResolvedPrecision
from wsss_pipeline.errors import NetworkError
from wsss_pipeline.segmentation.clip_network import ClipNetwork, Frozen
from wsss_pipeline.segmentation.dino import Dino
from wsss_pipeline.segmentation.network import IMAGE_MEAN, IMAGE_STD
from wsss_pipeline.segmentation.train_config import FrozenClipConfig

SHARPNESS = 3.0  # of the centred affinity


@dataclass(frozen=True)
class Encoded:
    """What the frozen encoders see in a batch.

    Attributes:
        features: of CLIP, with what a method needs for its CAMs where that was asked for.
        layers: the layers that are fused, float32 (B, hw, D) each.
        dino: float32 (B, D', h', w'), DINOv2's patches on their own grid; None without it.
    """

    features: Features
    layers: list[Tensor]
    dino: Tensor | None


class _Frozen(Frozen):
    """CLIP, and DINOv2 where there is one."""

    def __init__(self, clip: Clip, precision: ResolvedPrecision, dino: Dino | None) -> None:
        super().__init__(clip, [clip.vision] if dino is None else [clip.vision, dino.model])
        self.dino = dino
        self.trunk = Trunk(clip.vision, precision, rounded_positions=False)


class _Fusion(nn.Module):
    """An MLP for each layer's tokens, and one linear map for all of them together."""

    def __init__(self, layers: int, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(layers)
        )
        self.fuse = nn.Conv2d(layers * width, width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """float (B, width, h, w) out of (B, hw, D) for each layer."""
        joined = torch.cat([mlp(own) for mlp, own in zip(self.layers, tokens, strict=True)], dim=-1)
        fused: Tensor = self.dropout(self.fuse(joined.transpose(1, 2).reshape(joined.shape[0], -1, *grid)))
        return fused


class _Decoder(nn.Module):
    """Transformer blocks without positions, and a linear classifier of each patch."""

    def __init__(self, config: FrozenClipConfig, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    config.width,
                    config.heads,
                    4 * config.width,
                    dropout=0.0,
                    activation=_quick_gelu,
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(config.depth)
            )
        )
        self.classify = nn.Conv2d(config.width, num_classes, 1)

    def forward(self, fused: Tensor) -> Tensor:
        """Logits (B, 1+C, h, w) out of (B, width, h, w)."""
        tokens = self.blocks(fused.flatten(2).transpose(1, 2))
        logits: Tensor = self.classify(tokens.transpose(1, 2).reshape(fused.shape))
        return logits


def _quick_gelu(inputs: Tensor) -> Tensor:
    return inputs * torch.sigmoid(1.702 * inputs)


class FrozenClip(ClipNetwork):
    """A decoder on the features of a frozen CLIP's blocks.

    Attributes:
        config: settings of the decoder.
        frozen: encoders, which no checkpoint holds.

    Args:
        config: settings of the decoder.
        num_classes: number of classes with the background.
        clip: CLIP, shared with whoever else uses it.
        precision: type of CLIP's matrix products.
        dino: frozen DINOv2 beside it; None for CLIP alone.

    Raises:
        NetworkError: settings that CLIP has no blocks for.
    """

    model: nn.ModuleDict
    config: FrozenClipConfig
    frozen: _Frozen

    def __init__(
        self,
        config: FrozenClipConfig,
        num_classes: int,
        clip: Clip,
        precision: ResolvedPrecision = "fp32",
        dino: Dino | None = None,
    ) -> None:
        super().__init__(clip)
        self.config = config
        self.frozen = _Frozen(clip, precision, dino)
        trunk, channels = self.frozen.trunk, int(clip.vision.config.hidden_size)
        first, last = (block % trunk.depth for block in (config.first_block, config.last_block))
        if first > last or not all(
            -trunk.depth <= block < trunk.depth for block in (config.first_block, config.last_block)
        ):
            raise NetworkError(
                f"network.frozen.first_block {config.first_block} and network.frozen.last_block {config.last_block}: "
                f"this CLIP has the blocks 0 to {trunk.depth - 1}"
            )
        self._blocks = range(first, last + 1)
        if config.width % config.heads:
            raise NetworkError(
                f"network.frozen.width {config.width} isn't a multiple of network.frozen.heads {config.heads}"
            )
        parts = {"fusion": _Fusion(len(self._blocks), channels, config.width, config.dropout)}
        if dino is not None:
            parts["dino_fusion"] = _Fusion(
                1, int(dino.model.config.hidden_size), config.width, config.dropout
            )
        self.model = nn.ModuleDict({**parts, "decoder": _Decoder(config, num_classes)})
        self.multiple = self.smallest = trunk.patch_size

    def frozen_digests(self) -> dict[str, str | None]:
        """Digests of CLIP and DINOv2, without which the decoder is of no use; reads CLIP's files."""
        dino = self.frozen.dino
        return {**super().frozen_digests(), "dino": None if dino is None else dino.digest}

    def check_method(self, name: str, encoding: Mapping[str, Any]) -> None:
        """A NetworkError where one pass of CLIP can't serve both this network and a method's CAMs.

        Args:
            name: of the method, for the message.
            encoding: arguments of ``Trunk.encode`` that its CAMs need.
        """
        own, its = self.config.calibrated_blocks, encoding.get("calibrated_blocks")
        if self.config.in_place and its != own:
            raise NetworkError(
                f"network.frozen.in_place fuses {own} calibrated blocks, and {name} has {its or 'none'}: give a "
                "method with as many (excel, excel.calibrated_blocks), or train with network.frozen.in_place=false"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, **wanted: Any) -> Encoded:
        """What the frozen encoders see.

        Args:
            images: float32 (B, 3, H, W), normalised with the network's mean and standard deviation, H and W
                multiples of CLIP's patch.
            wanted: further arguments of ``Trunk.encode``, for what a method's CAMs need.
        """
        trunk, dino = self.frozen.trunk, self.frozen.dino
        arguments: dict[str, Any] = {"attention": "none", **wanted}
        taps, middle = set(self._blocks), set[int]()
        if self.config.in_place:
            arguments["calibrated_blocks"] = self.config.calibrated_blocks
            first = trunk.depth - min(self.config.calibrated_blocks, trunk.depth - 1)
            middle = {block + 1 for block in self._blocks if first <= block < trunk.depth - 1}
            taps -= {block for block in self._blocks if first - 1 <= block < trunk.depth - 1}
        # CLIP's own precision decides; here nothing is to be cast
        with torch.autocast(images.device.type, enabled=False):
            features = trunk.encode(images, taps, middle=middle, **arguments)
            layers = [
                features.taps[block]
                if block in taps
                else features.middle[block + 1]
                if block + 1 in middle
                else features.stream
                for block in self._blocks
            ]
            maps = None
            if dino is not None:
                maps = self._dino_maps(dino.model, self._for_dino(images))
        return Encoded(features, [layer[:, 1:] for layer in layers if layer is not None], maps)

    def _for_dino(self, images: Tensor) -> Tensor:
        """Images as DINOv2 was trained with them, where CLIP has pixel statistics of its own."""
        if (self.image_mean, self.image_std) == (IMAGE_MEAN, IMAGE_STD):
            return images
        own_mean, own_std, mean, std = (
            images.new_tensor(row)[:, None, None]
            for row in (self.image_mean, self.image_std, IMAGE_MEAN, IMAGE_STD)
        )
        return (images * own_std + own_mean - mean) / std

    def _dino_maps(self, dino: Any, images: Tensor) -> Tensor:
        """DINOv2's normalised patches, (B, D', h', w'), of images at the next smaller multiple of its patch."""
        patch = int(dino.config.patch_size)
        grid = [max(1, side // patch) for side in images.shape[-2:]]
        scaled = F.interpolate(images, [patch * side for side in grid], mode="bilinear", align_corners=False)
        tokens: Tensor = dino(scaled).last_hidden_state
        patches = tokens[:, -grid[0] * grid[1] :].transpose(1, 2)
        return patches.reshape(images.shape[0], -1, *grid)

    def decode(
        self, encoded: Encoded, *, with_similarity: bool = True, batch_mean: bool | None = None
    ) -> dict[str, Tensor]:
        """What the decoder makes of what the encoders see.

        Args:
            encoded: result of ``encode``.
            with_similarity: choice to compare all pairs of patches.
            batch_mean: choice of the mean that centred similarities lose: that of all of them in the batch, as
                published, or each picture's own; None: the batch's in training where the settings say so, else the
                picture's own, so that a picture's result doesn't depend on what is beside it.

        Returns:
            ``logits`` (B, 1+C, h, w); ``fused`` (B, width, h, w), what they are made of; ``similarity`` (B, hw, hw),
            of which the affinity is the sigmoid. With DINOv2 the logits are the mean of ``clip_logits`` and
            ``dino_logits``, and ``fused`` has the features of both.
        """
        fusion, decoder = self.model["fusion"], self.model["decoder"]
        grid = encoded.features.grid
        fused = fusion(encoded.layers, grid)
        outputs = {"logits": decoder(fused), "fused": fused}
        if encoded.dino is not None:
            tokens = encoded.dino.flatten(2).transpose(1, 2)
            own = self.model["dino_fusion"]([tokens], encoded.dino.shape[2:])
            own = F.interpolate(own, grid, mode="bilinear", align_corners=False)
            branches = {"clip_logits": outputs["logits"], "dino_logits": decoder(own)}
            mean = (branches["clip_logits"] + branches["dino_logits"]) / 2
            outputs = {"logits": mean, **branches, "fused": torch.cat([fused, own], dim=1)}
        if with_similarity:
            if batch_mean is None:
                batch_mean = self.training and self.config.affinity_mean == "batch"
            with torch.autocast(fused.device.type, enabled=False):
                outputs["similarity"] = self._similarity(outputs["fused"].flatten(2).float(), batch_mean)
        return outputs

    def _similarity(self, features: Tensor, batch_mean: bool) -> Tensor:
        """(B, hw, hw) out of (B, width, hw)."""
        if self.config.affinity == "raw":
            return features.transpose(1, 2) @ features
        features = F.normalize(features, dim=1)
        likeness = features.transpose(1, 2) @ features
        mean = likeness.mean() if batch_mean else likeness.mean(dim=(1, 2), keepdim=True)
        if batch_mean and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # one that gradients go through
            from torch.distributed.nn.functional import all_reduce

            mean = all_reduce(mean) / torch.distributed.get_world_size()  # type: ignore[no-untyped-call]
        return SHARPNESS * (likeness - mean)

    def logits(self, images: Tensor) -> Tensor:
        """On CLIP's grid of patches."""
        return self.decode(self.encode(images), with_similarity=False)["logits"]

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """Results of ``decode``, logits at the size of the images; ``grid_logits`` at their own; and ``encoded``.

        Args:
            images: float32 (B, 3, H, W), H and W multiples of CLIP's patch.
            wanted: see ``encode``.
        """
        encoded = self.encode(images, **wanted)
        outputs: dict[str, Any] = self.decode(encoded)
        grid_logits = outputs["logits"]
        for name in ("logits", "clip_logits", "dino_logits"):
            if name in outputs:
                outputs[name] = F.interpolate(
                    outputs[name], images.shape[2:], mode="bilinear", align_corners=False
                )
        return {**outputs, "grid_logits": grid_logits, "encoded": encoded}
