"""Loading a CLIP that was found: both towers and the tokenizer, frozen, in float32."""

from __future__ import annotations

import logging as stdlib_logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wsss_pipeline.clip.openai_archive import read_openai_weights
from wsss_pipeline.clip.openai_names import to_hugging_face
from wsss_pipeline.clip.sources import ClipFiles, read_config
from wsss_pipeline.clip.tensor_files import shapes_in, tensors_in
from wsss_pipeline.errors import WeightsError, WsssError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import one_line

Value = TypeVar("Value")


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP, frozen, in float32.

    Attributes:
        vision, text: the towers of ``transformers`` with their projections.
        tokenizer: tokenizer of the text tower.
        logit_scale: factor on the cosine, already exponentiated.
        files: origin of it all; None where it didn't come from files.
    """

    vision: Any
    text: Any
    tokenizer: Any
    logit_scale: float
    files: ClipFiles | None = None


def load_clip(files: ClipFiles, device: torch.device) -> Clip:
    """Load both towers and the tokenizer.

    Weights come as safetensors or, in older repositories, as ``pytorch_model.bin``, which is a pickle and is
    read by ``torch.load(weights_only=True)``: no code in it runs.

    Raises:
        WeightsError: damaged, incomplete, not a vision transformer CLIP, or with another model's vocabulary.
    """
    import transformers as library

    transformers: Any = library  # which knows the tokenizer's name only at run time
    with loading(f"CLIP {files.name}"):
        tensors: dict[str, Tensor] = {}
        if files.config is None:
            values, tensors = to_hugging_face(read_openai_weights(files.weights[0]), files.name)
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        else:
            values, shapes = read_config(files.config), read_tensor_files(files.weights, shapes_in)
        if shapes.get("logit_scale") not in ((), (1,)):
            raise WeightsError(f"{files.name} has no logit_scale; it isn't a whole CLIP model")
        config = transformers.CLIPConfig(**values)
        vision_config, text_config = config.vision_config, config.text_config
        tokenizer = transformers.CLIPTokenizerFast.from_pretrained(files.tokenizer, local_files_only=True)
        end, size = int(tokenizer("")["input_ids"][-1]), text_config.vocab_size
        if len(tokenizer) > size or end not in (text_config.eos_token_id, size - 1):
            raise WeightsError(
                f"the vocabulary in {files.tokenizer} ({len(tokenizer)} tokens, the end is {end}) isn't that of "
                f"{files.name} ({size} tokens); give the model's own with --tokenizer"
            )
        # where the text tower takes its feature; in older configurations this number is wrong
        text_config.eos_token_id = end
        # configurations of converted OpenCLIP models give the width right for the whole, and wrong for the towers
        for tower, name in ((vision_config, "visual_projection"), (text_config, "text_projection")):
            if shapes.get(f"{name}.weight"):
                tower.projection_dim = shapes[f"{name}.weight"][0]
        towers = [
            (transformers.CLIPVisionModelWithProjection, vision_config),
            (transformers.CLIPTextModelWithProjection, text_config),
        ]
        # before any tensor is read: a file that takes no room on the disk may be larger than the memory
        names = [checked_names(*tower, shapes, files.name, "CLIP") for tower in towers]
        tensors = tensors or read_tensor_files(files.weights, tensors_in)
        vision, text = (frozen_model(*tower, own, tensors) for tower, own in zip(towers, names, strict=True))
        scale = float(tensors["logit_scale"].float().exp())
        return Clip(vision.to(device), text.to(device), tokenizer, scale, files)


def read_tensor_files(files: tuple[Path, ...], read: Callable[[Path], dict[str, Value]]) -> dict[str, Value]:
    """What ``read``, a function of ``tensor_files``, finds in all the files; WeightsError where one can't be read."""
    found: dict[str, Value] = {}
    for path in files:
        try:
            found |= read(path)
        except MemoryError:
            raise
        except Exception as error:  # what a damaged or hostile file raises is up to its format
            check_machine(error)
            reason = one_line(getattr(error, "strerror", None) or error, 200)
            raise WeightsError(f"{path} can't be read ({reason}); fetch it again") from error
    return found


def checked_names(
    kind: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], name: str, family: str
) -> list[str]:
    """Names of a model's tensors, all of which are there in the right shape.

    Args:
        kind: class of ``transformers``.
        config: its configuration.
        shapes: shape of each tensor that the files hold.
        name: text that the user gave, for messages.
        family: what the model is one of, for messages.

    Raises:
        WeightsError: one is missing, or has another shape.
    """
    with torch.device("meta"):  # names and shapes alone: no memory, no random numbers
        wanted = {key: tuple(value.shape) for key, value in kind(config).state_dict().items()}
    if missing := sorted(wanted.keys() - shapes.keys()):
        raise WeightsError(
            f"{name} lacks {len(missing)} tensors, such as {missing[0]}; it isn't a whole {family} model"
        )
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise WeightsError(
                f"{name}: {key} has shape {shapes[key]} instead of {shape}; "
                "weights and configuration belong to different models"
            )
    return list(wanted)


def frozen_model(kind: Any, config: Any, names: list[str], tensors: Mapping[str, Tensor]) -> Any:
    """A model in float32, whatever the configuration's own type, with its part of the tensors, frozen.

    Args:
        kind: class of ``transformers``.
        config: its configuration.
        names: result of ``checked_names``.
        tensors: those that the files hold, by name.
    """
    # copies: what was read may be the mapped file itself, which others can write to
    own = {key: tensors[key].to(torch.float32, copy=True) for key in names}
    model = kind.from_pretrained(None, config=config, state_dict=own, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A WeightsError about ``what`` for whatever the libraries raise on damaged or foreign files.

    Their warnings and bars are about their own loading; what matters is said by our errors.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(stdlib_logging.ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (WsssError, MemoryError):
        raise
    except Exception as error:
        check_machine(error)
        reason = one_line(error, 200) or type(error).__name__
        raise WeightsError(f"{what} can't be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
