"""What a training run is: network, loss, data, schedule. Typed, frozen, defaults in one place.

The layers, later ones winning: defaults < recipe < --config FILE < --set key=value < command-line flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsss_pipeline.config import (
    file_values,
    merge,
    nested,
    override_values,
    packaged_names,
    packaged_values,
)
from wsss_pipeline.errors import ConfigError


@dataclass(frozen=True)
class NetworkConfig:
    """A segmentation network.

    ``name``: ``deeplabv2``, ``segformer``, or a decoder of segmentation-models-pytorch such as
    ``deeplabv3plus`` or ``unet``. ``encoder``: for ``deeplabv2`` a ResNet of timm; for ``segformer`` ``tiny``,
    ``mit-b0`` to ``mit-b5``, a hub id or a folder; else an encoder of segmentation-models-pytorch.
    ``weights``: what training starts from: ``imagenet``, ``coco``, ``none``, or a file or folder.
    """

    name: str = "deeplabv3plus"
    encoder: str = "resnet50"
    weights: str = "imagenet"


@dataclass(frozen=True)
class LossConfig:
    """Confidence-guided cross entropy (CLIP-ES, arXiv 2212.09506, section 3.5).

    ``confidence``: ``hard`` leaves out pixels under ``min_confidence``, as published; ``soft`` weights the others
    by their confidence. ``balanced``: background and foreground count half each, without which DeepLabV2 from
    ImageNet weights may diverge.
    """

    confidence: Literal["hard", "soft"] = "hard"
    min_confidence: float = 0.95
    balanced: bool = False


@dataclass(frozen=True)
class AugmentationConfig:
    """``crop``: side of the square training picture. ``scale_min``, ``scale_max``: of the random scaling."""

    crop: int = 320
    scale_min: float = 0.5
    scale_max: float = 1.5
    flip: bool = True
    photometric: bool = True


@dataclass(frozen=True)
class OptimisationConfig:
    """``lr``: of the encoder at its peak; the decoder has ``head_lr_factor`` times as much.

    ``batch``: pictures per process and micro-step; ``accumulate`` of them make an update. ``iterations``:
    updates. ``schedule``: ``poly`` with ``power``, or ``cosine``; both after ``warm_up`` updates.
    ``clip_norm``, ``ema`` (decay of the averaged weights): 0 is off.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    head_lr_factor: float = 10.0
    schedule: Literal["poly", "cosine"] = "poly"
    power: float = 0.9
    warm_up: int = 0
    iterations: int = 20_000
    batch: int = 10
    accumulate: int = 1
    clip_norm: float = 0.0
    ema: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """A training run. ``version``: of the recipe. ``validate_every``, ``save_every``: in updates."""

    version: int = 1
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    validate_every: int = 1000
    save_every: int = 500


RANGES: dict[str, tuple[float, float]] = {
    "loss.min_confidence": (0.0, 1.0),
    "augmentation.crop": (16, 4096),
    "augmentation.scale_min": (0.05, 20.0),
    "augmentation.scale_max": (0.05, 20.0),
    "optimisation.lr": (0.0, 1000.0),
    "optimisation.momentum": (0.0, 1.0),
    "optimisation.weight_decay": (0.0, 10.0),
    "optimisation.head_lr_factor": (0.0, 1000.0),
    "optimisation.power": (0.0, 10.0),
    "optimisation.warm_up": (0, 10**9),
    "optimisation.iterations": (1, 10**9),
    "optimisation.batch": (1, 10**6),
    "optimisation.accumulate": (1, 10**6),
    "optimisation.clip_norm": (0.0, 10**9),
    "optimisation.ema": (0.0, 0.999999),
    "validate_every": (1, 10**9),
    "save_every": (1, 10**9),
    "seed": (0, 2**62),
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, such as ``voc12/deeplabv2-coco``."""
    return packaged_names("recipes")


def load_train_config(
    recipe: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The resolved configuration from all its layers; see ``wsss_pipeline.config.load_config``.

    Raises:
        ConfigError: unknown recipe or key, unreadable file, wrong type, value out of range.
    """
    config = TrainConfig()
    if recipe is not None:
        config = merge(config, packaged_values("recipe", recipe), f"recipe {recipe}")
    if file is not None:
        config = merge(config, file_values(file), str(file))
    for text in overrides:
        config = merge(config, override_values(text), f"--set {text}")
    for key, value in (flags or {}).items():
        if value is not None:
            config = merge(config, nested(key, value), f"'{key}'")
    _check_ranges(config)
    return config


def train_config_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``load_train_config`` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def differing_keys(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Dotted keys whose values differ, as ``key: one, other``."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return found

    first, second = flat(asdict(one)), flat(asdict(other))
    return [f"{key}: {first[key]}, {second[key]}" for key in first if first[key] != second[key]]


def _check_ranges(config: TrainConfig) -> None:
    for key, (low, high) in RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if not low <= value <= high:
            raise ConfigError(f"'{key}' is {value:g}; it must lie between {low:g} and {high:g}")
    if config.augmentation.scale_min > config.augmentation.scale_max:
        raise ConfigError("'augmentation.scale_min' is larger than 'augmentation.scale_max'")
