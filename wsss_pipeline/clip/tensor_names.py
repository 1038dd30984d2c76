"""Names of CLIP's tensors: OpenAI's and OpenCLIP's in those of ``transformers``, and what shapes tell of a model.

Shapes don't tell all: see ``Form``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss_pipeline.errors import WeightsError
from wsss_pipeline.runtime.output import one_line

END_OF_TEXT = 49407


class Form(NamedTuple):
    """What a CLIP computes with and its tensors don't tell, of image and text tower.

    Attributes:
        activations: the MLPs' activation by its name in ``transformers``: ``quick_gelu``, ``gelu``.
        head_widths: width of an attention head.
    """

    activations: tuple[str, str]
    head_widths: tuple[int, int]


# of every CLIP that OpenAI published
OPENAI_FORM = Form(("quick_gelu", "quick_gelu"), (64, 64))

BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PATCHES = "vision_model.embeddings.patch_embedding.weight"
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": PATCHES,
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
# what the library has beside the blocks
OWN_NAMES = {*NAMES.values(), *TRANSPOSED.values()}
OWN_BLOCK = re.compile(
    r"(vision|text)_model\.encoder\.layers\.\d+\."
    r"(layer_norm[12]|mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)\.(weight|bias)"
)
# numbers that say what shapes say anyway, masks, and the bias of sigmoid losses, which no softmax over texts sees
IDLE = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "logit_bias")
OF_A_TOWER = ("visual", "vision_model", "text", "transformer", "positional_embedding")
# where a CLIP's names begin, behind whatever a program puts before them; one of them is in each
ANCHORS = ("visual.conv1.weight", PATCHES)
OTHER_MODELS = (
    (r"(^|\.)lora_|\.base_layer\.", "has the parts of LoRA adapters; merge them into the CLIP first"),
    (r"(^|\.)visual\.layer1\.", "is a ResNet CLIP; CAMs here need a vision transformer (ViT)"),
    (r"(^|\.)visual\.trunk\.", "has an image tower of timm (SigLIP, EVA, ConvNeXt), which isn't read"),
    (r"(^|\.)visual\.(blocks|patch_embed)\.", "has an image tower of EVA, which isn't read"),
    (r"(^|\.)vision_model\.head\.", "is a SigLIP, which has no class token"),
    (
        r"(^|\.)positional_embedding_res$|\.position_embedding_res\.",
        "is a LongCLIP, with two position tables",
    ),
    (r"(^|\.)(visual|vision_model)\..*attn_?pool", "pools by attention (CoCa, SigLIP), not by a class token"),
)
MEND = "give a CLIP with a ViT, such as openai/clip-vit-base-patch16"


def plain_names(names: Collection[str], origin: str) -> tuple[dict[str, str], list[str]]:
    """Names as they are stored to a CLIP's own, of OpenAI or ``transformers``; and those that are no part of a CLIP.

    What programs put before all names, such as ``module.`` or ``clip.``, is left away, and so is the ``text.`` of
    OpenCLIP's text towers.

    Raises:
        WeightsError: it is no CLIP with a vision transformer, or has parts that change what it computes; the
            message names ``origin``.
    """
    for pattern, reason in OTHER_MODELS:
        if any(re.search(pattern, name) for name in names):
            raise WeightsError(f"{origin} {reason}; {MEND}")
    before = {name.removesuffix(anchor) for name in names for anchor in ANCHORS if name.endswith(anchor)}
    before = {prefix for prefix in before if not prefix or prefix.endswith(".")}
    if not before:
        shown = one_line(", ".join(sorted(names)[:2]), 100) or "none at all"
        raise WeightsError(f"{origin} isn't a CLIP with a vision transformer (its tensors: {shown}); {MEND}")
    if len(before) > 1:
        shown = one_line(", ".join(repr(prefix) for prefix in sorted(before)[:3]), 100)
        raise WeightsError(
            f"{origin} holds {len(before)} image towers, under {shown}; save one model of them alone"
        )
    (prefix,) = before
    found: dict[str, str] = {}
    strange: list[str] = []
    others: list[str] = []
    for name in names:
        plain = name.removeprefix(prefix)
        if not name.startswith(prefix):
            others.append(name)
        elif _is_known(plain.removeprefix("text.")):
            found[name] = plain.removeprefix("text.")
        elif plain.rpartition(".")[2] not in IDLE:
            (strange if plain.startswith(OF_A_TOWER) else others).append(name)
    if len(set(found.values())) < len(found):
        raise WeightsError(
            f"{origin} holds the same tensors twice, with and without 'text.'; save one model alone"
        )
    if strange:
        raise WeightsError(
            f"{origin} has {len(strange)} tensors that a CLIP doesn't have, such as {one_line(strange[0], 100)}; "
            f"leaving them out would change the model: {MEND}"
        )
    if "logit_scale" not in found.values():
        raise WeightsError(
            f"{origin} has no logit_scale; it isn't a whole CLIP model with image and text tower: {MEND}"
        )
    return found, others


def _is_known(name: str) -> bool:
    if name in NAMES or name in TRANSPOSED or name in OWN_NAMES or OWN_BLOCK.fullmatch(name):
        return True
    match = BLOCK.fullmatch(name)
    return match is not None and (match[3] in BLOCK_NAMES or match[3] == "attn.in_proj")


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by a CLIP's own names, under those of ``transformers``: views, nothing is read or copied.

    Raises:
        ValueError, RuntimeError: a tensor has the wrong shape.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in NAMES:
            renamed[NAMES[name]] = value
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = value.mT
        elif match := BLOCK.fullmatch(name):
            layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
            if match[3] == "attn.in_proj":
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{part}_proj.{match[4]}"] = piece
            else:
                renamed[f"{layer}.{BLOCK_NAMES[match[3]]}.{match[4]}"] = value
        else:
            renamed[name] = value
    return renamed


def own_shapes(
    stored: Mapping[str, tuple[int, ...]], names: Mapping[str, str], origin: str
) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of ``transformers``, out of those by stored names and a CLIP's own (``plain_names``).

    Raises:
        WeightsError: no CLIP has such a shape; the message names ``origin``.
    """
    try:
        # without memory, shapes take the same way as numbers
        empty = {plain: torch.empty(stored[name], device="meta") for name, plain in names.items()}
        return {name: tuple(value.shape) for name, value in to_hugging_face(empty).items()}
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{origin} isn't a CLIP: a tensor has the wrong shape") from error


