"""Loading a CLIP that was found: both towers and the tokenizer, frozen, in float32."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wsss_pipeline.clip.openai_archive import is_torchscript, read_torchscript
from wsss_pipeline.clip.sources import MOST_PARAMETERS, ClipFiles
from wsss_pipeline.clip.tensor_files import read_tensor_files, shapes_in, tensors_in
from wsss_pipeline.clip.tensor_names import (
    OPENAI_FORM,
    configuration,
    own_shapes,
    plain_names,
    to_hugging_face,
)
from wsss_pipeline.data.transforms import CLIP_STATISTICS, PixelStatistics
from wsss_pipeline.errors import WeightsError, WsssError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

# type of model -> what the library's names of its parts begin with, and its tokenizer. A MetaCLIP 2 is a CLIP of many
# languages; the end of its text is token 2, which the library's CLIP takes for the word of an older configuration.
FAMILIES = {"clip": ("CLIP", "CLIPTokenizerFast"), "metaclip_2": ("MetaClip2", "PreTrainedTokenizerFast")}
OPENAI_SIZES = {(768, 512), (1024, 768)}  # widths of image and text tower: ViT-B and ViT-L


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP, frozen, in float32.

    Attributes:
        vision, text: the towers of ``transformers`` with their projections.
        tokenizer: tokenizer of the text tower.
        logit_scale: factor on the cosine, already exponentiated.
        files: origin of it all; None where it didn't come from files.
        own_statistics: mean and standard deviation of its pixels, None for OpenAI's. Where it has its own, they go
            before those that a method or a network was published with.
    """

    vision: Any
    text: Any
    tokenizer: Any
    logit_scale: float
    files: ClipFiles | None = None
    own_statistics: PixelStatistics | None = None

    @property
    def statistics(self) -> PixelStatistics:
        """Mean and standard deviation of its pixels."""
        return self.own_statistics or CLIP_STATISTICS


def load_clip(files: ClipFiles, device: torch.device) -> Clip:
    """Load both towers and the tokenizer.

    Weights come as safetensors, as a TorchScript archive, which is read as data, or as another pickle, which
    ``torch.load(weights_only=True)`` reads: no code in them runs.

    Raises:
        WeightsError: damaged, incomplete, not a vision transformer CLIP, or with another model's vocabulary.
    """
    import transformers as library
    from transformers.activations import ACT2FN

    transformers: Any = library  # which knows the tokenizer's name only at run time
    with loading(f"CLIP {files.name}"):
        stored: dict[str, Tensor] = {}
        if files.config is None and is_torchscript(files.weights[0]):
            stored = read_torchscript(files.weights[0])
            sizes = {name: tuple(value.shape) for name, value in stored.items()}
        else:
            sizes = read_tensor_files(files.weights, shapes_in)
        known, others = plain_names(sizes, files.name)
        if others:
            logger.warning(
                "%s: %d tensors are no part of a CLIP and are left out, such as %s",
                *(files.name, len(others), one_line(others[0], 100)),
            )
        if any(sizes[name] not in ((), (1,)) for name, plain in known.items() if plain == "logit_scale"):
            raise WeightsError(f"{files.name}: its logit_scale isn't one number; fetch it again")
        shapes = own_shapes(sizes, known, files.name)
        values = files.configuration
        if values is None:
            if sum(map(math.prod, shapes.values())) > MOST_PARAMETERS:
                raise WeightsError(
                    f"{files.name} has more than {MOST_PARAMETERS:,} parameters; no CLIP has so many"
                )
            values = configuration(shapes, files.form, files.name)
            if stored and files.form == OPENAI_FORM and _size(values) not in OPENAI_SIZES:
                logger.warning(
                    "%s is a TorchScript archive, but not of a size that OpenAI published: taken to have QuickGELU "
                    "and heads 64 wide; if that is wrong, state clip.activation, clip.head_width and "
                    "clip.text_head_width",
                    files.name,
                )
        family, tokenizer_class = FAMILIES[values.get("model_type", "clip")]
        config = getattr(transformers, f"{family}Config")(**values)
        vision_config, text_config = config.vision_config, config.text_config
        for tower in (vision_config, text_config):
            if tower.hidden_act not in ACT2FN:
                raise WeightsError(
                    f"{files.name}: {one_line(repr(tower.hidden_act), 40)} is no activation that transformers knows; "
                    "set hidden_act in its config.json right, or state clip.activation"
                )
        tokenizer = getattr(transformers, tokenizer_class).from_pretrained(
            files.tokenizer, local_files_only=True
        )
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
            (getattr(transformers, f"{family}VisionModelWithProjection"), vision_config),
            (getattr(transformers, f"{family}TextModelWithProjection"), text_config),
        ]
        # before any tensor is read: a file that takes no room on the disk may be larger than the memory
        names = [checked_names(*tower, shapes, files.name, "CLIP") for tower in towers]
        if unused := sorted(shapes.keys() - {*names[0], *names[1], "logit_scale"}):
            raise WeightsError(
                f"{files.name} has {len(unused)} tensors more than its configuration says, such as {unused[0]}; "
                "weights and configuration belong to different models"
            )
        stored = stored or read_tensor_files(files.weights, tensors_in)
        tensors = to_hugging_face({plain: stored[name] for name, plain in known.items()})
        vision, text = (frozen_model(*tower, own, tensors) for tower, own in zip(towers, names, strict=True))
        scale = float(tensors["logit_scale"].float().exp())
        return Clip(vision.to(device), text.to(device), tokenizer, scale, files, files.own_statistics)


def _size(values: Mapping[str, Any]) -> tuple[int, int]:
    return values["vision_config"]["hidden_size"], values["text_config"]["hidden_size"]


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
    from transformers.utils import logging as library_logging

    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.ERROR)
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (WsssError, MemoryError):
        raise
    except Exception as error:
        check_machine(error)
        reason = one_line(error, 200) or type(error).__name__
        raise WeightsError(f"{what} can't be loaded: {reason}") from error
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
