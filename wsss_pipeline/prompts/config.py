"""How prompts are learned. Typed, frozen, defaults in one place.

The layers, later ones winning: defaults < recipe < --config FILE < --set key=value < command-line flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from wsss_pipeline.config import ClipConfig, ContextLayout, ImagesConfig, Settings, resolve, user_layers
from wsss_pipeline.errors import ConfigError

Objective = Literal["contrastive", "cam"]


class ContextConfig(Settings):
    """The learned context (FMA-WSSS, WACV 2024)."""

    length: int = Field(16, ge=1, le=70, description="Of the context, tokens.")
    layout: ContextLayout = Field("end", description="Where the class's text stands, behind it or in front.")
    per_class: bool = Field(
        False, description="A context for each class and background word, not one for all."
    )
    std: float = Field(0.015, ge=0, le=10, description="Deviation of its initial values.")
    free_background: int = Field(
        0,
        ge=0,
        le=1000,
        description="Number of background contexts without a word, in place of the class set's words; 0 for these.",
    )


class CropConfig(Settings):
    """What happens to an image before CLIP sees it, in this order: colours, scale, crop, mirror."""

    colours: bool = Field(True, description="Vary brightness, contrast, saturation and hue.")
    long_min: int = Field(288, ge=16, le=10_000, description="Smallest longer side of the scaled image.")
    long_max: int = Field(480, ge=16, le=10_000, description="Largest longer side of the scaled image.")
    crop: int = Field(224, ge=16, le=4096, description="Side of the square, a multiple of CLIP's patch.")
    flip: bool = Field(True, description="Mirror every second image.")

    @model_validator(mode="after")
    def _sides_in_order(self) -> CropConfig:
        if self.long_min > self.long_max:
            raise ValueError("long_min is larger than long_max")
        return self


class PromptOptimisationConfig(Settings):
    """SGD: a small constant rate at first, then a cosine down to 0."""

    lr: float = Field(1e-3, ge=0, le=1000, description="Learning rate after the warm-up.")
    warm_up: int = Field(500, ge=0, le=10**9, description="Updates at the small rate.")
    warm_up_lr: float = Field(1e-5, ge=0, le=1000, description="That rate.")
    iterations: int = Field(1800, ge=1, le=10**9, description="Updates.")
    batch: int = Field(16, ge=1, le=10**6, description="Images per micro-step.")
    accumulate: int = Field(1, ge=1, le=10**6, description="Micro-steps per update.")
    momentum: float = Field(0.9, ge=0, le=1, description="Of SGD.")
    weight_decay: float = Field(5e-4, ge=0, le=10, description="Of the context.")


class PromptConfig(Settings):
    """A run of learn-prompts."""

    objective: Objective = Field(
        "contrastive",
        description="Present classes over absent ones, from image-level labels; or CAMs that fit a mask set.",
    )
    labels: Literal["image", "mask"] = Field(
        "image",
        description="With cam, a crop's classes: those of the image, or those in the crop of its mask.",
    )
    images: ImagesConfig = ImagesConfig()
    clip: ClipConfig = ClipConfig()
    context: ContextConfig = ContextConfig()
    augmentation: CropConfig = CropConfig()
    optimisation: PromptOptimisationConfig = PromptOptimisationConfig()
    seed: str = Field(
        "0", description="Of initial values, order and augmentation: a number, or any text, which is hashed."
    )
    max_unusable: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of samples whose image or mask can't be used, above which learning stops.",
    )
    save_every: int = Field(500, ge=1, le=10**9, description="Updates between checkpoints.")

    @field_validator("seed", mode="before")
    @classmethod
    def _a_number_is_as_good_as_its_digits(cls, value: Any) -> Any:
        return str(value) if type(value) is int and value >= 0 else value

    @field_validator("seed")
    @classmethod
    def _some_text(cls, value: str) -> str:
        if not 0 < len(value) <= 1000 or not value.isprintable():
            raise ValueError("give a number, or a text of up to 1,000 characters")
        return value


_COCO = {"augmentation": {"long_min": 318, "long_max": 530}}

# Numbers of the published code. It took COCO's contexts of updates 6,150 and 45,000, by mIoU on training masks; the
# last ones are what a run here gives.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "voc12-contrastive": {"seed": "真"},
    "voc12-cam": {
        "objective": "cam",
        "labels": "mask",
        "seed": "机",
        "context": {"layout": "front", "per_class": True, "std": 0.0125, "free_background": 25},
        "optimisation": {"iterations": 17_000},
    },
    "coco14-contrastive": {
        **_COCO,
        "seed": "真",
        "optimisation": {"iterations": 20_500, "warm_up": 1000, "batch": 4, "accumulate": 4},
    },
    "coco14-cam": {
        "objective": "cam",
        "seed": "真",
        "augmentation": {"long_min": 318, "long_max": 531},
        "optimisation": {"iterations": 75_000, "warm_up": 1000, "batch": 2, "accumulate": 8},
    },
    # ours: the demo's scenes are 160 x 120, its CLIP was trained on 96 x 96
    "demo-contrastive": {
        "augmentation": {"long_min": 128, "long_max": 192, "crop": 96},
        "optimisation": {"iterations": 200, "warm_up": 10, "lr": 0.01},
    },
    "demo-cam": {
        "objective": "cam",
        "labels": "mask",
        "augmentation": {"long_min": 128, "long_max": 192, "crop": 96},
        "optimisation": {"iterations": 200, "warm_up": 10, "lr": 0.1},
    },
}


def load_prompt_config(
    classes: str = "",
    recipe_name: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> PromptConfig:
    """The resolved configuration from all its layers; see ``wsss_pipeline.config``.

    Args:
        classes: name of the class set, which with the objective brings its recipe where none is named.
        recipe_name: name of one of ``RECIPES``.
        file, overrides, flags: see ``user_layers``.

    Raises:
        ConfigError: unknown recipe or key, unreadable file, wrong type, value out of range.
    """
    if recipe_name is not None and recipe_name not in RECIPES:
        raise ConfigError(f"unknown recipe '{recipe_name}'; known: {', '.join(RECIPES)}")
    layers = list(user_layers(file, overrides, flags))
    name = recipe_name or f"{classes}-{resolve(PromptConfig, layers).objective}"
    return resolve(PromptConfig, [(f"recipe {name}", RECIPES.get(name, {})), *layers])