def configuration(shapes: Mapping[str, tuple[int, ...]], form: Form, origin: str) -> dict[str, Any]:
    """Values for ``CLIPConfig`` of a model whose tensors have these shapes, by the names of ``transformers``.

    Raises:
        WeightsError: no model has such shapes; the message names ``origin``.
    """
    try:
        width, _, patch, patch_width = shapes[PATCHES]
        rows = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
        vocabulary, text_width = shapes["text_model.embeddings.token_embedding.weight"]
        side, projection = round(rows**0.5) if rows > 0 else 0, shapes["visual_projection.weight"][0]
        if side**2 != rows or not patch or patch != patch_width:
            raise WeightsError(
                f"{origin} has {rows + 1} positions and patches of {patch} x {patch_width}: no square of patches and "
                f"a class token; {MEND}"
            )
        image = {"patch_size": patch, "image_size": side * patch}
        text = {
            "vocab_size": vocabulary,
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "eos_token_id": min(END_OF_TEXT, vocabulary - 1),
        }
        towers = {
            f"{tower}_config": {
                **_transformer(
                    shapes, tower, width, form.activations[place], form.head_widths[place], origin
                ),
                **own,
                "projection_dim": projection,
            }
            for place, (tower, width, own) in enumerate(
                (("vision", width, image), ("text", text_width, text))
            )
        }
    except KeyError as error:
        raise WeightsError(f"{origin} isn't a whole CLIP model: it has no tensor {error}") from error
    except (IndexError, ValueError) as error:
        raise WeightsError(f"{origin} isn't a CLIP: a tensor has the wrong shape") from error
    return {"projection_dim": projection, **towers}


def _transformer(
    shapes: Mapping[str, tuple[int, ...]],
    tower: str,
    width: int,
    activation: str,
    head_width: int,
    origin: str,
) -> dict[str, Any]:
    if not width or width % head_width:
        raise WeightsError(
            f"{origin}: heads {head_width} wide don't fit into the {tower} tower, {width} wide; state the right "
            "width (clip.head_width, clip.text_head_width)"
        )
    block = re.compile(rf"{tower}_model\.encoder\.layers\.\d+\.layer_norm1\.weight")
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": sum(block.fullmatch(name) is not None for name in shapes),
        "num_attention_heads": width // head_width,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }
