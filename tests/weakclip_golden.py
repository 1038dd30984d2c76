"""What the tests against WeakCLIP's published code share: its network with the weights of the golden files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.tensor_names import BLOCK_NAMES, NAMES, TRANSPOSED
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, normalise
from wsss_pipeline.segmentation.train_config import WeakClipConfig
from wsss_pipeline.segmentation.weakclip import WeakClip

GOLDEN = Path(__file__).parent / "golden"
SMALL_NAMES = ("aeroplane", "cat", "person", "pottedplant")
TRAINED_LAYER = 2  # of the published three

_DECODER = "model.decoder."
_OWN = (
    (r"^(contexts|gamma|beta)$", rf"{_DECODER}\1"),
    (r"^neck\.lateral_convs\.(\d)\.conv", rf"{_DECODER}neck.lateral.\1"),
    (r"^neck\.fpn_convs\.(\d)\.conv", rf"{_DECODER}neck.smooth.\1"),
    (r"^decode_head\.conv_seg", f"{_DECODER}head.classify"),
    (r"^context_decoder\.", f"{_DECODER}coattention."),
    (r"\.memory_proj\.", ".memory."),
    (r"\.text_proj\.", ".queries."),
    (r"\.anti_out_proj\.", ".visual_out."),
    (r"coattention\.out_proj\.", "coattention.text_out."),
    (r"\.anti_decoder\.(\d)\.", r".visual_layers.\1."),
    (r"\.decoder\.(\d)\.", r".text_layers.\1."),
    (r"_attn\.proj\.", "_attn.out_proj."),
)
_BRANCH = re.compile(r"decode_head\.scale_heads\.(\d)\.(\d)\.(conv|bn)\.(.+)")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def own_names(published: str, *, stacked: bool = False) -> list[str]:
    """Names here of a published tensor: three for one of queries, keys and values; none for what never acts."""
    if match := re.match(r"backbone\.fpn(\d)(\..+)", published):
        return [f"{_DECODER}adapter.{int(match[1]) - 1}{match[2]}"]
    if match := _BRANCH.match(published):
        return [f"{_DECODER}head.branches.{match[1]}.{int(match[2]) // 2}.{int(match[3] == 'bn')}.{match[4]}"]
    for prefix, tower, root in (("backbone.", "vision", "visual."), ("text_encoder.", "text", "")):
        if published.startswith(prefix):
            name = root + published.removeprefix(prefix)
            if own := {**NAMES, **TRANSPOSED}.get(name):
                return [f"model.{tower}.{own}"]
            match = _BLOCK.fullmatch(name)
            assert match is not None, published
            layer = f"model.{tower}.{tower}_model.encoder.layers.{match[2]}"
            if match[3] == "attn.in_proj":
                return [f"{layer}.self_attn.{part}_proj.{match[4]}" for part in "qkv"]
            return [f"{layer}.{BLOCK_NAMES[match[3]]}.{match[4]}"]
    for pattern, name in _OWN:
        published = re.sub(pattern, name, published)
    if stacked or not (match := re.search(r"_layers\.(\d)", published)):
        return [published]
    return [published.replace(match[0], "_layers.0")] if int(match[1]) == TRAINED_LAYER else []


def own_value(published: str, value: Tensor) -> Tensor:
    """A tensor, or its gradient, as it lies here."""
    return value.T if published in ("backbone.proj", "text_encoder.text_projection") else value


def small_clip() -> Clip:
    """The small set's towers, and a tokenizer that knows its names alone."""
    vision = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    tensors = load_file(GOLDEN / "weakclip" / "weights.safetensors")
    rows = tensors["text_encoder.token_embedding.rows"].float()
    width = rows.shape[1]
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(rows),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=13,
            projection_dim=64,
            hidden_act="quick_gelu",
            bos_token_id=len(rows) - 2,
            eos_token_id=len(rows) - 1,
        )
    )
    state: dict[str, Tensor] = {"text_model.embeddings.token_embedding.weight": rows}
    for name, value in tensors.items():
        if name.startswith("text_encoder.") and not name.endswith(".rows"):
            own = own_names(name)
            parts = own_value(name, value.float()).chunk(len(own))
            state |= dict(zip((one.removeprefix("model.text.") for one in own), parts, strict=True))
    text.load_state_dict(state)
    stored = np.load(GOLDEN / "weakclip" / "golden.npz")
    places = {int(token): place for place, token in enumerate(stored["token_ids"])}
    ids = {
        name: [places[int(token)] for token in row[: row.argmax() + 1]]
        for name, row in zip(("background", *SMALL_NAMES), stored["text_ids"], strict=True)
    }

    def tokenizer(name: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": ids[name]}

    towers: list[Any] = [vision, text]
    return Clip(*(tower.requires_grad_(False).eval() for tower in towers), tokenizer, 90.0)


def published_network(large: Path | None = None, **changes: Any) -> WeakClip:
    """WeakCLIP as published, without what is drawn in training, in evaluation mode.

    Args:
        large: folder of all golden files, for VOC's 20 classes; None for the small set's four.
        changes: other settings.
    """
    folder = GOLDEN / "weakclip" if large is None else large / "weakclip"
    names, clip = SMALL_NAMES, None
    if large is not None:
        names = load_class_set("voc12").names
        files = locate_clip(ClipConfig(weights=str(large / "clip_es" / "model")), offline=True)
        clip = load_clip(files, torch.device("cpu"))
    tensors = load_file(folder / "weights.safetensors")
    config = WeakClipConfig.model_validate(
        {
            "clip": "published",
            "adapter": "published",
            "width": 32 if large is None else 128,
            "heads": 2 if large is None else 4,
            "channels": 24 if large is None else 64,
            "dropout": 0,
            "stochastic_depth": 0,
            **changes,
        }
    )
    network = WeakClip(config, names, clip or small_clip(), "fp32").eval()
    state = {
        own: own_value(name, value.float())
        for name, value in tensors.items()
        if not name.startswith("text_encoder.")
        for own in own_names(name, stacked=config.coattention == "stacked")
    }
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("model.vision.", "model.text.")) or "num_batches" in name for name in missing)
    return network


def pixels(images: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    return torch.stack([normalise(image, IMAGENET_STATISTICS) for image in images])


def gradient_norms(network: WeakClip, names: list[str]) -> Mapping[str, float]:
    """Euclidean norms by published names."""
    parameters = dict(network.named_parameters())
    norms = {}
    for name in names:
        parts = [parameters[own].grad for own in own_names(name)]
        norms[name] = sum(float(part.double().square().sum()) for part in parts if part is not None) ** 0.5
    return norms


def expected_norms(folder: Path) -> Any:
    return json.loads((folder / "gradient_norms.json").read_text())
