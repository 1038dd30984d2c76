"""Folders of tiny models of transformers: a config.json, a preprocessor's, and where wanted random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
VISION_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
# type of model -> the values of its configuration
CONFIGS: dict[str, dict[str, Any]] = {
    "segformer": {
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
        "decoder_hidden_size": 8,
    },
    "upernet": {
        "backbone_config": {"model_type": "swin", **SWIN},
        "hidden_size": 16,
        "auxiliary_channels": 8,
        "auxiliary_in_channels": 32,
    },
    "dpt": {
        **VISION_TRANSFORMER,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
    },
    "beit": {
        **VISION_TRANSFORMER,
        "out_indices": [1, 2, 3, 4],
        "use_relative_position_bias": True,
        "auxiliary_channels": 8,
    },
    "data2vec-vision": {**VISION_TRANSFORMER, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8},
    "mobilevit": {
        "hidden_sizes": [8, 12, 16],
        "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
        "aspp_out_channels": 8,
        "num_attention_heads": 2,
        "image_size": 64,
    },
    "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 64},
    "mask2former": {
        "backbone_config": {"model_type": "swin", **SWIN},
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 16,
    },
    "eomt": {
        **{key: value for key, value in VISION_TRANSFORMER.items() if key != "intermediate_size"},
        "mlp_ratio": 2,
        "patch_size": 8,
        "num_blocks": 2,
        "num_queries": 16,
        "num_upscale_blocks": 1,
    },
}
MEAN, STD = [0.5, 0.25, 0.125], [0.25, 0.5, 0.75]


def network_of(kind: str) -> str:
    """``--network`` of a type of model."""
    return kind if kind in ("mask2former", "eomt") else "hf"


def write_model(folder: Path, kind: str, weights: bool = False, num_labels: int = 7, **values: Any) -> Path:
    """A folder as transformers writes it; ``values`` replace those of the configuration."""
    import transformers as library

    transformers: Any = library
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], "num_labels": num_labels, **values})
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        torch.manual_seed(3)
        name = {"mask2former": "Mask2FormerForUniversalSegmentation", "eomt": "EomtForUniversalSegmentation"}
        kind_of = getattr(transformers, name.get(kind, ""), transformers.AutoModelForSemanticSegmentation)
        model = kind_of(config) if kind in name else kind_of.from_config(config)
        model.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(config.to_json_string())
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder
