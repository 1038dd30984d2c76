"""Finding a CLIP: hub id or folder of Hugging Face or OpenCLIP, a file of weights, or the package's own small one.

Nothing is loaded here, but all is found out that determines what it computes: files, activation, width of the heads,
pixel statistics.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from wsss_pipeline.clip.open_clip_config import check_sizes, open_clip_form
from wsss_pipeline.clip.openai_archive import is_torchscript
from wsss_pipeline.clip.tensor_files import MOST_WEIGHT_BYTES, read_tensor_files, shapes_in
from wsss_pipeline.clip.tensor_names import MEND, OPENAI_FORM, Form, configuration, own_shapes, plain_names
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.transforms import CLIP_STATISTICS, PixelStatistics
from wsss_pipeline.errors import WeightsError
from wsss_pipeline.files import MIB, check_machine, check_plain, open_plain, read_json
from wsss_pipeline.runtime.output import one_line

logger = logging.getLogger(__name__)

MOST_CONFIG_BYTES = 16 * MIB
MOST_TOKENIZER_BYTES = 256 * MIB
MOST_LAYERS, MOST_PARAMETERS = 1000, 10**10  # the largest CLIP has 48, and 2.5 billion
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
CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CONFIGS = (CONFIG, OPEN_CLIP_CONFIG, *PROCESSORS)
# what of a config.json changes the computation
ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"),
    *("image_size", "hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size", "eos_token_id"),
)
TYPES = ("clip", "metaclip_2")  # of models, by their config.json
TOWERS = ("vision_config", "text_config")
# of transformers, where a configuration leaves them out: width and number of heads
DEFAULTS = {"vision_config": (768, 12), "text_config": (512, 8)}
# what comes of models that people take for a CLIP; others are named by their type
OTHER_TYPES = {
    "siglip": "a SigLIP has no class token",
    "siglip2": "a SigLIP has no class token",
    "clip_vision_model": "it is an image tower without its text tower",
    "clip_vision_model_with_projection": "it is an image tower without its text tower",
}


@dataclass(frozen=True)
class ClipFiles:
    """A CLIP found on this machine, not loaded yet.

    Attributes:
        name: text that the user gave.
        weights: one or several files.
        config: Hugging Face's config.json, or None where the tensors' shapes and ``form`` say it all.
        tokenizer: folder of the vocabulary.
        form: activation and width of the heads.
        form_origin: where that stands.
        own_statistics: mean and standard deviation of its pixels; None for OpenAI's.
        statistics_origin: where these stand.
    """

    name: str
    weights: tuple[Path, ...]
    config: Path | None
    tokenizer: Path
    form: Form = OPENAI_FORM
    form_origin: str = ""
    own_statistics: PixelStatistics | None = None
    statistics_origin: str = ""

    @property
    def configuration(self) -> dict[str, Any] | None:
        """Values of config.json with ``form`` in them, None without such a file.

        Raises:
            WeightsError: it can't be read.
        """
        if self.config is None:
            return None
        values = read_config(self.config)
        said = _form(values, self.config)
        for place, tower in enumerate(TOWERS):
            for part in (values[tower], values.get(f"{tower}_dict")):
                if part is None:
                    continue
                if said.activations[place] != self.form.activations[place]:
                    part["hidden_act"] = self.form.activations[place]
                if said.head_widths[place] != self.form.head_widths[place]:
                    width = part.get("hidden_size", DEFAULTS[tower][0])
                    part["num_attention_heads"] = max(1, width // self.form.head_widths[place])
        return values

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of what determines features and text rows but the pixels' statistics.

        That is weights, architecture, vocabulary; of a CLIP without config.json the form where it isn't OpenAI's.

        Raises:
            WeightsError: a file can't be read.
        """
        architecture: dict[str, Any] | None = None
        values = self.configuration
        if values is not None:
            architecture = {
                tower: {key: value for key, value in values.get(tower, {}).items() if key in ARCHITECTURE}
                for tower in TOWERS
            }
            if values.get("model_type", "clip") != "clip":
                architecture["model_type"] = values["model_type"]
        elif self.form != OPENAI_FORM:
            architecture = self.form._asdict()
        vocabulary = [self.tokenizer / name for name in VOCABULARY_FILES]
        content = {
            "weights": [file_digest(path, MOST_WEIGHT_BYTES) for path in self.weights],
            "architecture": architecture,
            "vocabulary": {
                path.name: file_digest(path, MOST_TOKENIZER_BYTES) for path in vocabulary if path.is_file()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def determinants(self) -> dict[str, Any]:
        """The part of a fingerprint that is CLIP's; WeightsError where a file can't be read."""
        if self.own_statistics is None:
            return {"clip": self.digest()}
        return {"clip": self.digest(), "pixels": [list(row) for row in self.own_statistics]}


def locate_clip(config: ClipConfig, offline: bool = False) -> ClipFiles:
    """Find the files, fetching them from the hub where needed and allowed.

    Args:
        config: names weights and maybe a tokenizer; what it states of the form goes before what files say.
        offline: choice to use only what is on this machine, the hub's own cache included.

    Raises:
        WeightsError: not found, not reachable, not a CLIP, or one of which files don't say what it computes.
    """
    weights = config.weights
    if weights == DEMO_CLIP:
        path = Path(str(resources.files("wsss_pipeline") / "demo" / "clip"))
    else:
        path = local_path(weights, "--clip")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WeightsError(f"CLIP weights {weights} are neither a file nor a folder; give one of them")
    if not path.exists():
        is_path = weights.endswith((".pt", ".safetensors")) or weights.count("/") > 1
        if is_path or weights[:1] in (".", "/", "~"):
            raise WeightsError(
                f"CLIP weights {weights} don't exist; give a folder, a file of weights or a hub id{_hint(weights)}"
            )
        path = _fetch_clip(weights, offline)
    folder = path if path.is_dir() else path.parent
    values, open_clip = _clip_config(folder), _open_clip_config(folder)
    if path.is_dir():
        files, is_converted = _weights_of(path, weights, values is not None, open_clip is not None)
    elif re.search(r"-\d+-of-\d+\.", path.name):
        raise WeightsError(f"CLIP weights {weights} are one part of a model; give its folder, {folder}")
    else:
        check_file(path, MOST_WEIGHT_BYTES)
        files, is_converted = (path,), values is not None
    statistics, statistics_origin = None, "OpenAI, as its form"
    if path.is_file() and is_torchscript(path):
        is_converted = False
        form, origin = _stated(config, OPENAI_FORM, "OpenAI, for a TorchScript archive")
    else:
        if values is not None and is_converted:
            _check_sizes(files, values)
            form, origin = _converted_form(config, values, folder / CONFIG, open_clip)
        else:
            form, origin = _form_of_tensors(config, files, open_clip)
        statistics, statistics_origin = _pixel_statistics(folder, open_clip)
    return ClipFiles(
        weights,
        files,
        folder / CONFIG if is_converted else None,
        _locate_tokenizer(config.tokenizer, folder, offline),
        form,
        origin,
        statistics,
        statistics_origin,
    )


def _converted_form(
    config: ClipConfig, values: Mapping[str, Any], file: Path, open_clip: Mapping[str, Any] | None
) -> tuple[Form, str]:
    """The form of a model with a config.json, and where it stands."""
    form = _form(values, file)
    if open_clip is not None and config.activation is None:
        said = open_clip_form(open_clip, config.weights)
        if said.activations != form.activations:
            raise WeightsError(
                f"{config.weights}: {CONFIG} says {form.activations[0]}, {OPEN_CLIP_CONFIG} {said.activations[0]}; "
                "state the right one (clip.activation), or remove the wrong file"
            )
    return _stated(config, form, CONFIG)


def _form_of_tensors(
    config: ClipConfig, files: tuple[Path, ...], open_clip: Mapping[str, Any] | None
) -> tuple[Form, str]:
    """The form of a model without config.json, and where it stands."""
    weights, shapes = config.weights, read_tensor_files(files, shapes_in)
    names, _ = plain_names(shapes, weights)
    if open_clip is None:
        if any(name.removesuffix(plain).endswith("text.") for name, plain in names.items()):
            raise WeightsError(
                f"{weights} has its text tower under 'text.', as OpenCLIP's models of other kinds; put its "
                f"{OPEN_CLIP_CONFIG} beside it"
            )
        return _stated(config, None, "")
    form, origin = _stated(config, open_clip_form(open_clip, weights), OPEN_CLIP_CONFIG)
    told = configuration(own_shapes(shapes, names, weights), form, weights)
    check_sizes(open_clip, told, weights)
    return form, origin


def _clip_config(folder: Path) -> dict[str, Any] | None:
    """Values of a config.json of a whole CLIP; None where there is none, or one of something else."""
    if not (folder / CONFIG).exists():
        return None
    values = read_config(folder / CONFIG)
    is_whole = all(isinstance(values.get(tower), dict) for tower in TOWERS)
    return values if is_whole and values.get("model_type", "clip") in TYPES else None


def _open_clip_config(folder: Path) -> dict[str, Any] | None:
    return read_config(folder / OPEN_CLIP_CONFIG) if (folder / OPEN_CLIP_CONFIG).exists() else None


def _weights_of(
    folder: Path, name: str, is_clip: bool, has_open_clip_config: bool
) -> tuple[tuple[Path, ...], bool]:
    """Files of a folder's weights, and whether they are those of its config.json."""
    files = weight_files(folder) if is_clip else ()
    if files:
        return files, True
    for path in map(folder.joinpath, OPEN_CLIP_WEIGHTS):
        if has_open_clip_config and path.exists():
            check_file(path, MOST_WEIGHT_BYTES)
            return (path,), False
    if has_open_clip_config and not is_clip:
        raise WeightsError(f"{name}: no {OPEN_CLIP_WEIGHTS[0]} in {folder}; fetch the weights as well")
    if is_clip:
        raise WeightsError(f"{name}: no model.safetensors in {folder}; fetch the weights as well")
    if (folder / "adapter_config.json").exists():
        raise WeightsError(f"{name} is a LoRA adapter; merge it into its CLIP, and give the merged one")
    if not (folder / CONFIG).exists():
        raise WeightsError(
            f"{name}: no {CONFIG} in {folder}; give a Hugging Face folder of a CLIP model, one of OpenCLIP with "
            f"{OPEN_CLIP_CONFIG}, or a file of weights"
        )
    kind = one_line(read_config(folder / CONFIG).get("model_type", "clip"), 40)
    reason = f": {OTHER_TYPES[kind]}" if kind in OTHER_TYPES else ""
    raise WeightsError(
        f"{name} is of type {kind}, not a whole CLIP with vision and text tower{reason}; {MEND}"
    )


def _form(values: Mapping[str, Any], origin: Path) -> Form:
    """Activation and width of the heads as ``CLIPConfig`` makes them of a config.json."""
    activations, widths = [], []
    for tower in TOWERS:
        # the older of its two places goes before the other
        older = values.get(f"{tower}_dict")
        part = values[tower] if older is None else older
        if not isinstance(part, dict):
            raise WeightsError(
                f"{one_line(origin, 200)}: {tower}_dict holds no configuration; fetch it again"
            )
        width, heads = (
            part.get(name, default)
            for name, default in zip(("hidden_size", "num_attention_heads"), DEFAULTS[tower], strict=True)
        )
        activation = part.get("hidden_act", "quick_gelu")
        if type(width) is not int or type(heads) is not int or not 0 < heads <= width or width % heads:
            told = f"{one_line(heads, 40)} heads for a width of {one_line(width, 40)}"
            raise WeightsError(f"{one_line(origin, 200)}: {tower} has {told}; fetch it again")
        if not isinstance(activation, str):
            raise WeightsError(f"{one_line(origin, 200)}: {tower}.hidden_act is no name; fetch it again")
        activations.append(activation)
        widths.append(width // heads)
    return Form((activations[0], activations[1]), (widths[0], widths[1]))


def _stated(config: ClipConfig, form: Form | None, origin: str) -> tuple[Form, str]:
    """The form that settings state, and files where these don't; a WeightsError where neither do."""
    stated = {
        "clip.activation": config.activation,
        "clip.head_width": config.head_width,
        "clip.text_head_width": config.text_head_width,
    }
    given = [key for key, value in stated.items() if value is not None]
    if form is None:
        if missing := [key for key, value in stated.items() if value is None]:
            raise WeightsError(
                f"{config.weights} holds tensors alone, which don't tell what the model computes: put its {CONFIG} "
                f"or {OPEN_CLIP_CONFIG} beside it, or state {', '.join(missing)} (OpenAI's: quick_gelu, 64, 64)"
            )
        form = OPENAI_FORM
    activation, head_width, text_head_width = config.activation, config.head_width, config.text_head_width
    return Form(
        form.activations if activation is None else (activation, activation),
        (head_width or form.head_widths[0], text_head_width or form.head_widths[1]),
    ), ", ".join(filter(None, [" and ".join(given), origin]))


def _pixel_statistics(
    folder: Path, open_clip: Mapping[str, Any] | None
) -> tuple[PixelStatistics | None, str]:
    """A CLIP's own mean and standard deviation of pixels, None for OpenAI's; and where they stand."""
    found: dict[str, PixelStatistics] = {}
    said = (open_clip or {}).get("preprocess_cfg")
    if isinstance(said, dict) and "mean" in said:
        values = {"image_mean": said["mean"], "image_std": said.get("std")}
        found[OPEN_CLIP_CONFIG] = pixel_statistics(values, one_line(folder / OPEN_CLIP_CONFIG, 200))
    for path in map(folder.joinpath, PROCESSORS):
        if path.exists():
            values = read_config(path)
            values = values.get("image_processor", values)
            if isinstance(values, dict) and ("image_mean" in values or values.get("do_normalize") is False):
                found.setdefault(path.name, pixel_statistics(values, one_line(path, 200)))
    if not found:
        return None, "OpenAI, since no file says otherwise"
    origin, statistics = next(iter(found.items()))
    for other, its in found.items():
        if not _are_alike(statistics, its):
            logger.warning(
                "%s: %s and %s have other pixel statistics; taken: %s of %s",
                *(one_line(folder, 200), origin, other, statistics.mean, origin),
            )
    return None if _are_alike(statistics, CLIP_STATISTICS) else statistics, origin


def _are_alike(one: PixelStatistics, other: PixelStatistics) -> bool:
    return all(
        math.isclose(value, its, abs_tol=1e-6)
        for row, its_row in zip(one, other, strict=True)
        for value, its in zip(row, its_row, strict=True)
    )


def pixel_statistics(processor: Mapping[str, Any], origin: str) -> PixelStatistics:
    """Statistics for values in [0, 1] from a preprocessor's, which come after its own scale.

    Args:
        processor: values of a preprocessor_config.json.
        origin: file, for the message.

    Raises:
        WeightsError: it has no mean and standard deviation of three channels, or of values beyond [0, 1].
    """
    scale: Any = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", mean is not None):
        mean, std = [0.0] * 3, [1.0] * 3
    rows = [row if isinstance(row, list) else [row] * 3 for row in (mean, std)]
    numbers = [*rows[0], *rows[1], scale]
    is_plain = len(numbers) == 7 and all(type(number) in (int, float) for number in numbers)
    if not is_plain or not all(map(math.isfinite, numbers)) or min(*rows[1], scale) <= 0:
        raise WeightsError(f"{origin} has no mean and standard deviation of three channels")
    first, second = (tuple(number / (255 * scale) for number in row) for row in rows)
    if min(first) < 0 or max(*first, *second) > 1.01:
        raise WeightsError(
            f"{origin}: mean {mean} and standard deviation {std} aren't of values from 0 to 1; divide them by 255"
        )
    return PixelStatistics((first[0], first[1], first[2]), (second[0], second[1], second[2]))


def _fetch_clip(hub_id: str, offline: bool) -> Path:
    """The folder of a CLIP in the hub's own cache, its weights as safetensors where it has them."""
    beside = (*CONFIGS, *TOKENIZER_FILES)
    # first what says whose weights to fetch: a repository may hold an image tower's beside the whole model's
    folder = fetch_files(hub_id, offline, beside)
    if _clip_config(folder) is not None:
        folder = fetch_model(hub_id, offline, beside)
        if weight_files(folder):
            return folder
    if _open_clip_config(folder) is not None:
        for name in OPEN_CLIP_WEIGHTS:
            folder = fetch_files(hub_id, offline, (*beside, name))
            if (folder / name).exists():
                break
    return folder


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

    Raises:
        WeightsError: some of the parts are missing.
    """
    forms = (tuple(sorted(folder.glob(pattern))) for pattern in WEIGHT_FILES)
    files = next(filter(None, forms), ())
    parts = re.search(r"-of-(\d{1,6})\.", files[0].name) if files else None
    if parts and len(files) < int(parts[1]):
        raise WeightsError(
            f"{one_line(folder, 200)}: {len(files)} of the {int(parts[1])} parts of the weights are there, such as "
            f"{files[0].name}; fetch the others as well"
        )
    return files


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
    wanted = (CONFIG, *beside)
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
