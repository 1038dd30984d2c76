"""OpenAI's names of CLIP's tensors in those of ``transformers``, and the architecture that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wsss_pipeline.errors import WeightsError

END_OF_TEXT = 49407
HEAD_WIDTH = 64  # in every CLIP that OpenAI published

BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def to_hugging_face(tensors: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration values for ``CLIPConfig``, and the tensors in float32 under the library's names.

    Heads are 64 wide and the activation is QuickGELU, as in all of OpenAI's models; tensors don't tell. An
    OpenCLIP checkpoint has the same names and may have other ones: load it from its Hugging Face folder.

    Raises:
        WeightsError: no vision transformer CLIP: a ResNet, or something else; the message names ``origin``.
    """
    if "visual.layer1.0.conv1.weight" in tensors:
        raise WeightsError(f"{origin} is a ResNet CLIP; CAMs here need a vision transformer (ViT)")
    try:
        return _configuration(tensors), _renamed(tensors)
    except KeyError as error:
        raise WeightsError(f"{origin} isn't an OpenAI CLIP: it has no tensor {error}") from error
    except (IndexError, ValueError) as error:
        raise WeightsError(f"{origin} isn't an OpenAI CLIP: a tensor has the wrong shape") from error


def _configuration(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    patches = tensors["visual.conv1.weight"]
    vision_width, _, patch_size, _ = patches.shape
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    projection = tensors["text_projection"].shape[1]
    return {
        "projection_dim": projection,
        "vision_config": {
            **_transformer(tensors, "visual.transformer", vision_width),
            "patch_size": patch_size,
            "image_size": side * patch_size,
            "projection_dim": projection,
        },
        "text_config": {
            **_transformer(tensors, "transformer", text_width),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "projection_dim": projection,
            "eos_token_id": min(END_OF_TEXT, vocabulary - 1),
        },
    }


def _transformer(tensors: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, Any]:
    block = re.compile(rf"{prefix}\.resblocks\.\d+\.ln_1\.weight")
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{prefix}.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": sum(block.fullmatch(name) is not None for name in tensors),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.float()
        if name in NAMES:
            renamed[NAMES[name]] = value
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = value.T.contiguous()
        elif match := BLOCK.fullmatch(name):
            layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
            if match[3] == "attn.in_proj":
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{part}_proj.{match[4]}"] = piece
            elif match[3] in BLOCK_NAMES:
                renamed[f"{layer}.{BLOCK_NAMES[match[3]]}.{match[4]}"] = value
    return renamed
