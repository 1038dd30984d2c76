"""CLIP's text tower: prompts to unit rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.errors import ConfigError


class TextEncoder:
    """A frozen CLIP text transformer.

    Args:
        text_model: a ``transformers.CLIPTextModelWithProjection``.
        tokenizer: its tokenizer.
    """

    def __init__(self, text_model: Any, tokenizer: Any) -> None:
        self._model = text_model
        self._tokenizer = tokenizer
        self._longest = int(text_model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Text embeddings.

        Args:
            prompts: N texts, already in their templates.
            batch_size: how many go through the network together.

        Returns:
            float32 (N, P), each row of length 1, on the CPU.

        Raises:
            ConfigError: a prompt is longer than the model reads (CLIP: 77 tokens, two of them its frame).
        """
        rows = [
            self._encode(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)
        ]
        width = int(self._model.config.projection_dim)
        return torch.cat(rows) if rows else torch.empty(0, width)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        # padding to the longest of the batch: the mask is causal, so what follows the end token changes nothing
        tokens = self._tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False)
        for prompt, length in zip(prompts, tokens["attention_mask"].sum(dim=1).tolist(), strict=True):
            if length > self._longest:
                shown = textwrap.shorten(prompt, 80, placeholder="...")
                raise ConfigError(
                    f"the prompt '{shown}' has {length} tokens, CLIP reads {self._longest}; shorten it"
                )
        device = next(self._model.parameters()).device
        embeddings = self._model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).text_embeds
        return F.normalize(embeddings.float(), dim=1).cpu()
