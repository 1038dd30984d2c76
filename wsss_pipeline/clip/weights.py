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

from wsss_pipeline.clip.openai_archive import read_openai_weights, read_state_dict
from wsss_pipeline.clip.openai_names import to_hugging_face
from wsss_pipeline.clip.sources import ClipFiles, read_config
from wsss_pipeline.errors import WeightsError


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP, frozen, in float32.

    Attributes:
        vision, text: the towers of ``transformers`` with their projections.
        tokenizer: of the text tower.
        logit_scale: factor on the cosine, already exponentiated.
    """

    vision: Any
    text: Any
    tokenizer: Any
    logit_scale: float


def load_clip(files: ClipFiles, device: torch.device) -> Clip:
    """Load both towers and the tokenizer.

    Weights come as safetensors or, in older repositories, as ``pytorch_model.bin``, which is a pickle and is
    read by ``torch.load(weights_only=True)``: no code in it runs.

    Raises:
        WeightsError: damaged, incomplete, not a vision transformer CLIP, or with another model's vocabulary.
    """
    from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    with _quiet_transformers(), _explained(files.name):
        if files.config is None:
            values, tensors = to_hugging_face(read_openai_weights(files.weights[0]), files.name)
        else:
            values, tensors = read_config(files.config), _read_tensors(files.weights)
        if "logit_scale" not in tensors:
            raise WeightsError(f"{files.name} has no logit_scale; it isn't a whole CLIP model")
        config: Any = CLIPConfig(**values)
        tokenizer = _load_tokenizer(files.tokenizer)
        # where the text tower takes its feature; in older configurations this number is wrong
        config.text_config.eos_token_id = _end_of_text(tokenizer, config.text_config, files)
        _set_projections(config, tensors)
        vision = _tower(CLIPVisionModelWithProjection, config.vision_config, tensors, files.name).to(device)
        text = _tower(CLIPTextModelWithProjection, config.text_config, tensors, files.name).to(device)
    return Clip(vision, text, tokenizer, float(tensors["logit_scale"].float().exp()))


def _read_tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.suffix != ".safetensors":
            tensors |= read_state_dict(path)
            continue
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read ({_one_line(error)}); fetch it again") from error
    return tensors


def _set_projections(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Width of the projections as the tensors have it.

    Configurations of converted OpenCLIP models give it right for the whole, and wrong for the towers.
    """
    for tower, name in ((config.vision_config, "visual_projection"), (config.text_config, "text_projection")):
        if f"{name}.weight" in tensors:
            tower.projection_dim = len(tensors[f"{name}.weight"])


def _tower(kind: Any, config: Any, tensors: Mapping[str, Tensor], name: str) -> Any:
    """A frozen tower in float32, whatever the configuration's own type, with its part of the tensors."""
    with torch.device("meta"):  # names and shapes alone: no memory, no random numbers
        shapes = {key: value.shape for key, value in kind(config).state_dict().items()}
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise WeightsError(
            f"{name} lacks {len(missing)} tensors, {missing[0]} among them; it isn't a whole CLIP model"
        )
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise WeightsError(
                f"{name}: {key} has shape {tuple(tensors[key].shape)} instead of {tuple(shape)}; "
                "weights and configuration belong to different models"
            )
    # copies: what was read may be the mapped file itself, which others can write to
    own = {key: tensors[key].to(torch.float32, copy=True) for key in shapes}
    tower = kind.from_pretrained(None, config=config, state_dict=own, dtype=torch.float32)
    return tower.requires_grad_(False).eval()


def _load_tokenizer(folder: Path) -> Any:
    import transformers

    library: Any = transformers  # which knows this name only at run time
    return library.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _end_of_text(tokenizer: Any, config: Any, files: ClipFiles) -> int:
    """The number of the token that ends a text, as the vocabulary has it.

    Raises:
        WeightsError: the text tower was made for another vocabulary.
    """
    end = int(tokenizer("")["input_ids"][-1])
    if len(tokenizer) > config.vocab_size or end not in (config.eos_token_id, config.vocab_size - 1):
        raise WeightsError(
            f"the vocabulary in {files.tokenizer} ({len(tokenizer)} tokens, the end is {end}) isn't that of "
            f"{files.name} ({config.vocab_size} tokens); give the model's own with --tokenizer"
        )
    return end


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One line for whatever the libraries raise on damaged or foreign files."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"CLIP {name} can't be loaded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The library's warnings and bars are about its own loading; what matters is said by our errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(stdlib_logging.ERROR)
    if bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
