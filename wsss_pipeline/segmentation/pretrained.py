"""Weights that a network starts from: by name, or from a file or folder of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.errors import NetworkError
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.segmentation.networks import DeepLabV2, SegFormer, SegmentationNetwork, mit_name
from wsss_pipeline.segmentation.train_config import NetworkConfig

_ADVICE = "give a file or folder with --weights, or train from scratch with --weights none"
_LEAST_SHARE = 0.5  # of an encoder's tensors that a file must hold to be its weights
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "segformer.", "")


def load_pretrained(network: SegmentationNetwork, config: NetworkConfig, offline: bool = False) -> None:
    """Gives the encoder the weights that ``config.weights`` names; ``none`` leaves it as it is.

    Tensors are copied where names and shapes fit; names may carry the prefix of a larger model.

    Raises:
        NetworkError: the weights can't be found or fetched, or aren't those of this encoder.
    """
    weights, encoder = config.weights, config.encoder
    path = Path(weights).expanduser()
    if weights == "none":
        return
    if path.exists():
        state = _read(path)
    elif weights not in ("imagenet", "coco"):
        raise NetworkError(
            f"weights '{weights}' don't exist; choose imagenet, coco, none, a file or a folder"
        )
    elif offline:
        raise NetworkError(f"{weights} weights of {encoder} can't be fetched offline; {_ADVICE}")
    else:
        state = _fetch(network, config)
    own = network.encoder().state_dict()
    best: dict[str, Tensor] = {}
    # the encoder may itself be a wrapper around the model that the file is of
    for mine in ("", "model."):
        for theirs in _PREFIXES:
            names = {mine + n.removeprefix(theirs): v for n, v in state.items() if n.startswith(theirs)}
            fitting = {n: v for n, v in names.items() if n in own and own[n].shape == v.shape}
            best = max(best, fitting, key=len)
    if len(best) < _LEAST_SHARE * len(own):
        raise NetworkError(
            f"weights {weights} fit {len(best)} of the {len(own)} tensors of {encoder}: they are another network's; "
            "give those of this encoder"
        )
    network.encoder().load_state_dict(best, strict=False)


def _fetch(network: SegmentationNetwork, config: NetworkConfig) -> Mapping[str, Tensor]:
    weights, encoder, mit = config.weights, config.encoder, mit_name(config.encoder)
    fitting = ""
    if weights == "coco" and not (isinstance(network, DeepLabV2) and encoder in ("resnet50", "resnet101")):
        fitting = "deeplabv2 with resnet50 or resnet101"
    elif isinstance(network, SegFormer) and not mit.startswith("mit-b"):
        fitting = "mit-b0 to mit-b5"
    if fitting:
        raise NetworkError(
            f"there are no {weights} weights for {config.name} with {encoder}, only for {fitting}; {_ADVICE}"
        )
    found: nn.Module
    try:
        if weights == "coco":
            from torchvision.models import segmentation

            published = getattr(segmentation, f"DeepLabV3_{encoder.replace('resnet', 'ResNet')}_Weights")
            state: Mapping[str, Tensor] = published.DEFAULT.get_state_dict(progress=False, weights_only=True)
            return state
        if isinstance(network, DeepLabV2):
            import timm

            found = timm.create_model(encoder, pretrained=True)
        elif isinstance(network, SegFormer):
            from transformers import SegformerModel

            found = SegformerModel.from_pretrained(f"nvidia/{mit}")
        else:
            import segmentation_models_pytorch as smp

            found = smp.encoders.get_encoder(encoder, weights="imagenet")
        return found.state_dict()
    except Exception as error:  # the hub, its mirrors and the disk fail in many ways; all mean the same
        reason = one_line(error)[:200]
        raise NetworkError(
            f"{weights} weights of {encoder} couldn't be fetched ({reason}); {_ADVICE}"
        ) from error


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        files = sorted(file for ending in ("safetensors", "pth", "bin") for file in path.glob(f"*.{ending}"))
        if not files:
            raise NetworkError(f"weights {path}: no .safetensors, .pth or .bin file in this folder")
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is up to its format
        raise NetworkError(f"weights {path} can't be read as tensors: {one_line(error)[:200]}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict):
        raise NetworkError(f"weights {path} hold no tensors by name")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
