"""Weights that a network starts from: by name, or from a file or folder of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from wsss_pipeline.clip.tensor_files import shapes_in, tensors_in
from wsss_pipeline.errors import NetworkError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.segmentation.clip_network import ClipNetwork
from wsss_pipeline.segmentation.hf_networks import TransformersNetwork
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import DeepLabV2, SegFormer, mit_name
from wsss_pipeline.segmentation.train_config import NetworkConfig

Value = TypeVar("Value")

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
    if weights == "none" or (isinstance(network, ClipNetwork) and weights == "imagenet"):
        return  # CLIP came with its own
    if isinstance(network, TransformersNetwork):
        network.load_weights(encoder if weights == "imagenet" else weights, offline)
        return
    if path.exists():
        path = _weight_file(path)
        shapes = _read(path, shapes_in)
    elif weights not in ("imagenet", "coco"):
        raise NetworkError(
            f"weights '{weights}' don't exist; choose imagenet, coco, none, a file or a folder"
        )
    elif offline:
        raise NetworkError(f"{weights} weights of {encoder} can't be fetched offline; {_ADVICE}")
    else:
        state = _fetch(network, config)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
    own = network.encoder().state_dict()
    best: dict[str, str] = {}  # name in the encoder to name in the file
    # the encoder may itself be a wrapper around the model that the file is of
    for mine in ("", "model."):
        for theirs in _PREFIXES:
            names = {mine + name.removeprefix(theirs): name for name in shapes if name.startswith(theirs)}
            fitting = {
                name: stored
                for name, stored in names.items()
                if name in own and tuple(own[name].shape) == shapes[stored]
            }
            best = max(best, fitting, key=len)
    if len(best) < _LEAST_SHARE * len(own):
        raise NetworkError(
            f"weights {weights} fit {len(best)} of the {len(own)} tensors of {encoder}: they are another network's; "
            "give those of this encoder"
        )
    if path.exists():
        # only now: a file that takes no room on the disk may be larger than the memory
        state = _read(path, tensors_in)
    network.encoder().load_state_dict({name: state[stored] for name, stored in best.items()}, strict=False)


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


def _weight_file(path: Path) -> Path:
    """The file itself, or the first of a folder."""
    if not path.is_dir():
        return path
    files = sorted(file for ending in ("safetensors", "pth", "bin") for file in path.glob(f"*.{ending}"))
    if not files:
        raise NetworkError(f"weights {path}: no .safetensors, .pth or .bin file in this folder")
    return files[0]


def _read(path: Path, read: Callable[[Path], dict[str, Value]]) -> dict[str, Value]:
    try:
        return read(path)
    except MemoryError:
        raise
    except Exception as error:  # what a damaged or hostile file raises is up to its format
        check_machine(error)
        reason = one_line(getattr(error, "strerror", None) or error, 200)
        raise NetworkError(f"weights {path} can't be read as tensors: {reason}") from error
