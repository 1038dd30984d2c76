"""A frozen DINOv2 (Oquab et al., arXiv 2304.07193) from the hub or a folder, through transformers.

The position table goes to another grid by the size wanted, bicubic. The DINOv2 of torch.hub, which WeCLIP+ was
published with, goes by a factor with an offset of 0.1 where there are no registers: its patches differ a little.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wsss_pipeline.clip.sources import (
    check_file,
    fetch_model,
    file_digest,
    local_path,
    read_config,
    weight_files,
)
from wsss_pipeline.clip.tensor_files import MOST_WEIGHT_BYTES, read_tensor_files, shapes_in, tensors_in
from wsss_pipeline.clip.weights import checked_names, frozen_model, loading
from wsss_pipeline.errors import WeightsError
from wsss_pipeline.files import MIB

OPTION = "network.frozen.dino"
MODEL_TYPES = {
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}  # to the name of the classes
# the largest published one has 1536, 40, 24, 4, 518, 14 and 4 of these
LARGEST = {
    "hidden_size": 8192,
    "num_hidden_layers": 100,
    "num_attention_heads": 128,
    "mlp_ratio": 16,
    "image_size": 4096,
    "patch_size": 64,
    "num_register_tokens": 64,
}
MOST_PARAMETERS = 4 * 10**9  # it has 1.1 billion
# what else of a config.json changes the computation; nothing more of it is handed on
ARCHITECTURE = (*LARGEST, "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn", "use_mask_token")
# names of tensors in files, and as later versions of transformers have them
LATER_NAMES = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "mlp.weights_out.": "mlp.down_proj.",
}
# the one that they have in two halves
WHOLE, FIRST_HALF, SECOND_HALF = "mlp.weights_in.", "mlp.gate_proj.", "mlp.up_proj."

Value = TypeVar("Value")


@dataclass(frozen=True)
class Dino:
    """A loaded DINOv2, frozen, in float32.

    Attributes:
        model: ``Dinov2Model`` or ``Dinov2WithRegistersModel`` of ``transformers``. Of its last hidden state, which is
            after the final LayerNorm, the last tokens are those of the patches, row by row.
        digest: SHA-256 (hexadecimal) of weights and architecture.
    """

    model: Any
    digest: str


def load_dino(weights: str, offline: bool) -> Dino:
    """Find and load one, on the CPU, fetching it from the hub where needed and allowed.

    Args:
        weights: hub id, such as facebook/dinov2-small, or folder with config.json and model.safetensors, or in older
            ones pytorch_model.bin, in which no code is run.
        offline: choice to use only what is on this machine, the hub's own cache included.

    Raises:
        WeightsError: not found, not reachable, damaged, incomplete, or not a DINOv2.
    """
    import transformers as library

    transformers: Any = library
    folder = _folder(weights, offline)
    values = _checked_config(read_config(folder / "config.json"), weights)
    files = weight_files(folder)
    if not files:
        raise WeightsError(f"DINOv2 {weights}: no model.safetensors in {folder}; fetch the weights as well")
    with loading(f"DINOv2 {weights}"):
        class_name = MODEL_TYPES[values["model_type"]]
        kind = getattr(transformers, f"{class_name}Model")
        built = getattr(transformers, f"{class_name}Config")(
            **{key: values[key] for key in ARCHITECTURE if key in values}
        )
        shapes = _also_by_later_names(
            read_tensor_files(files, shapes_in), lambda shape: [(shape[0] // 2, *shape[1:])] * 2
        )
        names = checked_names(kind, built, shapes, weights, "DINOv2")
        parameters = sum(math.prod(shapes[name]) for name in names)
        if parameters > MOST_PARAMETERS:
            raise WeightsError(
                f"DINOv2 {weights}: its configuration calls for {parameters:,} parameters; none has so many"
            )
        for path in files:  # as 64-bit numbers, twice over; what is small needs no check
            check_file(path, 16 * parameters + 256 * MIB)
        tensors = _also_by_later_names(
            read_tensor_files(files, tensors_in), lambda tensor: list(tensor.chunk(2))
        )
        model = frozen_model(kind, built, names, tensors)
    return Dino(model, _digest(files, values))


def _folder(weights: str, offline: bool) -> Path:
    path = local_path(weights, OPTION)
    if path.exists() and not path.is_dir():
        raise WeightsError(f"{OPTION} {weights} is a file; give the folder of a DINOv2, or a hub id")
    if not path.is_dir():
        if weights.count("/") != 1 or weights[:1] in (".", "/", "~"):
            raise WeightsError(
                f"{OPTION} {weights} doesn't exist; give a folder or a hub id, such as facebook/dinov2-small"
            )
        path = fetch_model(weights, offline)
    if not (path / "config.json").exists():
        raise WeightsError(
            f"{OPTION} {weights}: no config.json in {path}; give a Hugging Face folder of a DINOv2"
        )
    return path


def _checked_config(values: dict[str, Any], weights: str) -> dict[str, Any]:
    """The content of a config.json whose numbers are those of a model that can be built."""
    found = values.get("model_type")
    if not isinstance(found, str) or found not in MODEL_TYPES:
        raise WeightsError(
            f"{OPTION} {weights} is of type {found!s:.60}, not one of {', '.join(MODEL_TYPES)}; give a DINOv2, such "
            "as facebook/dinov2-small"
        )
    for key, largest in LARGEST.items():
        lowest = 0 if key == "num_register_tokens" else 1
        number = values.get(key, 1)
        if type(number) is not int or not lowest <= number <= largest:
            raise WeightsError(
                f"DINOv2 {weights}: its config.json has {number!r:.60} for {key}; whole numbers from {lowest} to "
                f"{largest} are built"
            )
    if values.get("patch_size", 1) > values.get("image_size", LARGEST["image_size"]):
        raise WeightsError(f"DINOv2 {weights}: its config.json has a patch_size beyond its image_size")
    return values


def _also_by_later_names(
    found: Mapping[str, Value], halves: Callable[[Value], list[Value]]
) -> dict[str, Value]:
    """What files hold, under each name that some version of transformers has for it."""
    named = dict(found)
    for name, value in found.items():
        for former, later in LATER_NAMES.items():
            named[name.replace(former, later)] = value
        if WHOLE in name:
            named[name.replace(WHOLE, FIRST_HALF)], named[name.replace(WHOLE, SECOND_HALF)] = halves(value)
    return named


def _digest(files: tuple[Path, ...], values: Mapping[str, Any]) -> str:
    content = {
        "weights": [file_digest(path, MOST_WEIGHT_BYTES) for path in files],
        "architecture": {key: values[key] for key in ("model_type", *ARCHITECTURE) if key in values},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
