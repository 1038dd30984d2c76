"""Segment Anything and its kin as predictors of masks, from the hub or a folder, through transformers.

SAM (Kirillov et al., ICCV 2023), SAM-HQ (Ke et al., NeurIPS 2023) and SAM 2 (Ravi et al., arXiv 2408.00714), of any
size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, PixelStatistics, normalise, resize
from wsss_pipeline.errors import WeightsError
from wsss_pipeline.files import MIB
from wsss_pipeline.regions.proposals import Predictor
from wsss_pipeline.runtime.output import one_line


class Family(NamedTuple):
    """How models of a type are built, and what they see.

    Attributes:
        name: beginning of its classes' names in ``transformers``.
        is_square: whether a picture is squashed to a square; else its longest side is fitted and the rest is zero.
        backbone: type of the network inside their vision encoder, where it is one of its own.
    """

    name: str
    is_square: bool
    backbone: str | None = None


# by the type in config.json; published models of the second generation are stored with their parts for video
FAMILIES = {
    "sam": Family("Sam", False),
    "sam_hq": Family("SamHQ", False),
    "sam2": Family("Sam2", True, "sam2_hiera_det_model"),
    "sam2_video": Family("Sam2", True, "sam2_hiera_det_model"),
}
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
# what of them changes the computation, at any depth; nothing more is handed on
ARCHITECTURE = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size"),
    *("hidden_act", "layer_norm_eps", "mlp_ratio", "mlp_dim", "qkv_bias", "use_abs_pos", "use_rel_pos"),
    *("window_size", "global_attn_indexes", "num_pos_feats", "output_channels", "image_embedding_size"),
    *("mask_input_channels", "num_point_embeddings", "attention_downsample_rate", "num_multimask_outputs"),
    *("iou_head_depth", "iou_head_hidden_dim", "vit_dim", "backbone_config", "backbone_channel_list"),
    *("backbone_feature_sizes", "fpn_hidden_size", "fpn_kernel_size", "fpn_stride", "fpn_padding"),
    *("fpn_top_down_levels", "num_feature_levels", "patch_kernel_size", "patch_stride", "patch_padding"),
    *(
        "query_stride",
        "window_positional_embedding_background_size",
        "num_query_pool_stages",
        "blocks_per_stage",
    ),
    *(
        "embed_dim_per_stage",
        "num_attention_heads_per_stage",
        "window_size_per_stage",
        "global_attention_blocks",
    ),
}
DEPTHS = {"num_hidden_layers", "iou_head_depth", "blocks_per_stage", "num_query_pool_stages"}
MOST_LAYERS, LARGEST_NUMBER = (
    200,
    16_384,
)  # the largest published one has 48 layers, and no number beyond 5120
MOST_PARAMETERS = 4 * 10**9  # it has 0.64 billion
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
# half a gigabyte and two, with the decoder's activations
POINTS_PER_BATCH = {"cpu": 16, "cuda": 64}

Value = TypeVar("Value")


class SamPredictor:
    """A ``Predictor``: one of these models, frozen, in float32.

    Attributes:
        description: text for people.
        digest: SHA-256 (hexadecimal) of weights, architecture and pixel statistics.
        points_per_batch: number of points whose answers fit into memory together.
        side: of the square that the model sees, pixels.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        *,
        statistics: PixelStatistics,
        side: int,
        description: str,
        digest: str,
    ) -> None:
        self.description, self.digest, self.side = description, digest, side
        self.points_per_batch = POINTS_PER_BATCH.get(model.device.type, 1)
        self._model, self._family, self._statistics = model, family, statistics
        self._crop_size = self._input_size = (0, 0)
        self._embeddings: dict[str, Any] = {}
        self._iou: Tensor | None = None
        if family.name == "SamHQ":
            model.mask_decoder.iou_prediction_head.register_forward_hook(self._note_iou)

    @torch.no_grad()
    def encode(self, crop: NDArray[np.uint8]) -> None:
        """See ``Predictor``."""
        height, width = self._crop_size = (crop.shape[0], crop.shape[1])
        scale = self.side / max(height, width)
        self._input_size = (
            (self.side, self.side)
            if self._family.is_square
            else (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        )
        resized = resize(np.ascontiguousarray(crop), *self._input_size[::-1], Image.Resampling.BILINEAR)
        pixels = normalise(resized, self._statistics)
        # zeros on the right and below, after the mean was taken off
        pixels = F.pad(pixels, (0, self.side - pixels.shape[2], 0, self.side - pixels.shape[1]))
        self._embeddings = _embeddings(self._model, pixels[None].to(self._model.device))

    @torch.no_grad()
    def predict(self, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """See ``Predictor``."""
        scale = np.array(self._input_size[::-1]) / self._crop_size[::-1]
        scaled = torch.from_numpy((points * scale).astype(np.float32)).to(self._model.device)
        found = self._model(input_points=scaled[None, :, None], multimask_output=True, **self._embeddings)
        logits, iou = found.pred_masks[0], found.iou_scores[0]
        if self._iou is not None:  # SAM-HQ's masks come by falling IoU, and no longer tell their level
            iou = self._iou[0, :, 1:]
            logits = logits[torch.arange(len(points))[:, None], iou.argsort(descending=True).argsort()]
        return logits, iou

    def _note_iou(self, _module: Any, _inputs: Any, iou: Tensor) -> None:
        self._iou = iou

    def enlarge(self, logits: Tensor) -> Tensor:
        """See ``Predictor``; SAM's logits go to the size that it saw first, where the padding is cut off."""
        full = logits[:, None]
        if not self._family.is_square:
            full = F.interpolate(full, (self.side, self.side), mode="bilinear", align_corners=False)
            full = full[..., : self._input_size[0], : self._input_size[1]]
        return F.interpolate(full, self._crop_size, mode="bilinear", align_corners=False)[:, 0]


def load_predictor(name: str, device: torch.device, *, offline: bool) -> Predictor:
    """Find and load a model, fetching it from the hub where needed and allowed.

    Args:
        name: hub id, such as facebook/sam-vit-huge, or folder with config.json and model.safetensors, or in older
            ones pytorch_model.bin, in which no code is run.
        device: place of the model.
        offline: choice to use only what is on this machine, the hub's own cache included.

    Raises:
        WeightsError: not found, not reachable, damaged, incomplete, or not of a known type.
    """
    import transformers as library

    transformers: Any = library
    folder = _folder(name, offline)
    values = read_config(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise WeightsError(
            f"--sam {name} is of type {kind!s:.60}; known are {', '.join(FAMILIES)}; give one of these, such as "
            "facebook/sam-vit-huge"
        )
    family = FAMILIES[kind]
    parts = {part: _architecture(values[part], name) for part in PARTS if isinstance(values.get(part), dict)}
    if family.backbone is not None:  # no other, whatever the file says
        backbone = parts.setdefault("vision_config", {}).setdefault("backbone_config", {})
        backbone["model_type"] = family.backbone
    files = weight_files(folder)
    if not files:
        raise WeightsError(f"--sam {name}: no model.safetensors in {folder}; fetch the weights as well")
    with loading(f"SAM {name}"):
        config = getattr(transformers, f"{family.name}Config")(**parts)
        side = config.prompt_encoder_config.image_size
        statistics = _pixel_statistics(folder, name)
        model_type = getattr(transformers, f"{family.name}Model")
        shapes = _with_tied(read_tensor_files(files, shapes_in))
        names = checked_names(model_type, config, shapes, name, "SAM")
        _rehearse(model_type, config, side, name)
        parameters = sum(math.prod(shapes[key]) for key in names)
        if parameters > MOST_PARAMETERS:
            raise WeightsError(
                f"--sam {name}: its configuration calls for {parameters:,} parameters; none has so many"
            )
        for path in files:  # as 64-bit numbers, twice over; what is small needs no check
            check_file(path, 16 * parameters + 256 * MIB)
        tensors = _with_tied(read_tensor_files(files, tensors_in))
        model = frozen_model(model_type, config, names, tensors).to(device)
    content = {
        "weights": [file_digest(path, MOST_WEIGHT_BYTES) for path in files],
        "architecture": {"family": family.name, **parts},
        "statistics": statistics,
    }
    return SamPredictor(
        model,
        family,
        statistics=statistics,
        side=side,
        description=f"{family.name} {name}",
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    )


def _embeddings(model: Any, pixels: Tensor) -> dict[str, Any]:
    """What a model takes of a picture, float (1, 3, side, side), beside points."""
    found = model.get_image_embeddings(pixels)
    if model.config.model_type == "sam_hq":
        return {"image_embeddings": found[0], "intermediate_embeddings": found[1]}
    return {"image_embeddings": found}


def _folder(name: str, offline: bool) -> Path:
    path = local_path(name, "--sam")
    if path.exists() and not path.is_dir():
        raise WeightsError(f"--sam {name} is a file; give the folder of a SAM, or a hub id")
    if not path.is_dir():
        if name.count("/") != 1 or name[:1] in (".", "/", "~"):
            raise WeightsError(
                f"--sam {name} doesn't exist; give a folder or a hub id, such as facebook/sam-vit-huge"
            )
        path = fetch_model(name, offline, PROCESSOR_FILES)
    if not (path / "config.json").exists():
        raise WeightsError(f"--sam {name}: no config.json in {path}; give a Hugging Face folder of a SAM")
    return path


def _architecture(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a part of a config.json says of the computation, with numbers of a model that can be built."""
    kept = {key: value for key, value in values.items() if key in ARCHITECTURE and value is not None}
    for key, value in kept.items():
        if isinstance(value, dict):
            kept[key] = _architecture(value, name)
            continue
        numbers = list(_numbers(value))
        most = MOST_LAYERS if key in DEPTHS else LARGEST_NUMBER
        is_sound = all(0 <= number <= most for number in numbers) and len(numbers) <= MOST_LAYERS
        if not is_sound or (isinstance(value, str) and not re.fullmatch(r"[\w.]{1,60}", value)):
            raise WeightsError(f"--sam {name}: its config.json has {value!r:.60} for {key}; fetch it again")
    return kept


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


@torch.no_grad()
def _rehearse(model_type: Any, config: Any, side: int, name: str) -> None:
    """A WeightsError where a model of this configuration can't be run; computes nothing, and needs no weights."""
    with torch.device("meta"):
        model = model_type(config).eval()
        try:
            embeddings = _embeddings(model, torch.empty(1, 3, side, side))
            found = model(input_points=torch.empty(1, 2, 1, 2), **embeddings)
        except Exception as error:  # whatever sizes that don't fit bring about
            raise WeightsError(
                f"--sam {name}: the parts of its config.json don't fit: {one_line(error, 100)}; fetch it again"
            ) from error
    masks = found.pred_masks.shape[2]
    if masks != 3:
        raise WeightsError(f"--sam {name} gives {masks} masks a point; three are asked for")


def _pixel_statistics(folder: Path, name: str) -> PixelStatistics:
    """Those that the model's own files say, else those of ImageNet, which all published models have."""
    for path in map(folder.joinpath, PROCESSOR_FILES):
        if not path.exists():
            continue
        values = read_config(path)
        values = values.get("image_processor", values)
        mean, std = values.get("image_mean"), values.get("image_std")
        if mean is None or std is None:
            continue
        for numbers, lowest in ((mean, -10), (std, 1e-3)):
            if not (
                isinstance(numbers, list)
                and len(numbers) == 3
                and all(isinstance(number, int | float) and lowest <= number <= 10 for number in numbers)
            ):
                raise WeightsError(
                    f"--sam {name}: {path.name} has {numbers!r:.60} for a mean or deviation of pixels; fetch it again"
                )
        return PixelStatistics((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    return IMAGENET_STATISTICS


def _with_tied(found: Mapping[str, Value]) -> dict[str, Value]:
    """What files hold, with the one tensor that models share under both its names."""
    named = dict(found)
    for one, other in (TIED, TIED[::-1]):
        if one in named:
            named.setdefault(other, named[one])
    return named
