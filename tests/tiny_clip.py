"""A whole CLIP with random weights and a vocabulary of its own, small enough to be made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

WORDS = "a clean origami cat dog sofa grass ground tree person people human sky water wall photo of the good small"
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tiny_clip(
    folder: Path, *, patch_size: int = 16, layers: int = 3, width: int = 64, seed: int = 0
) -> Path:
    """A seeded CLIP as a Hugging Face folder: config.json, model.safetensors, vocab.json, merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_size = write_vocabulary(folder)
    transformer = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
    }
    config = CLIPConfig(
        text_config={
            **transformer,
            "num_hidden_layers": 2,
            "vocab_size": vocabulary_size,
            "eos_token_id": vocabulary_size - 1,
            "bos_token_id": vocabulary_size - 2,
            "pad_token_id": vocabulary_size - 1,
            "projection_dim": 32,
        },
        vision_config={
            **transformer,
            "num_hidden_layers": layers,
            "patch_size": patch_size,
            "image_size": 4 * patch_size,
            "projection_dim": 32,
        },
        projection_dim=32,
    )
    sharpened(CLIPModel(config), seed).save_pretrained(folder)
    return folder


def write_golden_clip(folder: Path, golden: Path) -> Path:
    """A whole CLIP around the golden vision tower, with a seeded random text tower."""
    vision = CLIPVisionModelWithProjection.from_pretrained(golden / "vision", dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    size = write_vocabulary(folder)
    text: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    text |= {"num_hidden_layers": 2, "vocab_size": size, "projection_dim": vision.config.projection_dim}
    text |= {"eos_token_id": size - 1, "bos_token_id": size - 2, "pad_token_id": size - 1}
    config = CLIPConfig(
        text_config=text, vision_config=vision.config.to_dict(), projection_dim=vision.config.projection_dim
    )
    model = sharpened(CLIPModel(config), seed=0)
    model.vision_model.load_state_dict(vision.vision_model.state_dict())
    model.visual_projection.load_state_dict(vision.visual_projection.state_dict())
    model.save_pretrained(folder)
    return folder


def write_vocabulary(folder: Path) -> int:
    """vocab.json and merges.txt of a byte-level BPE in CLIP's form, a token for each of ``WORDS``; its size."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS.split():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merged = pieces[0] + pieces[1]
            if merged not in tokens:
                merges.append(f"{pieces[0]} {pieces[1]}")
                tokens.append(merged)
            pieces[:2] = [merged]
    tokens += [START, END]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (folder / "vocab.json").write_text(
        json.dumps({token: place for place, token in enumerate(tokens)}), "utf-8"
    )
    return len(tokens)


def sharpened(model: CLIPModel, seed: int) -> CLIPModel:
    """Weights large enough that attention, CAMs and texts differ from cell to cell and word to word."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name == "logit_scale":
                parameter.fill_(4.60546875)  # as in the golden files
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter[0].numel()
                gain = 2.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
    return model.eval()
