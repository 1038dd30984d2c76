"""Configuration: typed, frozen, with every default in one place.

YAML in, resolved YAML out. The layers, later ones winning:

    defaults  <  preset  <  --config FILE  <  --set key=value  <  command-line flags

An unknown key, a wrong type or a value out of range is a ConfigError that names the key and the layer
it came from.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wsss_pipeline.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
CrfBackend = Literal["auto", "pydensecrf", "lattice", "none"]
CrfImage = Literal["bgr", "reference"]


@dataclass(frozen=True)
class ClipConfig:
    """The frozen CLIP. ``weights``: hub id, Hugging Face folder, or OpenAI ``.pt`` file.

    ``tokenizer`` (hub id or folder) is only needed where the weights don't bring their own.
    """

    weights: str = "openai/clip-vit-base-patch16"
    tokenizer: str | None = None
    precision: Precision = "auto"


@dataclass(frozen=True)
class CamConfig:
    """Softmax-GradCAM and class-aware attention affinity (CLIP-ES, arXiv 2212.09506, section 3)."""

    affinity: bool = True
    affinity_layers: int = 8
    affinity_iterations: int = 2  # t in the paper; 1 where an object is only a few patches wide
    sinkhorn_rounds: int = 3
    threshold: float = 0.4  # of the box mask, in CAM units; the published code has 0.7 for COCO


@dataclass(frozen=True)
class CrfConfig:
    """Dense CRF (Kraehenbuehl and Koltun, NIPS 2011) with the parameters of CLIP-ES.

    ``image``: what the bilateral kernel sees; ``bgr`` the plain picture, ``reference`` as the
    published script makes it (mean subtracted, then wrapped modulo 256).
    """

    backend: CrfBackend = "auto"
    image: CrfImage = "bgr"
    iterations: int = 10
    gaussian_sxy: float = 1.0
    gaussian_weight: float = 3.0
    bilateral_sxy: float = 67.0
    bilateral_srgb: float = 3.0
    bilateral_weight: float = 4.0


@dataclass(frozen=True)
class MaskConfig:
    """Everything about stage one that a user can choose and that changes the masks.

    ``classes``: built-in class set, YAML file, or comma-separated names.
    ``templates``: prompt templates with one ``{}``; empty means those of the class set.
    ``max_pixels``: larger images are scaled down to this area for CLIP and the CRF.
    """

    classes: str = ""
    templates: tuple[str, ...] = ()
    clip: ClipConfig = field(default_factory=ClipConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    crf: CrfConfig = field(default_factory=CrfConfig)
    max_pixels: int = 1_048_576


# Smallest and largest value that makes sense, by dotted key; both ends are allowed.
RANGES: dict[str, tuple[float, float]] = {
    "cam.affinity_layers": (1, 1000),
    "cam.affinity_iterations": (1, 100),
    "cam.sinkhorn_rounds": (0, 1000),
    "cam.threshold": (0.0, 1.0),
    "crf.iterations": (0, 1000),
    "crf.gaussian_sxy": (0.01, 10_000),
    "crf.gaussian_weight": (0, 10_000),
    "crf.bilateral_sxy": (0.01, 10_000),
    "crf.bilateral_srgb": (0.01, 10_000),
    "crf.bilateral_weight": (0, 10_000),
    "max_pixels": (4_096, 1_000_000_000),
}


def preset_names() -> list[str]:
    """Names of the presets that come with the package, such as ``clip-es/voc12``."""
    return packaged_names("presets")


def packaged_names(folder: str) -> list[str]:
    """``family/name`` of each YAML file in a folder of the package."""
    root = resources.files("wsss_pipeline") / folder
    return sorted(
        f"{family.name}/{file.name.removesuffix('.yaml')}"
        for family in root.iterdir()
        if family.is_dir()
        for file in family.iterdir()
        if file.name.endswith(".yaml")
    )


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> MaskConfig:
    """The resolved configuration from all its layers.

    Args:
        preset: a name out of ``preset_names()``. Without one, a built-in class set brings the preset of
            its name, since the published numbers belong to the data set.
        file: YAML file of the user's.
        overrides: ``key=value`` texts, the key dotted (``cam.threshold=0.4``), the value YAML.
        flags: dotted key to value, as typed on the command line; None values are passed over.

    Raises:
        ConfigError: unknown preset or key, unreadable file, wrong type, value out of range.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        layers.append((str(file), file_values(file)))
    layers += [(f"--set {text}", override_values(text)) for text in overrides]
    layers += [(f"'{key}'", nested(key, value)) for key, value in (flags or {}).items() if value is not None]
    config = _lay(MaskConfig(), layers)
    if preset is None and f"clip-es/{config.classes}" in preset_names():
        preset = f"clip-es/{config.classes}"
    if preset is not None:
        config = _lay(MaskConfig(), [(f"preset {preset}", packaged_values("preset", preset)), *layers])
    _check_ranges(config)
    return config


