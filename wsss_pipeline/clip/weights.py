"""Loading a CLIP that was found: both towers and the tokenizer, frozen, in float32."""

from __future__ import annotations

import logging as stdlib_logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss_pipeline.clip.openai_archive import read_openai_weights
from wsss_pipeline.clip.openai_names import to_hugging_face
from wsss_pipeline.clip.sources import ClipFiles, read_config
from wsss_pipeline.errors import WeightsError


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP, frozen, in float32.

    ``vision`` and ``text``: the towers of ``transformers`` with their projections; ``logit_scale``: the
    factor on the cosine, already exponentiated.
    """

    vision: Any
    text: Any
    tokenizer: Any
    logit_scale: float


def load_clip(files: ClipFiles, device: torch.device) -> Clip:
    """Load both towers and the tokenizer.

    Raises:
        WeightsError: damaged, incomplete, or not a vision transformer CLIP.
    """
    from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    with _quiet_transformers(), _explained(files.name):
        if files.config is None:
            values, tensors = to_hugging_face(read_openai_weights(files.weights[0]), files.name)
        else:
            values, tensors = read_config(files.config), _read_tensors(files.weights)
        config: Any = CLIPConfig(**values)
        vision = _fill(CLIPVisionModelWithProjection(config.vision_config), tensors, files.name).to(device)
        text = _fill(CLIPTextModelWithProjection(config.text_config), tensors, files.name).to(device)
        tokenizer = _load_tokenizer(files.tokenizer)
        scale = tensors.get("logit_scale")
        if scale is None:
            raise WeightsError(f"{files.name} has no logit_scale; it isn't a whole CLIP model")
    return Clip(vision, text, tokenizer, float(scale.float().exp()))


def _read_tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in files:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        tensors.update(loaded)
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}


def _fill(tower: torch.nn.Module, tensors: Mapping[str, Tensor], name: str) -> torch.nn.Module:
    own = {key: tensors[key] for key in tower.state_dict() if key in tensors}
    missing = sorted(set(tower.state_dict()) - set(own))
    if missing:
        raise WeightsError(
            f"{name} lacks {len(missing)} tensors, {missing[0]} among them; it isn't a whole CLIP model"
        )
    tower.load_state_dict(own)
    return tower.requires_grad_(False).eval()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One line for whatever the libraries raise on damaged or foreign files."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"CLIP {name} can't be loaded: {reason}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The library's warnings and bars are about its own loading; what matters is said by our errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(stdlib_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
