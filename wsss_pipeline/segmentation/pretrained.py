"""Weights that a network starts from: by name, or from a file or folder of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.errors import NetworkError
from wsss_pipeline.segmentation.networks import DeepLabV2, SegFormer, SegmentationNetwork, mit_name
from wsss_pipeline.segmentation.train_config import NetworkConfig

_ADVICE = "give a file or folder with --weights, or train from scratch with --weights none"
_LEAST_SHARE = 0.5  # of an encoder's tensors that a file must hold to be its weights
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "segformer.", "")


def load_pretrained(network: SegmentationNetwork, config: NetworkConfig, offline: bool = False) -> None:
    """Gives the encoder the weights that ``config.weights`` names; ``none`` leaves it as it is.

    Raises:
        NetworkError: the weights can't be found or fetched, or aren't those of this encoder.
    """
    path = Path(config.weights).expanduser()
    if config.weights == "none":
        return
    if path.exists():
        state = _read_state(path)
    elif config.weights not in ("imagenet", "coco"):
        raise NetworkError(
            f"weights '{config.weights}' don't exist; choose imagenet, coco, none, a file or a folder"
        )
    elif offline:
        raise NetworkError(
            f"{config.weights} weights of {config.encoder} can't be fetched offline; {_ADVICE}"
        )
    else:
        try:
            state = _fetch(network, config)
        except NetworkError:
            raise
        except Exception as error:  # the hub, its mirrors and the disk fail in many ways; all mean the same
            reason = " ".join(str(error).split())[:200]
            raise NetworkError(
                f"{config.weights} weights of {config.encoder} couldn't be fetched ({reason}); {_ADVICE}"
            ) from error
    _load_encoder(network.encoder(), state, config)


def _fetch(network: SegmentationNetwork, config: NetworkConfig) -> Mapping[str, Tensor]:
    if config.weights == "coco":
        if not isinstance(network, DeepLabV2) or config.encoder not in ("resnet50", "resnet101"):
            raise NetworkError(
                f"there are no coco weights for {config.name} with {config.encoder}, only for deeplabv2 with "
                "resnet50 or resnet101; choose imagenet, or give a file"
            )
        from torchvision.models import segmentation

        weights = getattr(segmentation, f"DeepLabV3_{config.encoder.replace('resnet', 'ResNet')}_Weights")
        state: Mapping[str, Tensor] = weights.DEFAULT.get_state_dict(progress=False, weights_only=True)
        return state
    found: nn.Module
    if isinstance(network, DeepLabV2):
        import timm

        found = timm.create_model(config.encoder, pretrained=True)
    elif isinstance(network, SegFormer):
        name = mit_name(config.encoder)
        if not name.startswith("mit-b"):
            raise NetworkError(
                f"there are no imagenet weights for segformer with {config.encoder}, only for mit-b0 to mit-b5; "
                f"{_ADVICE}"
            )
        from transformers import SegformerModel

        found = SegformerModel.from_pretrained(f"nvidia/{name}")
    else:
        import segmentation_models_pytorch as smp

        found = smp.encoders.get_encoder(config.encoder, weights="imagenet")
    return found.state_dict()


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        found = sorted([*path.glob("*.safetensors"), *path.glob("*.pth"), *path.glob("*.bin")])
        if not found:
            raise NetworkError(f"weights {path}: no .safetensors, .pth or .bin file in this folder")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is up to its format
        reason = " ".join(str(error).split())[:200]
        raise NetworkError(f"weights {path} can't be read as tensors: {reason}") from error
    inner: Any = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else {}
    if not isinstance(inner, dict):
        raise NetworkError(f"weights {path} hold no tensors by name")
    state = inner
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], config: NetworkConfig) -> None:
    """Copies the tensors whose names and shapes fit; names may carry the prefix of a larger model."""
    own = encoder.state_dict()
    best: dict[str, Tensor] = {}
    # the encoder may itself be a wrapper around the model that the file is of
    for mine in ("", "model."):
        for theirs in _PREFIXES:
            names = {mine + n.removeprefix(theirs): v for n, v in state.items() if n.startswith(theirs)}
            fitting = {n: v for n, v in names.items() if n in own and own[n].shape == v.shape}
            best = max(best, fitting, key=len)
    if len(best) < _LEAST_SHARE * len(own):
        raise NetworkError(
            f"weights {config.weights} fit {len(best)} of the {len(own)} tensors of {config.encoder}: they are "
            "another network's; give those of this encoder"
        )
    encoder.load_state_dict(best, strict=False)
