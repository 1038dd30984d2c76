"""Finding a CLIP: hub id, local Hugging Face folder, OpenAI's ``.pt`` file, or the package's own small one.

Nothing is loaded here.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import WeightsError
from wsss_pipeline.files import MIB, check_machine, check_plain, open_plain, read_json
from wsss_pipeline.runtime.output import one_line

MOST_CONFIG_BYTES = 16 * MIB
MOST_TOKENIZER_BYTES = 256 * MIB
MOST_WEIGHT_BYTES = 64 * 1024 * MIB
MOST_LAYERS, MOST_PARAMETERS = 1000, 10**10  # the largest CLIP has 48, and 2.5 billion
MOST_ARCHIVE_BYTES = 4 * 1024 * MIB  # of OpenAI's .pt files the largest has 1.3 GiB
# all of OpenAI's models share one vocabulary
OPENAI_TOKENIZER = "openai/clip-vit-base-patch16"
# their vision transformers, by OpenAI's own names for them
OPENAI_MODELS = {
    "vitb32": "openai/clip-vit-base-patch32",
    "vitb16": OPENAI_TOKENIZER,
    "vitl14": "openai/clip-vit-large-patch14",
    "vitl14336px": "openai/clip-vit-large-patch14-336",
}
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json")
# what the library also opens beside a vocabulary, where it is there
ALSO_READ = ("config.json", "tokenizer.model", "chat_template.jinja", "chat_template.json")
DEMO_CLIP = "demo"  # trained on the demo's drawn scenes, part of the package
# read without running anything in them; the others only with torch's weights_only
SAFE_WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors")
WEIGHT_FILES = (*SAFE_WEIGHT_FILES, "pytorch_model.bin", "pytorch_model-*-of-*.bin")
# what of a config.json changes the computation
ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"),
    *("image_size", "hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size", "eos_token_id"),
)
TOWERS = ("vision_config", "text_config")


@dataclass(frozen=True)
class ClipFiles:
    """A CLIP found on this machine, not loaded yet.

    Attributes:
        name: text that the user gave.
        weights: one or several files.
        config: config.json, or None for OpenAI's ``.pt``, whose tensors say it all.
        tokenizer: folder of the vocabulary.
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
        architecture = None
        if self.config is not None:
            values = read_config(self.config)
            architecture = {
                tower: {key: value for key, value in values.get(tower, {}).items() if key in ARCHITECTURE}
                for tower in TOWERS
            }
        vocabulary = [self.tokenizer / name for name in VOCABULARY_FILES]
        content = {
            "weights": [file_digest(path, MOST_WEIGHT_BYTES) for path in self.weights],
            "architecture": architecture,
            "vocabulary": {
                path.name: file_digest(path, MOST_TOKENIZER_BYTES) for path in vocabulary if path.is_file()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def locate_clip(config: ClipConfig, offline: bool = False) -> ClipFiles:
    """Find the files, fetching them from the hub where needed and allowed.

    Args:
        config: names weights and maybe a tokenizer.
        offline: choice to use only what is on this machine, the hub's own cache included.

    Raises:
        WeightsError: not found, not reachable, or not a CLIP.
    """
    weights = config.weights
    if weights == DEMO_CLIP:
        path = Path(str(resources.files("wsss_pipeline") / "demo" / "clip"))
    else:
        path = local_path(weights, "--clip")
    if path.is_file():
        if path.suffix in (".safetensors", ".bin"):
            raise WeightsError(
                f"CLIP weights {weights} are a file of a model; give its folder, {path.parent}"
            )
        check_file(path, MOST_ARCHIVE_BYTES)
        return ClipFiles(weights, (path,), None, _locate_tokenizer(config.tokenizer, path.parent, offline))
    if path.exists() and not path.is_dir():
        raise WeightsError(f"CLIP weights {weights} are neither a file nor a folder; give one of them")
    if not path.is_dir():
        if weights.endswith(".pt") or weights.count("/") > 1 or weights[:1] in (".", "/", "~"):
            raise WeightsError(
                f"CLIP weights {weights} don't exist; give a folder, an OpenAI .pt file or a hub id{_hint(weights)}"
            )
        path = fetch_model(weights, offline, TOKENIZER_FILES)
    if not (path / "config.json").exists():
        raise WeightsError(f"{weights}: no config.json in {path}; give a Hugging Face folder of a CLIP model")
    values = read_config(path / "config.json")
    kind = values.get("model_type", "clip")
    if kind != "clip" or not all(isinstance(values.get(tower), dict) for tower in TOWERS):
        raise WeightsError(f"{weights} is of type {kind}, not a whole CLIP with vision and text tower")
    files = weight_files(path)
    if not files:
        raise WeightsError(f"{weights}: no model.safetensors in {path}; fetch the weights as well")
    _check_sizes(files, values)
    tokenizer = _locate_tokenizer(config.tokenizer, path, offline)
    return ClipFiles(weights, files, path / "config.json", tokenizer)


def check_file(path: Path, at_most: int) -> None:
    """A WeightsError where a file isn't plain, or has more than ``at_most`` bytes."""
    try:
        check_plain(path, at_most)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    check_machine(error)
    return WeightsError(f"{one_line(path, 200)} can't be read: {getattr(error, 'strerror', None) or error}")


def _check_sizes(files: tuple[Path, ...], config: dict[str, Any]) -> None:
    """Refuses weights far larger than their configuration says, and one of no CLIP's size, before any are read."""
    parameters = 0
    for tower in TOWERS:
        sizes = {key: value for key, value in config[tower].items() if type(value) is int and value > 0}
        width, inner = sizes.get("hidden_size", 1024), sizes.get("intermediate_size", 4096)
        patches = (sizes.get("image_size", 336) // sizes.get("patch_size", 14)) ** 2
        rows = sizes.get("vocab_size", 50_000) + sizes.get("max_position_embeddings", 77) + patches
        if sizes.get("num_hidden_layers", 24) > MOST_LAYERS:
            raise WeightsError(f"{one_line(files[0].parent, 200)}: no CLIP has over {MOST_LAYERS} layers")
        parameters += sizes.get("num_hidden_layers", 24) * width * (4 * width + 2 * inner) + width * rows
    if parameters > MOST_PARAMETERS:
        raise WeightsError(
            f"{one_line(files[0].parent, 200)}: its configuration calls for {parameters:,} parameters; "
            "no CLIP has so many"
        )
    # as 64-bit numbers, twice over; what is small needs no check
    at_most = min(MOST_WEIGHT_BYTES, 16 * parameters + 256 * MIB)
    for path in files:
        check_file(path, at_most)


def local_path(text: str, option: str) -> Path:
    """``text`` as a path, that of nothing maybe; one that the system refuses even to look up is an error."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{option} {text[:100]} can't be looked up: {reason}") from error
    if not text.strip():
        raise WeightsError(f"{option} is empty; give a folder, a file or a hub id")
    return path


def _hint(text: str) -> str:
    """What was probably meant: a model by OpenAI's name, or what has nearly this name on the hub or here."""
    for name in (text, Path(text).name):
        plain = re.sub(r"[^a-z0-9]", "", name.lower().removesuffix(".pt"))
        if plain in OPENAI_MODELS:
            return f"; did you mean {OPENAI_MODELS[plain]}?"
    models = OPENAI_MODELS.values()
    close = [] if text in models else difflib.get_close_matches(text, models, n=1, cutoff=0.8)
    if not close:
        beside = Path(text).expanduser().parent
        with contextlib.suppress(OSError):
            names = [path.name for path in beside.iterdir()]
            close = [str(beside / name) for name in difflib.get_close_matches(Path(text).name, names, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Files of a model's weights, whole or in parts, maybe none.

    A repository may hold the same weights in several forms, of which one is enough.
    """
    forms = (tuple(sorted(folder.glob(pattern))) for pattern in WEIGHT_FILES)
    return next(filter(None, forms), ())


def _locate_tokenizer(tokenizer: str | None, beside: Path, offline: bool) -> Path:
    if tokenizer is None and _has_vocabulary(beside):
        return _checked(beside)
    wanted = tokenizer or OPENAI_TOKENIZER
    path = local_path(wanted, "--tokenizer")
    if _has_vocabulary(path):
        return _checked(path)
    if tokenizer is not None and path.exists():
        raise WeightsError(f"--tokenizer {wanted} has neither tokenizer.json nor vocab.json with merges.txt")
    try:
        return _checked(fetch_files(wanted, offline, TOKENIZER_FILES))
    except WeightsError as error:
        raise WeightsError(
            f"no vocabulary (tokenizer.json, or vocab.json with merges.txt) beside the weights in {beside} "
            f"nor at {wanted}: {error}; give a folder with --tokenizer"
        ) from error


def _has_vocabulary(folder: Path) -> bool:
    pair = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    return pair or (folder / "tokenizer.json").exists()


def _checked(tokenizer: Path) -> Path:
    """The folder of a vocabulary, which a library is going to read."""
    names = [*TOKENIZER_FILES, *ALSO_READ]
    for path in [*map(tokenizer.joinpath, names), *tokenizer.glob("additional_chat_templates/*")]:
        if path.exists():
            check_file(path, MOST_TOKENIZER_BYTES)
    return tokenizer


def fetch_model(hub_id: str, offline: bool, beside: tuple[str, ...] = ()) -> Path:
    """The folder, in the hub's own cache, of a model's config.json, its weights and the files ``beside``.

    Raises:
        WeightsError: it isn't in the cache and can't be fetched, or isn't to be.
    """
    wanted = ("config.json", *beside)
    path = fetch_files(hub_id, offline, (*wanted, *SAFE_WEIGHT_FILES))
    # older repositories have no other weights
    return path if weight_files(path) else fetch_files(hub_id, offline, (*wanted, *WEIGHT_FILES))


def fetch_files(hub_id: str, offline: bool, patterns: tuple[str, ...]) -> Path:
    """The folder of a snapshot in the hub's own cache, its files of these patterns fetched where that is allowed.

    Raises:
        WeightsError: it isn't in the cache and can't be fetched, or isn't to be.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    problem = f"'{hub_id}' is no folder or file here and"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        how = "once without --offline" if offline else "where the hub can be reached"
        raise WeightsError(
            f"{problem} isn't in the hub's cache; fetch it {how}: `hf download {hub_id}`{_hint(hub_id)}"
        ) from error
    # the hub's client raises its own errors, those of its HTTP library, OSError and ValueError
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{problem} can't be fetched from the hub: {reason}{_hint(hub_id)}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json; a WeightsError where it can't be read, or holds something else."""
    try:
        values = read_json(path, MOST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no configuration; fetch it again")
    return values


def file_digest(path: Path, at_most: int) -> str:
    """SHA-256 (hexadecimal) of a plain file of at most so many bytes; a WeightsError where it can't be read."""
    try:
        with open_plain(path, at_most) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
