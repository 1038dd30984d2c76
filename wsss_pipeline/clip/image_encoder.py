"""CLIP's vision transformer as dense features: last-block tokens, patch embeddings, mean attention.

The modules that hold the weights are those of ``transformers``; the forward pass is ours, since class
activation maps need what the library's own doesn't give: a position table for any grid, attention
averaged over heads and layers without keeping a map per head, and gradients at the last block's input.

Source: CLIP-ES (arXiv 2212.09506), sections 3.2 and 3.4, as its published code computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_pipeline.clip.last_block import LastBlock

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DenseFeatures:
    """What CLIP sees in a batch of B images of one size, on a grid of h x w patches.

    Attributes:
        grid: (h, w).
        tokens: float32 (B, 1+hw, D), the normalised input of the last self-attention, class token first.
        pooled: float32 (B, P), mean over the patch embeddings, not normalised; the class token takes no part.
        attention: float32 (B, hw, hw), mean over heads and over the last layers of the softmax
            attention, class-token row and column dropped without renormalising.
        mean_token_gradients: of image i and the gradients (K, P) of K scores at its pooled embedding, the
            mean over its patches of the gradients at its tokens, float32 (K, D).
    """

    grid: tuple[int, int]
    tokens: Tensor
    pooled: Tensor
    attention: Tensor
    mean_token_gradients: Callable[[int, Tensor], Tensor]


class ImageEncoder:
    """A frozen CLIP vision transformer of any size and patch.

    Args:
        vision: a ``transformers.CLIPVisionModelWithProjection`` in float32, on the device to use.
            With a precision under fp32 its blocks' linear layers are cast in place.
        precision: of the blocks' matrix products. Residual stream, normalisation and softmax stay in
            float32, and so does what leads from the tokens to the class activation maps.
        affinity_layers: over how many last layers the attention is averaged (CLIP-ES: 8); a shallower
            model uses all it has.
    """

    def __init__(
        self, vision: Any, precision: Literal["fp32", "bf16", "fp16"] = "fp32", affinity_layers: int = 8
    ) -> None:
        model = vision.vision_model
        self.patch_size = int(vision.config.patch_size)
        self._embeddings = model.embeddings
        self._pre_norm: nn.Module = model.pre_layrnorm
        self._layers: list[Any] = list(model.encoder.layers)
        self._first_affinity_layer = max(0, len(self._layers) - affinity_layers)
        self._dtype = DTYPES[precision]
        for layer in self._layers[:-1]:
            for linear in _linear_layers(layer):
                linear.to(self._dtype)
        self._last = LastBlock(self._layers[-1], model.post_layernorm, vision.visual_projection, self._dtype)

    @property
    def device(self) -> torch.device:
        """Where images must lie."""
        return self._embeddings.class_embedding.device  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> DenseFeatures:
        """Dense features of a batch.

        Args:
            images: float32 (B, 3, H, W), normalised with CLIP's mean and standard deviation; H and W
                multiples of ``patch_size``.

        Raises:
            ValueError: H or W isn't a multiple of the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image of {height} x {width} isn't a multiple of the patch size {self.patch_size}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        count = len(self._layers) - self._first_affinity_layer
        hidden = self._embed(images, grid)
        cells = grid[0] * grid[1]
        attention = hidden.new_zeros(len(images), cells, cells)
        for index, layer in enumerate(self._layers[:-1]):
            wanted = attention if index >= self._first_affinity_layer else None
            hidden = self._trunk_block(layer, hidden, wanted)
        passes = [self._last.forward(image) for image in hidden]
        for total, last in zip(attention, passes, strict=True):
            total.add_(last.probabilities[:, 1:, 1:].mean(dim=0)).div_(count)
        return DenseFeatures(
            grid,
            torch.stack([last.tokens for last in passes]),
            torch.stack([last.pooled for last in passes]),
            attention,
            lambda image, gradients: self._last.mean_token_gradients(passes[image], gradients),
        )

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = self._embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self._embeddings.class_embedding.expand(len(images), 1, -1)
        table = resize_position_table(self._embeddings.position_embedding.weight, grid)
        return self._pre_norm(torch.cat([class_token, patches], dim=1) + table)  # type: ignore[no-any-return]

    def _trunk_block(self, layer: Any, hidden: Tensor, attention: Tensor | None) -> Tensor:
        heads = layer.self_attn.num_heads
        normed = layer.layer_norm1(hidden).to(self._dtype)
        query, key, value = _project(layer.self_attn, normed, heads)
        if attention is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = torch.empty_like(value)
            for head in range(heads):
                probabilities = _softmax_attention(query[:, head], key[:, head])
                attention.add_(probabilities[:, 1:, 1:], alpha=1 / heads)
                torch.matmul(probabilities.to(self._dtype), value[:, head], out=mixed[:, head])
        hidden = hidden + layer.self_attn.out_proj(_join_heads(mixed))
        return hidden + layer.mlp(layer.layer_norm2(hidden).to(self._dtype))  # type: ignore[no-any-return]


def resize_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings for another grid.

    Args:
        table: float32 (1+n*n, D), class token first.
        grid: (h, w) of the image's patches.

    Returns:
        float32 (1+hw, D). Bilinear without antialiasing, then rounded to half precision, since that is
        what the published code's results were made with; bicubic would change the maps by up to 0.08.
    """
    side = round((len(table) - 1) ** 0.5)
    square = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    cells = resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)
    return torch.cat([table[:1], cells]).half().float()


def _linear_layers(layer: Any) -> list[nn.Module]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.mlp]


def _project(attention: Any, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, N, d), of tokens (B, N, D)."""
    batch, length, _ = tokens.shape

    def split(projected: Tensor) -> Tensor:
        return projected.view(batch, length, heads, -1).transpose(1, 2)

    return split(attention.q_proj(tokens)), split(attention.k_proj(tokens)), split(attention.v_proj(tokens))


def _softmax_attention(query: Tensor, key: Tensor) -> Tensor:
    """float32 (..., N, N) row-stochastic attention of queries and keys (..., N, d)."""
    scale = query.shape[-1] ** -0.5
    return torch.softmax((query * scale @ key.transpose(-2, -1)).float(), dim=-1)


def _join_heads(mixed: Tensor) -> Tensor:
    """(B, N, heads*d) out of (B, heads, N, d)."""
    return mixed.transpose(1, 2).flatten(2)
