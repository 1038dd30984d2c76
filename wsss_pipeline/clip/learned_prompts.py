"""Prompts whose words are learned: a context of free token embeddings around each class's text.

Source: FMA-WSSS (Yang and Gong, WACV 2024), section 3.2, after CoOp (Zhou et al., IJCV 2022), as its published code
computes it. CLIP stays frozen; the context is all that is learned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from wsss_pipeline.clip.text import ClassEmbeddings, TextEncoder, class_embeddings, fuse
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import ContextLayout, PromptedMaskConfig
from wsss_pipeline.data.classes import MAX_CLASSES, MAX_LENGTH, MOST_TEXTS, ClassSet
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.files import MIB, check_machine, check_plain, parse_json
from wsss_pipeline.runtime.output import MARK, one_line, write_file

logger = logging.getLogger(__name__)

MOST_FILE_BYTES = 512 * MIB  # 1,254 contexts of CLIP's longest prompt and largest width
MOST_DESCRIPTION = 8 * MIB  # characters of JSON
TEXTS_TOGETHER = 32  # that are encoded behind the tokens that they share; what is left of each sees no other
_TENSOR, _DESCRIPTION = "context", "prompts"


class PromptEncoder:
    """A frozen CLIP text tower over texts with a context, differentiable in the context.

    The tokens of a text are start, context, text, full stop, end with the layout ``end``, and start, text, context,
    full stop, end with ``front``. They are cut after the longest text's end, since no token sees those behind it.

    Args:
        clip: both towers and the tokenizer.
        texts: texts of each of C classes, without template, N in all; an empty one is a context alone. A class with
            several has the mean of their rows, made a unit again.
        layout: place of the text.
        length: number of tokens of the context.

    Attributes:
        tokens: int64 (N, T), zeros where the context comes and behind the end.
        places: int64 (N, length), where the context comes.
        ends: int64 (N,), the place of the end token.

    Raises:
        ConfigError: a text is longer than the model reads with its context.
    """

    def __init__(
        self, clip: Clip, texts: Sequence[Sequence[str]], layout: ContextLayout, length: int
    ) -> None:
        self._text, self._layout = clip.text, layout
        longest = int(clip.text.config.max_position_embeddings)
        start, *_, end = clip.tokenizer("")["input_ids"]
        room = [0] * length
        rows, before = [], []
        for text in chain.from_iterable(texts):
            name, whole = (
                clip.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                for part in (text, f"{text}.")
            )
            split = len(name) if layout == "front" else 0
            rows.append([start, *whole[:split], *room, *whole[split:], end])
            before.append(1 + split)
            if len(rows[-1]) > longest:
                raise ConfigError(
                    f"the text '{one_line(text, 80)}' has {len(rows[-1])} tokens with a context of {length}, CLIP "
                    f"reads {longest}; shorten it, or lower context.length"
                )
        device = clip.text.text_projection.weight.device
        self._counts = [len(several) for several in texts]
        self._owners = torch.arange(len(texts)).repeat_interleave(torch.tensor(self._counts)).to(device)
        widest = max(map(len, rows), default=2)
        self.tokens = torch.tensor([row + [0] * (widest - len(row)) for row in rows], device=device)
        self.places = torch.tensor(before, device=device)[:, None] + torch.arange(length, device=device)
        self.ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        self._words = clip.text.text_model.embeddings.token_embedding(self.tokens)

    def embedded(self, context: Tensor) -> Tensor:
        """Token embeddings before the position embeddings, float32 (N, T, D); ``context`` as for a call."""
        own = context[self._owners] if context.ndim == 3 else context.expand(len(self.tokens), -1, -1)
        places = self.places[..., None].expand(-1, -1, context.shape[-1])
        placed: Tensor = self._words.scatter(1, places, own)
        return placed

    def __call__(self, context: Tensor) -> Tensor:
        """Unit rows, float32 (C, P), out of one context (length, D), or one for each class, (C, length, D)."""
        # what each class has of its own comes first, or a context of its own: then no two have more than the start
        shared = 1 + len(context) if self._layout == "end" and context.ndim == 2 else 0
        features = text_features(self._text, self.embedded(context), self.ends, shared)
        return fuse(F.normalize(features, dim=1), self._counts)


def text_features(text_model: Any, embedded: Tensor, ends: Tensor, shared: int = 0) -> Tensor:
    """What a text tower makes of token embeddings, float32 (N, P), not normalised; differentiable in all of it.

    Args:
        text_model: a ``transformers.CLIPTextModelWithProjection``.
        embedded: float32 (N, T, D), before the position embeddings.
        ends: int64 (N,), place of each text's end token, behind the ``shared`` ones.
        shared: number of first tokens that are the same in all texts. No token sees those behind it, so they are
            encoded once for some dozens of texts.
    """
    tower, (count, length, width) = text_model.text_model, embedded.shape
    hidden = embedded + tower.embeddings.position_embedding.weight[:length]
    together = math.ceil(count / math.ceil(count / TEXTS_TOGETHER)) if shared else 1
    rows = math.ceil(count / together)
    own = F.pad(hidden[:, shared:], (0, 0, 0, 0, 0, rows * together - count))
    # a row of tokens is what is shared, and behind it what is left of one text after another
    hidden = torch.cat(
        [hidden[:1, :shared].expand(rows, -1, -1), own.reshape(rows, together * own.shape[1], width)], dim=1
    )
    place = torch.arange(hidden.shape[1], device=embedded.device)
    text = torch.where(place < shared, -1, (place - shared) // own.shape[1])
    is_seen = (place <= place[:, None]) & ((text == text[:, None]) | (text == -1))
    mask = torch.zeros_like(is_seen, dtype=hidden.dtype).masked_fill(~is_seen, -torch.inf)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, mask[None, None])
    number = torch.arange(count, device=embedded.device)
    taken = hidden[number // together, number % together * own.shape[1] + ends]
    features: Tensor = text_model.text_projection(tower.final_layer_norm(taken))
    return features


# with sentence fusion all synonyms of a class are one
_Text = Annotated[str, Field(max_length=(1 + MOST_TEXTS) * (1 + MAX_LENGTH))]


class _Description(BaseModel):
    """What a file of learned prompts says of them."""

    model_config = ConfigDict(strict=True)

    layout: ContextLayout
    class_names: list[_Text] = Field(min_length=1, max_length=MAX_CLASSES)
    texts: list[Annotated[list[_Text], Field(min_length=1, max_length=1 + MOST_TEXTS)]]
    background: list[_Text] = Field(max_length=MOST_TEXTS)
    text_tower: str = Field(pattern="^[0-9a-f]{64}$")


@dataclass(frozen=True, eq=False)
class LearnedPrompts:
    """A learned context and what it belongs to.

    Attributes:
        context: float32 (length, D), shared by all texts, or (C+G, length, D): one for each class, then one for each
            background word.
        layout: place of the class's text, see ``PromptEncoder``.
        class_names: names of mask values 1..C.
        texts: texts of each class, see ``ClassEntry.texts``.
        background: G background words; empty ones are free rows, a context alone.
        text_tower: digest of the text tower that it was learned with, see ``text_tower_digest``.
    """

    context: Tensor
    layout: ContextLayout
    class_names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    background: tuple[str, ...]
    text_tower: str

    def save(self, path: Path) -> None:
        """Write or replace a safetensors file; an OutputError where it can't be written."""
        from safetensors.torch import save

        described = {
            "layout": self.layout,
            "class_names": self.class_names,
            "texts": self.texts,
            "background": self.background,
            "text_tower": self.text_tower,
        }
        metadata = {"program": MARK, _DESCRIPTION: json.dumps(described, ensure_ascii=False)}
        write_file(path, save({_TENSOR: self.context.detach().cpu().float().contiguous()}, metadata))

    @classmethod
    def load(cls, path: Path) -> LearnedPrompts:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: it can't be read, is too large, or holds something else.
        """
        from safetensors import safe_open

        shown = f"--prompts {one_line(path, 200)}"
        try:
            check_plain(path, MOST_FILE_BYTES)
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_DESCRIPTION, "")
                if list(file.keys()) != [_TENSOR] or not 0 < len(text) <= MOST_DESCRIPTION:
                    raise ValueError("it holds no learned prompts")
                found = _Description.model_validate(parse_json(text))
                stored = file.get_slice(_TENSOR)
                shape, rows = stored.get_shape(), len(found.texts) + len(found.background)
                if (
                    stored.get_dtype() != "F32"
                    or len(shape) not in (2, 3)
                    or min(shape) < 1
                    or (len(shape) == 3 and shape[0] != rows)
                    or len(found.texts) != len(found.class_names)
                ):
                    raise ValueError(f"a context of shape {shape} for {rows} texts")
                context = file.get_tensor(_TENSOR).clone()
            if not context.isfinite().all():
                raise ValueError("its context isn't finite")
        except MemoryError:
            raise
        except Exception as error:  # what a damaged file raises is up to its format
            check_machine(error)
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False)[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ConfigError(
                f"{shown} can't be used: {one_line(reason, 200)}; give a file of `wsss learn-prompts`"
            ) from error
        return cls(
            context,
            found.layout,
            tuple(found.class_names),
            tuple(map(tuple, found.texts)),
            tuple(found.background),
            found.text_tower,
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all that determines the rows, CLIP's weights left aside."""
        described = [self.layout, self.texts, self.background, list(self.context.shape)]
        content = hashlib.sha256(json.dumps(described).encode())
        content.update(self.context.contiguous().numpy().tobytes())
        return content.hexdigest()

    def check_classes(self, classes: ClassSet, origin: str) -> None:
        """A ConfigError where they were learned for other classes, texts or background words."""
        if self.class_names != classes.names:
            raise ConfigError(
                f"{origin}: learned for other classes, {one_line(', '.join(self.class_names), 200)}; give these with "
                "--classes, or learn prompts for yours with `wsss learn-prompts`"
            )
        for entry, own in zip(classes.classes, self.texts, strict=True):
            if own != entry.texts():
                raise ConfigError(
                    f"{origin}: learned for class '{entry.name}' with the text '{one_line(', '.join(own), 80)}', not "
                    f"'{one_line(', '.join(entry.texts()), 80)}'; give the class set that they were learned for"
                )
        if any(self.background) and self.background != classes.background:
            raise ConfigError(
                f"{origin}: learned with other background words, {one_line(', '.join(self.background), 200)}; give "
                "the class set that they were learned for"
            )

    def rows(self, clip: Clip, origin: str) -> ClassEmbeddings:
        """Unit rows of classes and background, on the CPU; a ConfigError where CLIP isn't the one they belong to."""
        if text_tower_digest(clip) != self.text_tower:
            raise ConfigError(
                f"{origin}: learned with the text tower of another CLIP; give that one with --clip, or learn prompts "
                "for this one with `wsss learn-prompts`"
            )
        texts = [*self.texts, *((word,) for word in self.background)]
        encoder = PromptEncoder(clip, texts, self.layout, self.context.shape[-2])
        with torch.no_grad():
            rows = encoder(self.context.to(encoder.tokens.device)).cpu()
        return ClassEmbeddings(rows[: len(self.texts)], rows[len(self.texts) :])


