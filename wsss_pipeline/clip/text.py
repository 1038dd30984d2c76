"""What CLIP is asked: prompts through its text tower to unit rows, templates averaged, synonyms fused.

Source: CLIP-ES (arXiv 2212.09506), section 3.3.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.classes import ClassSet
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
            batch_size: number of texts that go through the network together.

        Returns:
            float32 (N, P), each row of length 1, on the CPU.

        Raises:
            ConfigError: a prompt is longer than the model reads (CLIP: 77 tokens, two of them its frame).
        """
        device = next(self._model.parameters()).device
        rows = [torch.empty(0, int(self._model.config.projection_dim))]
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            # padding to the longest of the batch: the mask is causal, so what follows the end token changes nothing
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt", verbose=False)
            for prompt, length in zip(texts, tokens["attention_mask"].sum(dim=1).tolist(), strict=True):
                if length > self._longest:
                    shown = textwrap.shorten(prompt, 80, placeholder="...")
                    raise ConfigError(
                        f"the prompt '{shown}' has {length} tokens, CLIP reads {self._longest}; shorten it"
                    )
            embeddings = self._model(
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            ).text_embeds
            rows.append(F.normalize(embeddings.float(), dim=1).cpu())
        return torch.cat(rows)


@dataclass(frozen=True)
class ClassEmbeddings:
    """float32 unit rows: ``foreground`` (C, P) in class order, ``background`` (G, P) in word order."""

    foreground: Tensor
    background: Tensor


def class_embeddings(
    classes: ClassSet, templates: Sequence[str], encode: Callable[[Sequence[str]], Tensor]
) -> ClassEmbeddings:
    """Text embeddings of all classes and background words.

    A text's row is the mean over the templates, made a unit again; a class with several texts (feature
    fusion) has the mean of their rows, made a unit again.

    Args:
        classes: texts come from ``ClassEntry.texts()``: one with sentence fusion, several with feature fusion.
        templates: at least one, each with one ``{}``.
        encode: N prompts to float32 (N, P) unit rows; called once.
    """
    groups = [entry.texts() for entry in classes.classes] + [(word,) for word in classes.background]
    # replace, not format: other braces in a template are just characters
    prompts = [template.replace("{}", text) for texts in groups for text in texts for template in templates]
    rows = encode(prompts)
    per_text = F.normalize(rows.view(-1, len(templates), rows.shape[-1]).mean(dim=1), dim=1)
    fused = fuse(per_text, [len(texts) for texts in groups])
    count = len(classes.classes)
    return ClassEmbeddings(fused[:count], fused[count:])


def fuse(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Unit rows of classes, (C, P): the mean, made a unit again, of ``counts[c]`` consecutive rows of (N, P)."""
    return F.normalize(torch.stack([part.mean(dim=0) for part in torch.split(rows, list(counts))]), dim=1)


def built_in_templates() -> tuple[str, ...]:
    """The templates that come with the package to choose from, each with one ``{}``."""
    import yaml

    text = (resources.files("wsss_pipeline.clip") / "templates.yaml").read_text("utf-8")
    return tuple(yaml.safe_load(text))
