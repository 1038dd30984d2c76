"""CLIP's vision transformer as dense features: tokens of any block, patch embeddings, attention.

The modules that hold the weights are those of ``transformers``; the forward pass is ours, since class
activation maps need what the library's own doesn't give: a position table for any grid, attention
averaged over heads and layers without keeping a map per head, and gradients at the last block's input.

Source: CLIP-ES (arXiv 2212.09506), sections 3.2 and 3.4, as its published code computes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.clip.last_block import LastBlock, LastBlockPass
from wsss_pipeline.config import ResolvedPrecision

# Numbers in the maps of an image's heads that a GPU makes at once, 64 MB. It waits for each small product to be
# asked for; a CPU gains nothing from more than a head at a time.
MAPS_TOGETHER = 2**24
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Features:
    """What CLIP sees in a batch of B images of one size, on a grid of h x w patches.

    Attributes:
        grid: (h, w).
        attention: softmax attention over heads' mean, class-token row and column dropped without renormalising:
            float32 (B, hw, hw), the mean over the last layers, or (L, B, hw, hw), one for each of them, L = 0 where
            nobody asked for it.
        taps: number of a block (negative ones count from the end) to its output, float32 (B, 1+hw, D).
        last: per image, the pass through the last block, which Grad-CAM asks for gradients; none with calibration or
            without attention.
        middle: number of a block to the residual stream between its attention and its MLP, float32 (B, 1+hw, D).
        stream: float32 (B, 1+hw, D), patches after the calibrated stream, class token of the plain one first. None
            without calibration.
        values: float32 (B, hw, D), sum over the calibrated blocks of the patches' values after the output projection,
            without its bias: what a map of patches and patches, added to the calibrated one, multiplies.
        calibrated: float32 (B, 1+hw, P), ``stream`` in the space of the texts, not normalised.
    """

    grid: tuple[int, int]
    attention: Tensor
    taps: Mapping[int, Tensor]
    last: list[LastBlockPass]
    middle: Mapping[int, Tensor] = field(default_factory=dict)
    stream: Tensor | None = None
    values: Tensor | None = None
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
        rounded_positions: choice to round the position table to half precision, as CLIP-ES's results were made.
        class_embeddings: number of times that the class embedding is added (WeakCLIP: 2).
    """

    def __init__(
        self,
        vision: Any,
        precision: ResolvedPrecision = "fp32",
        *,
        rounded_positions: bool = True,
        class_embeddings: int = 1,
    ) -> None:
        model = vision.vision_model
        self._rounded_positions = rounded_positions
        self._class_embeddings = class_embeddings
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

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    def encode(
        self,
        images: Tensor,
        taps: Collection[int] = (),
        attention: Literal["mean", "layers", "none"] = "mean",
        last_layers: int = 8,
        calibrated_blocks: int | None = None,
        *,
        middle: Collection[int] = (),
        left_out: int = 0,
        stochastic_depth: float = 0.0,
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
            attention: weights of the last layers, their mean or each on its own; ``none`` where taps or the
                calibrated stream are all that is wanted: nothing else is then computed.
            last_layers: number of them (CLIP-ES: 8); a shallower model gives all that it has.
            calibrated_blocks: number of last blocks with the calibrated stream (ExCEL: 5; 0: the plain stream's
                patches), in a shallower model all but the first; None where nobody asks for ``calibrated``.
            middle: blocks, from 0, of which the stream before the MLP is wanted.
            left_out: number of blocks that what goes into the last block hasn't been through (WeCLIP+: 1). Its
                attention is then that of this way; all else is as ever.
            stochastic_depth: share of tokens that the last block's attention and MLP are left out for, drawn for
                each place, the same in all images; it rises from 0 in the first block (WeakCLIP, in training: 0.1).

        Raises:
            ValueError: H or W isn't a multiple of the patch size, or there is no such block.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image of {height} x {width} isn't a multiple of the patch size {self.patch_size}"
            )
        # not len(): an exported network would take this number of images alone
        depth, batch = self.depth, images.shape[0]
        if any(not -depth <= block < depth for block in (*taps, *middle)):
            wanted = sorted((*taps, *middle))
            raise ValueError(f"taps {wanted}: this CLIP has the blocks 0 to {depth - 1}")
        grid = (height // self.patch_size, width // self.patch_size)
        cells = grid[0] * grid[1]
        hidden = self._embedded(images, grid)
        count = 0 if attention == "none" else min(last_layers, depth)
        maps = hidden.new_zeros(count if attention == "layers" else min(1, count), batch, cells, cells)
        tapped: dict[int, Tensor] = {}
        between: dict[int, Tensor] = {}
        is_plain = calibrated_blocks is None
        needs_passes = is_plain and attention != "none"
        deepest = max((block % depth for block in (*taps, *middle)), default=-1)
        blocks = self._layers[: depth - 1 if needs_passes else deepest + 1] if is_plain else self._layers
        first_calibrated = depth - min(calibrated_blocks or 0, depth - 1)
        stream, before_last = hidden, hidden
        values = None if is_plain else hidden.new_zeros(batch, cells, hidden.shape[-1])
        for index, layer in enumerate(blocks):
            number = index - (depth - count)  # among those whose attention is wanted
            total = None if number < 0 else maps[number if attention == "layers" else 0]
            is_calibrated = index >= first_calibrated
            own = [tap for tap in taps if tap % depth == index]
            # beside the calibrated stream nothing but the class token is read of the last block
            goes_on = 1 if is_calibrated and index == depth - 1 and not own and index not in middle else None
            dropped = stochastic_depth * index / max(1, depth - 1)
            hidden, inside, alike = self._block(
                layer, hidden, total, values if is_calibrated else None, goes_on, dropped
            )
            stream = hidden if alike is None else stream + alike
            tapped |= dict.fromkeys(own, hidden)
            if index in middle:
                between[index] = inside
            if index == depth - 2 - left_out:
                before_last = hidden
        if not is_plain:
            if attention == "mean":
                maps.div_(count)
            tokens = torch.cat([hidden[:, :1], stream[:, 1:]], dim=1)
            features = maps if attention != "mean" else maps[0]
            return Features(grid, features, tapped, [], between, tokens, values, self.projected(tokens))
        passes: list[LastBlockPass] = []
        if needs_passes:
            passes = [self._last.forward(image) for image in before_last]
            for total, last in zip(maps[-1], passes, strict=True):
                total.add_(last.probabilities[:, 1:, 1:].mean(dim=0))
                if attention == "mean":
                    total.div_(count)
        if needs_passes and any(tap % depth == depth - 1 for tap in taps):
            output = torch.stack([last.output for last in passes])
            tapped |= {tap: output for tap in taps if tap % depth == depth - 1}
        return Features(grid, maps[0] if attention == "mean" else maps, tapped, passes, between)

    def guided(self, features: Features, guide: Tensor) -> Tensor:
        """Calibrated tokens as they would be, had a map been added to each head's calibrated one (ExCEL).

        The same map is added in all calibrated blocks and for all heads, and the values don't depend on it; so
        what it adds is one product.

        Args:
            features: features with a calibrated stream.
            guide: float32 (B, hw, hw), row-stochastic.

        Returns:
            float32 (B, 1+hw, P), as ``Features.calibrated``.
        """
        assert features.stream is not None
        assert features.values is not None
        heads = int(self._layers[-1].self_attn.num_heads)
        tokens = features.stream.clone()
        tokens[:, 1:] += heads * guide @ features.values
        return self.projected(tokens)

    def projected(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) in the space of the texts, (B, N, P)."""
        projected: Tensor = self._last.post_norm(tokens) @ self._last.projection.T
        return projected

    def _embedded(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What goes into the first block, float32 (B, 1+hw, D)."""
        patches = self._embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self._class_embeddings * self._embeddings.class_embedding.expand(images.shape[0], 1, -1)
        weights = self._embeddings.position_embedding.weight
        table = resize_position_table(weights, grid, rounded=self._rounded_positions)
        embedded: Tensor = self._pre_norm(torch.cat([class_token, patches], dim=1) + table)
        return embedded

    def _block(
        self,
        layer: Any,
        hidden: Tensor,
        total: Tensor | None,
        values: Tensor | None,
        goes_on: int | None,
        dropped: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A block's output for the first ``goes_on`` tokens, for all where None (B, n, D); the same before its MLP;
        and what all tokens (B, 1+hw, D) add to the calibrated stream, None where that isn't wanted.

        Its attention (B, hw, hw), the mean over heads, is added to ``total``; what the patches' values become by the
        output projection (B, hw, D) to ``values``, which says that the block is calibrated. ``dropped`` is the share
        of tokens that attention and MLP are left out for.
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
            for some in _heads_together(heads, hidden):
                scores = query[:, some] * scale @ key[:, some].transpose(-2, -1)
                probabilities = torch.softmax(scores.float(), dim=-1)
                looks = probabilities[:, :, 1:, 1:]
                # the sum over a single head would be a copy
                total.add_(looks[:, 0] if looks.shape[1] == 1 else looks.sum(dim=1), alpha=1 / heads)
                mixed[:, some] = probabilities[:, :, :goes_on].to(self._dtype) @ value[:, some]
        alike = None
        if values is not None:
            likeness = hidden.new_zeros(batch, length, length)
            for some in _heads_together(heads, hidden):
                for part in (query[:, some], key[:, some], value[:, some]):
                    alike_to = (part * scale @ part.transpose(-2, -1)).float()
                    likeness += torch.softmax(alike_to, dim=-1).sum(dim=1)
            # one map for all heads: the order of it and the projection doesn't matter
            projected = F.linear(value.transpose(1, 2).flatten(2), layer.self_attn.out_proj.weight)
            values += projected[:, 1:]
            alike = ((likeness / 3).to(self._dtype) @ projected).float() + layer.self_attn.out_proj.bias
        attended = layer.self_attn.out_proj(mixed.transpose(1, 2).flatten(2))
        inside = hidden[:, :goes_on] + _without(attended, dropped)
        changed = layer.mlp(layer.layer_norm2(inside).to(self._dtype))
        return inside + _without(changed, dropped), inside, alike


def _without(branch: Tensor, dropped: float) -> Tensor:
    """A branch (B, N, D) with a share of its tokens 0, the same in all images, and the others as much larger."""
    if not dropped:
        return branch
    kept = torch.rand(1, branch.shape[1], 1, device=branch.device) >= dropped
    return branch * kept / (1 - dropped)


def _heads_together(heads: int, hidden: Tensor) -> list[slice]:
    """Which heads' maps of tokens (B, N, D) are made at once, so that sums are the same in a batch of any size."""
    at_a_time = 1 if hidden.device.type == "cpu" else max(1, MAPS_TOGETHER // hidden.shape[1] ** 2)
    return [slice(head, head + at_a_time) for head in range(0, heads, at_a_time)]


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
