"""CLIP's vision transformer as dense features: tokens of any block, patch embeddings, attention.

The modules that hold the weights are those of ``transformers``; the forward pass is ours, since class
activation maps need what the library's own doesn't give: a position table for any grid, attention
averaged over heads and layers without keeping a map per head, and gradients at the last block's input.

Source: CLIP-ES (arXiv 2212.09506), sections 3.2 and 3.4, as its published code computes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.clip.last_block import LastBlock, LastBlockPass
from wsss_pipeline.config import ResolvedPrecision

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Features:
    """What CLIP sees in a batch of B images of one size, on a grid of h x w patches.

    Attributes:
        grid: (h, w).
        attention: softmax attention over heads' mean, class-token row and column dropped without renormalising:
            float32 (B, hw, hw), the mean over the last layers, or (L, B, hw, hw), one for each of them.
        taps: number of a block (negative ones count from the end) to its output, float32 (B, 1+hw, D).
        last: per image, the pass through the last block, which Grad-CAM asks for gradients; none with calibration.
        calibrated: float32 (B, 1+hw, P), tokens in the space of the texts, not normalised, class token first; its
            patches went through the calibrated stream. None without one.
    """

    grid: tuple[int, int]
    attention: Tensor
    taps: Mapping[int, Tensor]
    last: list[LastBlockPass]
    calibrated: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """Patch embeddings in the space of the texts, float32 (B, hw, P), not normalised."""
        return torch.stack([image.patches() for image in self.last])


class Trunk:
    """A frozen CLIP vision transformer of any size and patch.

    Args:
        vision: a ``transformers.CLIPVisionModelWithProjection`` in float32, on the device to use.
            With a precision under fp32 its blocks' linear layers are cast in place.
        precision: type of the blocks' matrix products. Residual stream, normalisation and softmax stay in
            float32, and so does what leads from the tokens to the class activation maps.
    """

    def __init__(self, vision: Any, precision: ResolvedPrecision = "fp32") -> None:
        model = vision.vision_model
        self.patch_size = int(vision.config.patch_size)
        self._embeddings = model.embeddings
        self._pre_norm = model.pre_layrnorm
        self._layers: list[Any] = list(model.encoder.layers)
        self._dtype = DTYPES[precision]
        for layer in self._layers[:-1]:
            attention = layer.self_attn
            for linear in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.out_proj,
                layer.mlp,
            ):
                linear.to(self._dtype)
        self._last = LastBlock(self._layers[-1], model.post_layernorm, vision.visual_projection, self._dtype)

    @property
    def device(self) -> torch.device:
        """Where images must lie."""
        return self._embeddings.class_embedding.device  # type: ignore[no-any-return]

    def encode(
        self,
        images: Tensor,
        taps: Collection[int] = (),
        attention: Literal["mean", "layers"] = "mean",
        last_layers: int = 8,
        calibrated_blocks: int | None = None,
    ) -> Features:
        """Dense features of a batch. Gradients are the caller's business: the weights ask for none.

        In the calibrated stream of the last blocks (ExCEL, CVPR 2025, after CLIP Surgery, arXiv 2304.05653) a token
        looks at what is like it: in place of softmax(q k') stands the mean of softmax(q q'), softmax(k k') and
        softmax(v v'), summed over the heads, one map for the values of all heads; and there is no MLP. Queries, keys
        and values are those of the plain stream, which goes on beside it.

        Args:
            images: float32 (B, 3, H, W), normalised with the method's mean and standard deviation; H and W
                multiples of ``patch_size``.
            taps: blocks whose output is wanted as well, from 0, negative ones from the end.
            attention: weights of the last layers, their mean or each on its own.
            last_layers: number of them (CLIP-ES: 8); a shallower model gives all that it has.
            calibrated_blocks: number of last blocks with the calibrated stream (ExCEL: 5; 0: the plain stream's
                patches), in a shallower model all but the first; None where nobody asks for ``calibrated``.

        Raises:
            ValueError: H or W isn't a multiple of the patch size, or there is no such block.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image of {height} x {width} isn't a multiple of the patch size {self.patch_size}"
            )
        depth = len(self._layers)
        if any(not -depth <= tap < depth for tap in taps):
            raise ValueError(f"taps {sorted(taps)}: this CLIP has the blocks 0 to {depth - 1}")
        grid = (height // self.patch_size, width // self.patch_size)
        cells, count = grid[0] * grid[1], min(last_layers, depth)
        hidden = self._embedded(images, grid, rounded=calibrated_blocks is None)
        maps = hidden.new_zeros(count if attention == "layers" else 1, len(images), cells, cells)
        tapped: dict[int, Tensor] = {}
        is_plain = calibrated_blocks is None
        first_calibrated = depth - min(calibrated_blocks or 0, depth - 1)
        stream = hidden
        for index, layer in enumerate(self._layers[:-1] if is_plain else self._layers):
            number = index - (depth - count)  # among those whose attention is wanted
            total = None if number < 0 else maps[number if attention == "layers" else 0]
            is_calibrated = index >= first_calibrated
            own = [tap for tap in taps if tap % depth == index]
            # beside the calibrated stream nothing but the class token is read of the last block
            goes_on = 1 if is_calibrated and index == depth - 1 and not own else cells + 1
            hidden, alike = self._block(layer, hidden, total, is_calibrated, goes_on)
            stream = hidden if alike is None else stream + alike
            tapped |= dict.fromkeys(own, hidden)
        if not is_plain:
            if attention == "mean":
                maps.div_(count)
            tokens = torch.cat([hidden[:, :1], stream[:, 1:]], dim=1)
            projected = self._last.post_norm(tokens) @ self._last.projection.T
            return Features(grid, maps if attention == "layers" else maps[0], tapped, [], projected)
        passes = [self._last.forward(image) for image in hidden]
        for total, last in zip(maps[-1], passes, strict=True):
            total.add_(last.probabilities[:, 1:, 1:].mean(dim=0))
            if attention == "mean":
                total.div_(count)
        if any(tap % depth == depth - 1 for tap in taps):
            output = torch.stack([last.output for last in passes])
            tapped |= {tap: output for tap in taps if tap % depth == depth - 1}
        return Features(grid, maps if attention == "layers" else maps[0], tapped, passes)

    def _embedded(self, images: Tensor, grid: tuple[int, int], *, rounded: bool) -> Tensor:
        """What goes into the first block, float32 (B, 1+hw, D)."""
        patches = self._embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self._embeddings.class_embedding.expand(len(images), 1, -1)
        table = resize_position_table(self._embeddings.position_embedding.weight, grid, rounded=rounded)
        embedded: Tensor = self._pre_norm(torch.cat([class_token, patches], dim=1) + table)
        return embedded

    def _block(
        self, layer: Any, hidden: Tensor, total: Tensor | None, is_calibrated: bool, goes_on: int
    ) -> tuple[Tensor, Tensor | None]:
        """A block's output for the first ``goes_on`` tokens (B, goes_on, D), and what all (B, 1+hw, D) add to the
        calibrated stream; None where that isn't wanted.

        Its attention (B, hw, hw), the mean over heads, is added to ``total``.
        """
        heads, (batch, length, _) = layer.self_attn.num_heads, hidden.shape
        normed = layer.layer_norm1(hidden).to(self._dtype)
        query, key, value = (
            project(normed).view(batch, length, heads, -1).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        scale = query.shape[-1] ** -0.5
        if total is None:
            mixed = F.scaled_dot_product_attention(query[:, :, :goes_on], key, value)
        else:
            mixed = torch.empty_like(value[:, :, :goes_on])
            for head in range(heads):  # one after the other: a map of each at a time is too much memory
                scores = query[:, head] * scale @ key[:, head].transpose(-2, -1)
                probabilities = torch.softmax(scores.float(), dim=-1)
                total.add_(probabilities[:, 1:, 1:], alpha=1 / heads)
                torch.matmul(probabilities[:, :goes_on].to(self._dtype), value[:, head], out=mixed[:, head])
        alike = None
        if is_calibrated:
            likeness = hidden.new_zeros(batch, length, length)
            for head in range(heads):
                for part in (query[:, head], key[:, head], value[:, head]):
                    likeness += torch.softmax((part * scale @ part.transpose(-2, -1)).float(), dim=-1)
            gathered = (likeness / 3).to(self._dtype) @ value.transpose(1, 2).flatten(2)
            alike = layer.self_attn.out_proj(gathered).float()
        hidden = hidden[:, :goes_on] + layer.self_attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.layer_norm2(hidden).to(self._dtype)), alike


def resize_position_table(table: Tensor, grid: tuple[int, int], *, rounded: bool = True) -> Tensor:
    """Position embeddings for another grid.

    Args:
        table: float32 (1+n*n, D), class token first.
        grid: (h, w) of the image's patches.
        rounded: choice to round to half precision, as CLIP-ES's results were made; bicubic in place of bilinear would
            change its maps by up to 0.08.

    Returns:
        float32 (1+hw, D). Bilinear without antialiasing.
    """
    side = round((len(table) - 1) ** 0.5)
    square = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    cells = resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)
    whole = torch.cat([table[:1], cells])
    return whole.half().float() if rounded else whole
