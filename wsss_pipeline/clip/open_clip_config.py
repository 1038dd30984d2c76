"""OpenCLIP's configuration of a model: what its tensors don't tell, or why it can't be used.

``open_clip_config.json`` of a repository has it under ``model_cfg``; the files of OpenCLIP's own folder
``model_configs`` have it bare. Source: the data classes ``CLIPVisionCfg`` and ``CLIPTextCfg`` of open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsss_pipeline.clip.tensor_names import MEND, Form
from wsss_pipeline.errors import WeightsError
from wsss_pipeline.runtime.output import one_line

# what shapes tell, what acts in training alone, and what pooling by one token makes no difference to
TOLD_BY_SHAPES = {"layers", "width", "mlp_ratio", "patch_size", "image_size", "context_length", "vocab_size"}
IN_TRAINING = {"patch_dropout", "drop_path_rate", "output_tokens", "final_ln_after_pool", "pos_embed_type"}
UNUSED = {
    "attn_pooler_queries",
    "attn_pooler_heads",
    "n_queries",
    "timm_model_pretrained",
    "hf_model_pretrained",
}
UNUSED |= {
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
    "proj",
    "pooler_type",
    "pad_id",
}
READ = {"head_width", "heads"}
# sizes by their names in transformers
SIZES = {"width": "hidden_size", "layers": "num_hidden_layers", "patch_size": "patch_size"}
PLAIN_VALUES = {"pool_type": ("tok", "argmax", "eos"), "proj_type": ("linear",)}
OF_MODEL = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "custom_text",
}
OF_MODEL |= {"nonscalar_logit_scale", "output_dict", "cast_dtype"}
# by what makes it another model
REASONS = {
    "timm_model_name": "its image tower is one of timm (SigLIP, EVA, ConvNeXt)",
    "eva_model_name": "its image tower is EVA's",
    "hf_model_name": "its text tower is another language model of Hugging Face",
    "multimodal_cfg": "it is a CoCa, which pools by attention",
    "attentional_pool": "it pools by attention, not by a class token",
    "global_average_pool": "it pools the patches, not by a class token",
    "pool_type": "it pools otherwise than by a class token and the end of the text",
    "no_causal_mask": "its text tower has no causal mask",
    "hf_tokenizer_name": "its vocabulary is another than CLIP's",
}


def open_clip_form(content: Mapping[str, Any], origin: str) -> Form:
    """Activation and head widths of an OpenCLIP model, with OpenCLIP's own defaults.

    Args:
        content: values of its configuration.
        origin: text that the user gave, for messages.

    Raises:
        WeightsError: it is no CLIP with a class token and a causal text tower, or can't be read.
    """
    model = content.get("model_cfg", content)
    image, text = (
        model.get(name) if isinstance(model, dict) else None for name in ("vision_cfg", "text_cfg")
    )
    if not isinstance(image, dict) or not isinstance(text, dict):
        raise WeightsError(
            f"{origin}: its OpenCLIP configuration has no vision_cfg and text_cfg; fetch it again"
        )
    if isinstance(image.get("layers"), list):
        raise WeightsError(f"{origin} is a ResNet CLIP; CAMs here need a vision transformer (ViT)")
    for part in (image, text):
        harmless = TOLD_BY_SHAPES | IN_TRAINING | UNUSED | READ
        _refuse_others({key: value for key, value in part.items() if key not in harmless}, origin)
    _refuse_others({key: value for key, value in model.items() if key not in OF_MODEL}, origin)
    numbers = {
        "vision_cfg.head_width": image.get("head_width", 64),
        "text_cfg.width": text.get("width", 512),
        "text_cfg.heads": text.get("heads", 8),
    }
    for name, number in numbers.items():
        if type(number) is not int or not 0 < number <= 2**16:
            raise WeightsError(
                f"{origin}: {name} is {number!r:.40} in its OpenCLIP configuration; fetch it again"
            )
    width, heads = numbers["text_cfg.width"], numbers["text_cfg.heads"]
    if width % heads:
        raise WeightsError(
            f"{origin}: {heads} heads don't fit into a text tower {width} wide; fetch it again"
        )
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    return Form((activation, activation), (numbers["vision_cfg.head_width"], width // heads))


def check_sizes(content: Mapping[str, Any], values: Mapping[str, Any], origin: str) -> None:
    """A WeightsError where an OpenCLIP configuration is of another model than the tensors.

    Args:
        content: values of its configuration, which ``open_clip_form`` has read.
        values: those for ``CLIPConfig`` that the tensors' shapes tell.
        origin: text that the user gave, for the message.
    """
    model = content.get("model_cfg", content)
    for part, tower, sizes in (
        ("vision_cfg", "vision_config", {"width": 768, "layers": 12, "patch_size": 16}),
        ("text_cfg", "text_config", {"width": 512, "layers": 12}),
    ):
        for key, default in sizes.items():
            said, found = model[part].get(key, default), values[tower][SIZES[key]]
            if said != found:
                raise WeightsError(
                    f"{origin}: its OpenCLIP configuration has {part}.{key} {one_line(said, 40)}, its tensors have "
                    f"{found}; weights and configuration belong to different models"
                )


def _refuse_others(values: Mapping[str, Any], origin: str) -> None:
    """A WeightsError where a model is told to be something that ``transformers``' CLIP isn't."""
    for key, value in values.items():
        if value and value not in PLAIN_VALUES.get(key, ()):
            reason = REASONS.get(
                key, f"its OpenCLIP configuration has {one_line(key, 40)}: {one_line(value, 40)}"
            )
            raise WeightsError(f"{origin} can't be used: {reason}; {MEND}")
