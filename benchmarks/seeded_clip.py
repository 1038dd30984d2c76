"""The CLIP that speed is measured with: speed doesn't depend on what weights mean."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.methods import load_mask_config


def write_clip(folder: Path) -> Path:
    """A seeded CLIP ViT-B/16 with the embedded CLIP's vocabulary."""
    torch.manual_seed(0)
    demo = locate_clip(load_mask_config(flags={"clip.weights": "demo", "classes": "demo"}).clip, offline=True)

    tokenizer = AutoTokenizer.from_pretrained(demo.tokenizer)
    config = CLIPConfig(
        vision_config={"patch_size": 16, "image_size": 224},
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data.mul_(6)  # sharp attention, as trained models have it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
