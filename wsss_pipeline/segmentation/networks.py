"""Segmentation networks behind one factory and one calling convention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig, ResolvedPrecision
from wsss_pipeline.errors import NetworkError
from wsss_pipeline.files import read_json
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.segmentation.dino import load_dino
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.hf_networks import HfNetwork, read_architecture
from wsss_pipeline.segmentation.mask_classification import MaskClassification
from wsss_pipeline.segmentation.network import BatchNorm, SegmentationNetwork, resized
from wsss_pipeline.segmentation.train_config import ON_CLIP, TRANSFORMERS, NetworkConfig
from wsss_pipeline.segmentation.weakclip import WeakClip

# name -> hidden sizes, depths, decoder's hidden size (Xie et al., "SegFormer", NeurIPS 2021, table 6)
MIT_ENCODERS = {
    "tiny": ((16, 32, 64, 96), (1, 1, 2, 1), 64),
    "mit-b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "mit-b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "mit-b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "mit-b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "mit-b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "mit-b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}
MAX_CONFIG_BYTES = 2**24
LARGEST = {
    "num_encoder_blocks": 16,
    "depths": 100,
    "sr_ratios": 64,
    "patch_sizes": 64,
    "strides": 64,
    "num_attention_heads": 64,
    "hidden_sizes": 8192,
    "decoder_hidden_size": 8192,
    "mlp_ratios": 16,
    "num_channels": 3,
}
# what timm would ask a hub for, or look for on the disk
_ELSEWHERE = re.compile("[:/\\\\]")


class DecoderNetwork(SegmentationNetwork):
    """A decoder of segmentation-models-pytorch on any of its encoders."""

    encoder_name = "encoder"
    multiple = 32

    def __init__(self, decoder: str, encoder: str, num_classes: int) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        if decoder not in smp.MODEL_ARCHITECTURES_MAPPING:
            known = ", ".join(
                [
                    "deeplabv2",
                    "segformer",
                    *ON_CLIP,
                    *TRANSFORMERS,
                    *sorted(set(smp.MODEL_ARCHITECTURES_MAPPING)),
                ]
            )
            raise NetworkError(f"unknown network '{decoder}'; known: {known}")
        # a vision transformer of timm else takes images of one size alone
        further = {"dynamic_img_size": True} if decoder == "dpt" else {}
        try:
            self.model = smp.create_model(
                decoder, encoder_name=encoder, encoder_weights=None, classes=num_classes, **further
            )
        except (KeyError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = one_line(error)[:300]
            raise NetworkError(f"network {decoder} can't have the encoder '{encoder}': {reason}") from error
        self._pools_globally = any(isinstance(module, nn.AdaptiveAvgPool2d) for module in self.modules())
        if decoder == "pan":
            self.smallest = 128  # it halves the features at a 16th of the size three times

    def logits(self, images: Tensor) -> Tensor:
        """As the decoder gives them."""
        if self.training and self._pools_globally and len(images) == 1:
            # batch norm would see one value per channel; two equal images are one
            return super().logits(images.expand(2, -1, -1, -1))[:1]
        return super().logits(images)


class SegFormer(SegmentationNetwork):
    """SegFormer (Xie et al., NeurIPS 2021) through transformers; ``tiny`` is a small one for small tasks.

    Args:
        encoder: one of ``MIT_ENCODERS``, as ``mit-b0``, ``mit_b0`` or ``nvidia/mit-b0``, or a folder with a
            SegFormer's ``config.json``.
        num_classes: number of classes with the background.
    """

    encoder_name = "segformer"

    def __init__(self, encoder: str, num_classes: int) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        name = mit_name(encoder)
        is_folder = False
        with suppress(OSError):  # a name that is too long for any file
            is_folder = (Path(encoder) / "config.json").is_file()
        if name not in MIT_ENCODERS and not is_folder:
            raise NetworkError(
                f"network segformer has no encoder '{encoder:.200}'; choose one of {', '.join(MIT_ENCODERS)}, or a "
                "folder with a SegFormer's config.json"
            )
        try:
            if name in MIT_ENCODERS:
                sizes, depths, decoder = MIT_ENCODERS[name]
                config = SegformerConfig(
                    hidden_sizes=list(sizes),
                    depths=list(depths),
                    num_attention_heads=[1, 2, 4 if name == "tiny" else 5, 8],
                    decoder_hidden_size=decoder,
                )
            else:
                config = SegformerConfig.from_dict(_segformer_values(Path(encoder) / "config.json"))
            config.num_labels = num_classes
            self.model = SegformerForSemanticSegmentation(config)
        except Exception as error:  # what a damaged file raises is up to transformers
            raise NetworkError(
                f"{encoder:.200}/config.json makes no SegFormer: {one_line(error)[:200]}"
            ) from error
        # each stage's keys are shrunk by a convolution that must fit into its features
        strides = accumulate(config.strides, mul)
        self.smallest = 1 + max(
            stride * (ratio - 1) for stride, ratio in zip(strides, config.sr_ratios, strict=False)
        )

    def logits(self, images: Tensor) -> Tensor:
        """At a quarter of the input's size."""
        output: Tensor = self.model(pixel_values=images).logits
        return output


def _segformer_values(path: Path) -> dict[str, Any]:
    """A SegFormer's configuration; a ValueError where one of its numbers is beyond any that was published."""
    values = read_json(path, MAX_CONFIG_BYTES)
    for key, largest in LARGEST.items():
        found = values.get(key, 1)
        numbers = found if isinstance(found, list) else [found]
        if len(numbers) > 16 or not all(type(number) is int and 0 < number <= largest for number in numbers):
            raise ValueError(f"{key} is {found!r:.60}; numbers from 1 to {largest} are built")
    return {key: value for key, value in values.items() if not key.startswith("auto_map")}


def mit_name(encoder: str) -> str:
    """``mit-b0`` for ``mit_b0`` and ``nvidia/mit-b0``; other names as they are."""
    name = encoder.replace("_", "-").removeprefix("nvidia/")
    return name if name in MIT_ENCODERS else encoder


class _Aspp(nn.Module):
    """Four dilated convolutions, summed (Chen et al., "DeepLab", TPAMI 2018, section 3.2)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24)
        )
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.01) if name.endswith("weight") else nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([branch(features) for branch in self.branches]).sum(dim=0)


class DeepLabV2(SegmentationNetwork):
    """DeepLabV2 as papers on weak supervision train it: output stride 8, summed ASPP, frozen batch norm.

    Args:
        encoder: a ResNet of timm, such as ``resnet101``.
        num_classes: number of classes with the background.
    """

    model: nn.ModuleDict
    encoder_name = "backbone"

    def __init__(self, encoder: str, num_classes: int) -> None:
        super().__init__()
        import timm

        if not timm.is_model(encoder) or not encoder.startswith("resnet"):
            raise NetworkError(f"network deeplabv2 takes a ResNet of timm such as resnet101, not '{encoder}'")
        backbone: Any = timm.create_model(
            encoder, features_only=True, output_stride=8, out_indices=(4,), zero_init_last=False
        )
        head = _Aspp(backbone.feature_info.channels()[-1], num_classes)
        self.model = nn.ModuleDict({"backbone": backbone, "head": head})
        self.train(self.training)

    def train(self, mode: bool = True) -> DeepLabV2:
        """As usual, but batch norm keeps the statistics and the weights that it came with."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.eval().requires_grad_(False)
        return self

    def logits(self, images: Tensor) -> Tensor:
        """At an eighth of the input's size."""
        logits: Tensor = self.model["head"](self.model["backbone"](images)[0])
        return logits

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """``logits``, ``logits_0.75`` and ``logits_0.5`` at the sizes the network has them, and ``logits_max``.

        The last is the largest of the three at each place, at the size of ``logits``.
        """
        full = self.logits(images)
        smaller = {
            f"logits_{scale:g}": self.logits(resized(images, scale_factor=scale)) for scale in (0.75, 0.5)
        }
        alike = [full, *(resized(logits, size=full.shape[-2:]) for logits in smaller.values())]
        return {"logits": full, **smaller, "logits_max": torch.stack(alike).amax(dim=0)}

    def parameter_groups(self, lr: float, weight_decay: float, head_factor: float) -> list[dict[str, Any]]:
        """Backbone at ``lr``, ASPP weights at ``head_factor``, ASPP biases at twice that without decay."""
        backbone = [parameter for parameter in self.encoder().parameters() if parameter.requires_grad]
        branches: Any = self.model["head"].branches
        weights, biases = ([getattr(one, name) for one in branches] for name in ("weight", "bias"))
        return [
            {"params": backbone, "lr": lr, "weight_decay": weight_decay},
            {"params": weights, "lr": lr * head_factor, "weight_decay": weight_decay},
            {"params": biases, "lr": lr * head_factor * 2, "weight_decay": 0.0},
        ]


def build_network(
    config: NetworkConfig,
    num_classes: int,
    *,
    class_names: Sequence[str] = (),
    clip: Clip | None = None,
    precision: ResolvedPrecision = "fp32",
    offline: bool = True,
    architecture: Mapping[str, Any] | None = None,
) -> SegmentationNetwork:
    """A network with fresh weights; ``pretrained.load_pretrained`` gives the encoder its own.

    Args:
        config: ``weights`` isn't looked at here.
        num_classes: number of classes with the background.
        class_names: names of mask values 1..C, which ``weakclip`` has prompts of.
        clip: CLIP of ``frozen-clip`` and ``weakclip``, in place of the one that ``config.encoder`` names.
        precision: type of the matrix products of what is frozen.
        offline: choice to fetch no frozen encoder, and no configuration.
        architecture: what a network of transformers is built from, in place of what ``config.encoder`` holds.

    Raises:
        NetworkError: no such network or encoder, or one that is described elsewhere.
        WeightsError: a frozen encoder can't be found or loaded.
    """
    if config.name in ON_CLIP:
        if clip is None:
            clip = load_clip(locate_clip(ClipConfig(weights=config.encoder), offline), torch.device("cpu"))
        if config.name == "weakclip":
            if 1 + len(class_names) != num_classes:
                raise NetworkError(
                    f"network weakclip has prompts of its classes: {num_classes - 1}, with {len(class_names)} names"
                )
            return WeakClip(config.weakclip, class_names, clip, precision)
        dino = load_dino(config.frozen.dino, offline) if config.frozen.dino else None
        return FrozenClip(config.frozen, num_classes, clip, precision, dino)
    if config.name in TRANSFORMERS:
        if architecture is None:
            architecture = read_architecture(config.encoder, offline)
        if config.name == "hf":
            return HfNetwork(architecture, num_classes)
        return MaskClassification(config.name, architecture, num_classes)
    if config.name != "segformer" and _ELSEWHERE.search(config.encoder):
        raise NetworkError(
            f"network {config.name} can't have the encoder '{config.encoder:.100}': a network is built from what is "
            "installed; give a name of timm or segmentation-models-pytorch, such as tu-resnet18"
        )
    if config.name == "deeplabv2":
        return DeepLabV2(config.encoder, num_classes)
    if config.name == "segformer":
        return SegFormer(config.encoder, num_classes)
    return DecoderNetwork(config.name, config.encoder, num_classes)
