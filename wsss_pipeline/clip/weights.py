"""Finding and loading a CLIP: hub id, local Hugging Face folder, or OpenAI's ``.pt`` file."""

from __future__ import annotations

import hashlib
import json
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
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import WeightsError

# all of OpenAI's models share one vocabulary
OPENAI_TOKENIZER = "openai/clip-vit-base-patch16"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# what of a config.json changes the computation
ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "hidden_act",
    "layer_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "eos_token_id",
)


@dataclass(frozen=True)
class ClipFiles:
    """A CLIP found on this machine, not loaded yet.

    ``weights``: one or several files; ``config``: config.json, or None for OpenAI's ``.pt``, whose tensors
    say it all; ``tokenizer``: folder.
    """

    name: str
    weights: tuple[Path, ...]
    config: Path | None
    tokenizer: Path

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all that determines features and text rows: weights, architecture, vocabulary.

        Raises:
            WeightsError: a file can't be read.
        """
        architecture = _architecture(_read_config(self.config)) if self.config else None
        content = {
            "weights": [_file_digest(path) for path in self.weights],
            "architecture": architecture,
            "vocabulary": {
                name: _file_digest(self.tokenizer / name)
                for name in VOCABULARY_FILES
                if (self.tokenizer / name).is_file()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def locate_clip(config: ClipConfig, offline: bool = False) -> ClipFiles:
    """Find the files, fetching them from the hub where needed and allowed.

    Args:
        config: names weights and maybe a tokenizer.
        offline: use only what is on this machine, the hub's own cache included.

    Raises:
        WeightsError: not found, not reachable, or not a CLIP.
    """
    path = Path(config.weights).expanduser()
    if path.is_file():
        return ClipFiles(
            config.weights, (path,), None, _locate_tokenizer(config.tokenizer, path.parent, offline)
        )
    if path.is_dir():
        return _in_folder(config.weights, path, config.tokenizer, offline)
    if (
        config.weights.endswith(".pt")
        or config.weights.count("/") > 1
        or config.weights[:1] in (".", "/", "~")
    ):
        raise WeightsError(
            f"CLIP weights {config.weights} don't exist; give a folder, an OpenAI .pt file or a hub id"
        )
    return _in_folder(config.weights, _fetch(config.weights, offline), config.tokenizer, offline)


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
            values, tensors = _read_config(files.config), _read_tensors(files.weights)
        config: Any = CLIPConfig(**values)
        vision = _fill(CLIPVisionModelWithProjection(config.vision_config), tensors, files.name).to(device)
        text = _fill(CLIPTextModelWithProjection(config.text_config), tensors, files.name).to(device)
        tokenizer = _load_tokenizer(files.tokenizer)
        scale = tensors.get("logit_scale")
        if scale is None:
            raise WeightsError(f"{files.name} has no logit_scale; it isn't a whole CLIP model")
    return Clip(vision, text, tokenizer, float(scale.float().exp()))


def _in_folder(name: str, folder: Path, tokenizer: str | None, offline: bool) -> ClipFiles:
    config = folder / "config.json"
    if not config.is_file():
        raise WeightsError(f"{name}: no config.json in {folder}; give a Hugging Face folder of a CLIP model")
    values = _read_config(config)
    if "vision_config" not in values or "text_config" not in values:
        kind = values.get("model_type", "unknown kind")
        raise WeightsError(f"{name} is a model of type {kind}, not a whole CLIP with vision and text tower")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise WeightsError(f"{name}: no *.safetensors in {folder}; fetch the weights as well")
    return ClipFiles(name, tuple(weights), config, _locate_tokenizer(tokenizer, folder, offline))


def _locate_tokenizer(tokenizer: str | None, beside: Path, offline: bool) -> Path:
    if tokenizer is None and _has_vocabulary(beside):
        return beside
    wanted = tokenizer or OPENAI_TOKENIZER
    if _has_vocabulary(Path(wanted).expanduser()):
        return Path(wanted).expanduser()
    if tokenizer is not None and Path(wanted).expanduser().exists():
        raise WeightsError(
            f"--tokenizer {wanted} holds neither tokenizer.json nor vocab.json with merges.txt"
        )
    try:
        return _fetch(wanted, offline, patterns=TOKENIZER_FILES)
    except WeightsError as error:
        raise WeightsError(
            f"no vocabulary: neither beside the weights in {beside} (tokenizer.json, or vocab.json with merges.txt) "
            f"nor at {wanted}: {error}; give a folder with --tokenizer"
        ) from error


def _has_vocabulary(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def _fetch(hub_id: str, offline: bool, patterns: tuple[str, ...] = ()) -> Path:
    """The folder of a snapshot in the hub's own cache, fetched where that is allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = list(patterns or ("config.json", "*.safetensors", *TOKENIZER_FILES))
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        how = "once without --offline" if offline else "where the hub can be reached"
        raise WeightsError(
            f"'{hub_id}' is no folder or file here and isn't in the hub's cache; "
            f"fetch it {how}: `hf download {hub_id}`"
        ) from error
    # the hub's client raises its own errors, those of its HTTP library, OSError and ValueError
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"'{hub_id}' is no folder or file here and can't be fetched from the hub: {reason}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no configuration; fetch it again")
    return values


def _architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    towers = {name: values.get(name) for name in ("vision_config", "text_config")}
    return {
        name: {key: tower[key] for key in ARCHITECTURE if key in tower} if isinstance(tower, dict) else {}
        for name, tower in towers.items()
    }


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from error


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
