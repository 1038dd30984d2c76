"""The tensors of a Hugging Face CLIP in OpenAI's files: TorchScript archive or plain state dict."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def openai_state_dict(folder: Path) -> dict[str, Tensor]:
    """OpenAI's names for the weights of a Hugging Face CLIP folder."""
    source = load_file(folder / "model.safetensors")
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for kind in ("weight", "bias"):
        names[f"visual.ln_pre.{kind}"] = f"vision_model.pre_layrnorm.{kind}"
        names[f"visual.ln_post.{kind}"] = f"vision_model.post_layernorm.{kind}"
        names[f"ln_final.{kind}"] = f"text_model.final_layer_norm.{kind}"
    tensors = {theirs: source[ours] for theirs, ours in names.items()}
    tensors["visual.proj"] = source["visual_projection.weight"].T.contiguous()
    tensors["text_projection"] = source["text_projection.weight"].T.contiguous()
    for ours, theirs in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        layers = {int(name.split(".")[3]) for name in source if name.startswith(f"{ours}.encoder.layers.")}
        for layer in layers:
            old, new = f"{ours}.encoder.layers.{layer}", f"{theirs}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                parts = [source[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                tensors[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                tensors[f"{new}.attn.out_proj.{kind}"] = source[f"{old}.self_attn.out_proj.{kind}"]
                tensors[f"{new}.ln_1.{kind}"] = source[f"{old}.layer_norm1.{kind}"]
                tensors[f"{new}.ln_2.{kind}"] = source[f"{old}.layer_norm2.{kind}"]
                tensors[f"{new}.mlp.c_fc.{kind}"] = source[f"{old}.mlp.fc1.{kind}"]
                tensors[f"{new}.mlp.c_proj.{kind}"] = source[f"{old}.mlp.fc2.{kind}"]
    return tensors


class Branch(nn.Module):
    """A node of the tree of modules that dotted tensor names stand for."""

    def forward(self, value: Tensor) -> Tensor:
        """Something that TorchScript can compile."""
        return value


def write_torchscript(tensors: dict[str, Tensor], file: Path) -> Path:
    """The tensors as a TorchScript archive with a module tree of their names."""
    root = Branch()
    for name, tensor in tensors.items():
        node = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Branch())
            node = getattr(node, part)
        node.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    torch.jit.script(root).save(str(file))
    return file
