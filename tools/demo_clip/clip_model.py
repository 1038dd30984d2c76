"""The demo's CLIP: ``transformers.CLIPModel`` made small, and its embeddings as training needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wsss_pipeline.clip.trunk import resize_position_table
from wsss_pipeline.data import transforms

PATCH = 8
TABLE_SIDE = 12  # of the position table, in patches
HEAD = 32
PROJECTION = 96
QUERY_SCALE = 4.0  # of the attention logits at the start: sharp enough for a patch to see those like it
POSITION_SCALE = 0.2  # of the position table at the start, beside patches of about 0.3


class ImageEmbeddings(NamedTuple):
    """Unit float32 embeddings: of the class token (B, P), of the mean over the patch tokens as CLIP-ES pools
    them (B, P), and of what each patch hands on to the others in the last layer (B, N, P)."""

    whole: Tensor
    pooled: Tensor
    patches: Tensor


def build_model(tokenizer: Any, width: int, layers: int) -> Any:
    """A ``transformers.CLIPModel`` with fresh weights: patches of 8 pixels, a position table of 12 x 12.

    In the image tower keys start equal to queries and positions as sines and cosines, so that from the
    first step on a patch attends to patches near it that look like it, as in trained transformers
    (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023); a small data set
    alone would take long to get there.

    Args:
        tokenizer: as ``build_tokenizer`` makes it.
        width: of both transformers, a multiple of 32.
        layers: of the vision transformer; the text transformer has half as many.
    """
    from transformers import CLIPConfig, CLIPModel

    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // HEAD,
        "hidden_act": "quick_gelu",
        "projection_dim": PROJECTION,
    }
    text = {
        **tower,
        **tokens,
        "num_hidden_layers": max(1, layers // 2),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **tower,
        "num_hidden_layers": layers,
        "image_size": PATCH * TABLE_SIDE,
        "patch_size": PATCH,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)
    # a plain softmax(QK)V is several times faster here than the fused one, which CPUs emulate in bf16
    model = CLIPModel._from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=(QUERY_SCALE / width) ** 0.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        table = model.vision_model.embeddings.position_embedding.weight
        table[1:] = POSITION_SCALE * _sines(TABLE_SIDE, width // 4)
    return model


def _sines(side: int, frequencies: int) -> Tensor:
    """(side * side, 4 * frequencies): sines and cosines of row and column, wavelengths of 6 to 300 cells."""
    angles = torch.outer(torch.arange(side), 50 ** -(torch.arange(frequencies) / frequencies))
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, -1)


def embed_images(model: Any, images: Tensor) -> ImageEmbeddings:
    """Embeddings of a batch by CLIP's forward pass, positions stretched as at inference.

    A patch is embedded by the values of the last layer alone, without what it gathers from the others
    (Zhou, Loy and Dai, "Extract Free Dense Labels from CLIP", ECCV 2022, section 3.2). Through these values,
    and through nothing else, the gradients of GradCAM at the input of the last attention flow.

    Args:
        model: ``CLIPModel``.
        images: (B, 3, H, W), normalised with CLIP's mean and standard deviation; sides multiples of the patch.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(_tokens(vision.embeddings, images))
    *layers, last = vision.encoder.layers
    for layer in layers:
        hidden = layer(hidden, None)
    attention = last.self_attn
    values = attention.out_proj(attention.v_proj(last.layer_norm1(hidden[:, 1:])))
    final = last(hidden, None)

    def project(tokens: Tensor) -> Tensor:
        return model.visual_projection(vision.post_layernorm(tokens)).float()  # type: ignore[no-any-return]

    projected = project(final)
    return ImageEmbeddings(
        F.normalize(projected[:, 0], dim=1),
        F.normalize(projected[:, 1:].mean(dim=1), dim=1),
        F.normalize(project(values), dim=2),
    )


def _tokens(parts: Any, images: Tensor) -> Tensor:
    """Class and patch tokens (B, 1+N, D) with their positions."""
    kernel = parts.patch_embedding.weight
    # the convolution as a matrix product: its backward pass in bf16 takes a third of the step on a CPU
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2) @ kernel.flatten(1).T
    grid = (images.shape[-2] // PATCH, images.shape[-1] // PATCH)
    table = resize_position_table(parts.position_embedding.weight.float(), grid)
    tokens = torch.cat([parts.class_embedding.expand(len(images), 1, -1), patches], dim=1)
    return tokens + table.to(tokens.dtype)


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit embeddings float32 (N, P)."""
    ids = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"].to(model.device)
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=1)


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) RGB to float32 (B, 3, H, W) with CLIP's mean and standard deviation."""
    return torch.stack([transforms.normalise(image, transforms.CLIP_STATISTICS) for image in images])