def text_tower_digest(clip: Clip) -> str:
    """SHA-256 (hexadecimal) of what determines a text's row: weights, architecture, vocabulary."""
    config = clip.text.config
    architecture = {
        key: getattr(config, key) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")
    }
    vocabulary = json.loads(clip.tokenizer.backend_tokenizer.to_str())["model"]
    content = hashlib.sha256(json.dumps([architecture, vocabulary], sort_keys=True).encode())
    for name, tensor in sorted(clip.text.state_dict().items()):
        content.update(f"{name} {list(tensor.shape)} ".encode())
        content.update(tensor.float().cpu().contiguous().numpy())
    return content.hexdigest()


def seed_number(seed: str) -> int:
    """A seed of torch's random numbers: the number that the text is, or one out of any other text's SHA-1."""
    if seed.isdecimal():
        return int(seed) % 2**63
    return int(hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest(), 16) % 2**32


def initial_context(shape: Sequence[int], std: float, seed: str) -> Tensor:
    """float32 of that shape on the CPU, normal with deviation ``std``, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed_number(seed))
    return torch.empty(*shape).normal_(std=std, generator=generator)


def class_rows(config: PromptedMaskConfig, classes: ClassSet, clip: Clip) -> ClassEmbeddings:
    """Rows of all classes and background words: of learned prompts where the settings name a file, else of templates.

    Raises:
        ConfigError: the file can't be used, or belongs to other classes or another CLIP.
    """
    if not config.prompts:
        return class_embeddings(classes, config.templates, TextEncoder(clip.text, clip.tokenizer).encode)
    learned, origin = _learned(config, classes)
    rows = learned.rows(clip, origin)
    kind = "a context for each class" if learned.context.ndim == 3 else "one context for all classes"
    logger.info("prompts: learned, %s, layout %s", kind, learned.layout)
    return rows


def prompt_determinants(config: PromptedMaskConfig, classes: ClassSet) -> Mapping[str, Any]:
    """Of the fingerprint, what learned prompts put in the place of templates and background words."""
    if not config.prompts:
        return {}
    learned, _ = _learned(config, classes)
    return {"templates": [], "background": list(learned.background), "prompts": learned.digest}


def _learned(config: PromptedMaskConfig, classes: ClassSet) -> tuple[LearnedPrompts, str]:
    """The prompts that the settings name, for these classes; and what names them in messages."""
    origin = f"--prompts {one_line(config.prompts, 200)}"
    learned = LearnedPrompts.load(Path(config.prompts))
    learned.check_classes(classes, origin)
    return learned, origin