def to_yaml(config: MaskConfig) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal one."""
    import yaml

    values = asdict(config)
    values["templates"] = list(config.templates)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def merge(config: Any, values: Mapping[str, Any], origin: str, prefix: str = "") -> Any:
    """``config`` with ``values`` laid over it, field by field, types checked.

    Raises:
        ConfigError: unknown key or wrong type; the message names the key and ``origin``.
    """
    hints = get_type_hints(type(config))
    names = [f.name for f in fields(config)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known here: {', '.join(names)}"
            raise ConfigError(f"{origin}: unknown key '{prefix}{key}'; {hint}")
        current = getattr(config, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: '{prefix}{key}' holds several keys; write '{prefix}{key}.NAME'")
            changes[key] = merge(current, value, origin, f"{prefix}{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{prefix}{key}", origin)
    return replace(config, **changes)


def _lay(config: MaskConfig, layers: Iterable[tuple[str, Mapping[str, Any]]]) -> MaskConfig:
    for origin, values in layers:
        config = merge(config, values, origin)
    return config


def _typed(value: Any, hint: Any, key: str, origin: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (h for h in get_args(hint) if h is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{origin}: '{key}' is {value!r}; choose one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{origin}: '{key}' takes a list of texts, not {value!r}")
        return tuple(items)
    # bool is an int to Python, and an int is as good as a float to a user
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{origin}: '{key}' takes a value of type {hint.__name__}, not {value!r}")
    return value


def _check_ranges(config: MaskConfig) -> None:
    for key, (low, high) in RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if not low <= value <= high:
            raise ConfigError(f"'{key}' is {value:g}; it must lie between {low:g} and {high:g}")


def packaged_values(kind: str, name: str) -> Mapping[str, Any]:
    """Content of a YAML file of the package; ``kind`` is ``preset`` or ``recipe``.

    Raises:
        ConfigError: there is none of that name.
    """
    known = packaged_names(f"{kind}s")
    if name not in known:
        raise ConfigError(f"unknown {kind} '{name}'; known: {', '.join(known)}")
    text = (resources.files("wsss_pipeline") / f"{kind}s" / f"{name}.yaml").read_text("utf-8")
    return yaml_mapping(text, f"{kind} {name}")


def file_values(file: Path) -> Mapping[str, Any]:
    """The top-level mapping of a YAML file; a ConfigError where it can't be read or isn't one."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} can't be read: {error}") from error
    return yaml_mapping(text, str(file))


def override_values(text: str) -> Mapping[str, Any]:
    """``a.b=value`` as a nested mapping; a ConfigError where it isn't of that form."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: write it as key=value, for example cam.threshold=0.4")
    return nested(key.strip(), _yaml(value, f"--set {text}"))


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the key ``a.b``."""
    *outer, last = key.split(".")
    nested: dict[str, Any] = {last: value}
    for part in reversed(outer):
        nested = {part: nested}
    return nested


def yaml_mapping(text: str, origin: str) -> Mapping[str, Any]:
    """YAML text as a mapping, empty where it is; ``origin`` names it in the ConfigError."""
    values = _yaml(text, origin)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def _yaml(text: str, origin: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: not valid YAML: {reason}") from error
