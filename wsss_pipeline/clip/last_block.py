"""The last block of CLIP's vision transformer, and the gradient that Grad-CAM needs of it, without autograd.

Grad-CAM asks for the mean over all patches of d score / d token, at the input of the last self-attention. A sum
over tokens spares most of a backward pass: the rows of the softmax's gradient sum to 0, so of the keys only the
class token's matters, of the queries only the column sums, and the attention's own backward pass becomes one
product for all classes. At the other end, where all patches are pooled, every token has the same gradient
before the last normalisation, so that the first product of the MLP's backward pass is shared by all classes.

Source: softmax-GradCAM is CLIP-ES's (arXiv 2212.09506, section 3.2); the closed form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Normalised:
    """Tokens before a layer norm's gain and bias, and what they were divided by.

    Attributes:
        values: (N, D), mean 0 and variance 1.
        scale: (N, 1), one over the standard deviation.
    """

    values: Tensor
    scale: Tensor


class LastBlock:
    """A frozen last block with what comes after it.

    Args:
        layer: last one of ``transformers``' CLIP encoder.
        post_norm: the layer norm after it.
        projection: linear map to the joint embedding space.
        dtype: type of the products of the linear layers; all else is float32.
    """

    def __init__(self, layer: Any, post_norm: Any, projection: Any, dtype: torch.dtype) -> None:
        self.layer = layer
        self.post_norm = post_norm
        self.projection: Tensor = projection.weight
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2)
        for linear in linears:
            linear.to(dtype)

    def forward(self, hidden: Tensor) -> LastBlockPass:
        """From the residual stream of one image before the block, float32 (N, D)."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        tokens = self.layer.layer_norm1(hidden)
        query, key, value = (
            _product(tokens, linear).view(len(tokens), attention.num_heads, -1).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scale = float(query.shape[-1] ** -0.5)
        probabilities = torch.softmax(query * scale @ key.transpose(1, 2), dim=-1)
        mixed = probabilities @ value
        hidden = hidden + _product(mixed.transpose(0, 1).flatten(1), attention.out_proj)
        inner, normed = _layer_norm(hidden, self.layer.layer_norm2)
        activated, slope = _with_slope(mlp.activation_fn, _product(normed, mlp.fc1))
        output = hidden + _product(activated, mlp.fc2)
        outer, normed = _layer_norm(output, self.post_norm)
        pooled = normed[1:].mean(dim=0) @ self.projection.T
        return LastBlockPass(
            self, tokens, output, normed, pooled, query, key, value, mixed, probabilities, inner, outer, slope
        )


@dataclass(frozen=True)
class LastBlockPass:
    """The forward pass of one image of hw patches, N = 1+hw tokens of width D, H heads of width d.

    Attributes:
        block: block that it went through.
        tokens: float32 (N, D), the normalised input of the self-attention, class token first.
        output: float32 (N, D), the residual stream after the block.
        normed: float32 (N, D), the same after the last layer norm.
        pooled: float32 (P,), mean over the patch embeddings, not normalised; the class token takes no part.
        query, key, value, mixed: float32 (H, N, d).
        probabilities: float32 (H, N, N), row-stochastic.
        inner, outer: results of the layer norms before the MLP and before the projection.
        slope: float32 (N, M), the activation's derivative inside the MLP.
    """

    block: LastBlock
    tokens: Tensor
    output: Tensor
    normed: Tensor
    pooled: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    probabilities: Tensor
    inner: Normalised
    outer: Normalised
    slope: Tensor

    def patches(self) -> Tensor:
        """Patch embeddings, float32 (hw, P), not normalised."""
        return self.normed[1:] @ self.block.projection.T

    def mean_token_gradients(self, pooled_gradients: Tensor) -> Tensor:
        """Mean over the patches of the gradient of K scores at ``tokens``.

        Linear in ``pooled_gradients``, so what these depend on, such as the rows of texts, gets its own gradient.

        Args:
            pooled_gradients: float32 (K, P), gradient of each score at ``pooled``.

        Returns:
            float32 (K, D). The class token's own gradient takes no part in the mean.
        """
        layer, patches = self.block.layer, len(self.tokens) - 1
        # the class token isn't pooled, so nothing comes back to its row: patches alone from here to the queries
        mixed = self._mixed_gradients(pooled_gradients @ self.block.projection / patches)
        query, key, value = self.query[:, 1:], self.key, self.value
        probabilities = self.probabilities[:, 1:]
        along = (mixed * self.mixed[:, None, 1:]).sum(dim=-1)  # (H, K, N-1)
        heads, classes, _, width = mixed.shape
        columns = torch.cat([mixed, along[..., None]], dim=-1).transpose(1, 2).flatten(2)
        collected = (probabilities.transpose(1, 2) @ columns).view(heads, -1, classes, width + 1)
        sums = (collected[..., :width] * value[:, :, None]).sum(dim=-1) - collected[..., width]  # (H, N, K)
        from_queries = sums.transpose(1, 2) @ key
        first = probabilities[:, None, :, 0] * ((mixed @ value[:, None, 0, :, None])[..., 0] - along)
        from_keys = -(first @ query)
        from_values = ((1 - probabilities[:, None, None, :, 0]) @ mixed)[:, :, 0]
        scale, attention = float(width**-0.5), layer.self_attn
        # heads joined: (K, H*d) out of (H, K, d)
        return (
            _back(scale * from_queries.transpose(0, 1).flatten(1), attention.q_proj)
            + _back(scale * from_keys.transpose(0, 1).flatten(1), attention.k_proj)
            + _back(from_values.transpose(0, 1).flatten(1), attention.v_proj)
        ) / patches

    def _mixed_gradients(self, gradients: Tensor) -> Tensor:
        """Gradients (K, D) at each patch's output of the last norm, back to the heads' outputs (H, K, N-1, d)."""
        layer = self.block.layer
        normed, scale = self.outer.values[1:], self.outer.scale[1:]
        gained = gradients * self.block.post_norm.weight
        constant = gained - gained.mean(dim=-1, keepdim=True)  # (K, D), the same at every patch
        along = (gained @ normed.T / normed.shape[1])[..., None]  # (K, N-1, 1)
        hidden = scale * (constant[:, None] - along * normed)
        inside = _back(constant, layer.mlp.fc2)[:, None] - along * _back(normed, layer.mlp.fc2)
        inside *= scale * self.slope[1:]
        # back through the layer norm before the MLP
        gradient = _back(inside, layer.mlp.fc1) * layer.layer_norm2.weight
        values = self.inner.values[1:]
        along = (gradient * values).mean(dim=-1, keepdim=True)
        hidden += self.inner.scale[1:] * (gradient - gradient.mean(dim=-1, keepdim=True) - values * along)
        mixed = _back(hidden, layer.self_attn.out_proj)
        return mixed.view(*mixed.shape[:2], len(self.query), -1).permute(2, 0, 1, 3)


def _product(tokens: Tensor, linear: nn.Linear) -> Tensor:
    """float32 (..., M) out of (..., D), in the precision of the layer."""
    return F.linear(tokens.to(linear.weight.dtype), linear.weight, linear.bias).to(tokens.dtype)


def _back(gradient: Tensor, linear: nn.Linear) -> Tensor:
    """Gradient at a linear layer's input from that at its output, in the precision of the layer."""
    return (gradient.to(linear.weight.dtype) @ linear.weight).to(gradient.dtype)


def _layer_norm(hidden: Tensor, norm: Any) -> tuple[Normalised, Tensor]:
    variance, mean = torch.var_mean(hidden, dim=-1, keepdim=True, correction=0)
    scale = (variance + norm.eps).rsqrt()
    values = (hidden - mean) * scale
    return Normalised(values, scale), values * norm.weight + norm.bias


def _with_slope(activation: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative, whichever it is."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        outputs = activation(leaf)
        (slope,) = torch.autograd.grad(outputs.sum(), leaf)
    return outputs.detach(), slope
