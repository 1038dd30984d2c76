"""Configuration: typed, frozen, each default, range and description in one place, the field.

YAML in, resolved YAML out. The layers, later ones winning:

    defaults  <  preset or recipe  <  --config FILE  <  --set key=value  <  command-line flags

An unknown key, a wrong type or a value out of range is a ConfigError that names the key and the layer
it came from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from wsss_pipeline.errors import ConfigError
from wsss_pipeline.files import MIB, check_machine, read_text

MOST_YAML_BYTES = MIB // 4  # which takes two seconds to parse; that of COCO has 4 KB
MOST_EXPANDED = 4 * MOST_YAML_BYTES  # characters, with what aliases (*name) stand for in their places
_MOST_DIGITS = 100  # of a number

Precision = Literal["auto", "fp32", "bf16", "fp16"]
ResolvedPrecision = Literal["fp32", "bf16", "fp16"]
ClipActivation = Literal["quick_gelu", "gelu"]
RefinerName = Literal["auto", "crf", "par", "vote", "none"]
NetworkRefinerName = Literal["auto", "crf", "par", "none"]
ConfidenceName = Literal["posterior", "margin", "product"]
CrfBackend = Literal["auto", "pydensecrf", "lattice", "none"]
CrfImage = Literal["bgr", "reference", "rgb"]
LabelFormat = Literal[
    "json",
    "json-onehot",
    "records",
    "records-onehot",
    "csv",
    "csv-onehot",
    "txt",
    "txt-onehot",
    "npy",
    "coco",
    "voc-xml",
    "voc-lists",
    "labelme",
    "label-studio",
    "cvat",
    "yolo",
    "createml",
    "fiftyone",
]
ContextLayout = Literal["end", "front"]  # of a learned prompt: where the class's text stands

PixelRange = tuple[float, float]  # values of an image's pixels that become 0 and 255

Layer = tuple[
    str, Mapping[str, Any]
]  # where values come from, for messages; the values, nested or by dotted key


class Settings(BaseModel):
    """Base of all configuration: frozen, strict types (a whole number is as good as a float), no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Settings)


def as_pixel_range(value: Any) -> PixelRange | None:
    """``LOW:HIGH``, or a list of the two, as a range; None as it is; a ValueError where it is neither."""
    if value is None:
        return None
    ends = value.split(":") if isinstance(value, str) else value
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        low = high = 0.0
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{value!r:.60} isn't a range; write LOW:HIGH, for example 0:4095")
    return low, high


PixelRangeSetting = Annotated[PixelRange | None, BeforeValidator(as_pixel_range)]
_PIXEL_RANGE = (
    "Values that become black and white, of images with more than 8 bits that use a part of them: LOW:HIGH, for "
    "example 0:4095 for 12 bits."
)


class ImagesConfig(Settings):
    """What the values of images stand for."""

    pixel_range: PixelRangeSetting = Field(None, description=_PIXEL_RANGE)


class ClipConfig(Settings):
    """The frozen CLIP."""

    weights: str = Field(
        "openai/clip-vit-base-patch16",
        description="Hub id or folder of Hugging Face or OpenCLIP, file of weights, or demo for the package's own.",
    )
    tokenizer: str | None = Field(
        None, description="Hub id or folder of its vocabulary, where the weights don't bring their own."
    )
    activation: ClipActivation | None = Field(
        None, description="Of its MLPs, in place of what its files say; for a file of tensors alone."
    )
    head_width: int | None = Field(
        None, ge=1, le=1024, description="Of its image tower's attention, likewise (OpenAI's: 64)."
    )
    text_head_width: int | None = Field(
        None, ge=1, le=1024, description="Of its text tower's attention, likewise (OpenAI's: 64)."
    )
    precision: Precision = Field(
        "auto", description="Of its matrix products; auto is bf16 where the device is fast at it, else fp32."
    )


class CrfConfig(Settings):
    """Dense CRF (Kraehenbuehl and Koltun, NIPS 2011) with the parameters of CLIP-ES."""

    backend: CrfBackend = Field(
        "auto", description="auto is lattice, our own; pydensecrf, to compare with; none switches it off."
    )
    image: CrfImage = Field(
        "bgr",
        description="What it sees: the plain image, in either order of colours (WeakCLIP: rgb), or the image as the "
        "published script alters it.",
    )
    half_scores: bool = Field(
        True, description="Round scores to half precision first, as CLIP-ES does; WeakCLIP doesn't."
    )
    iterations: int = Field(10, ge=0, le=1000, description="Rounds of mean-field inference.")
    gaussian_sxy: float = Field(
        1.0, ge=0.01, le=10_000, description="Deviation of the position kernel, pixels."
    )
    gaussian_weight: float = Field(3.0, ge=0, le=10_000, description="Weight of the position kernel.")
    bilateral_sxy: float = Field(
        67.0, ge=0.01, le=10_000, description="Deviation in position of the bilateral kernel, pixels."
    )
    bilateral_srgb: float = Field(
        3.0, ge=0.01, le=10_000, description="Deviation in colour of the bilateral kernel, of 256 levels."
    )
    bilateral_weight: float = Field(4.0, ge=0, le=10_000, description="Weight of the bilateral kernel.")


class ParConfig(Settings):
    """Pixel-adaptive refinement (Ru et al., CVPR 2022, section 3.3) with the constants of WeCLIP and ExCEL."""

    iterations: int = Field(20, ge=0, le=1000, description="How often scores go to the neighbours.")
    dilations: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (1, 2, 4, 8, 12, 24),
        min_length=1,
        max_length=16,
        strict=False,
        description="Distances of the neighbours, eight at each, pixels.",
    )
    width: float = Field(
        0.3,
        ge=0.01,
        le=100,
        description="Of the kernels in colour and in distance, in deviations among the neighbours.",
    )
    distance_weight: float = Field(0.01, ge=0, le=100, description="Weight of the kernel in distance.")


class SlicConfig(Settings):
    """SLIC superpixels (Achanta et al., TPAMI 2012), which scikit-image computes."""

    segments: int = Field(
        300, ge=1, le=10_000, description="How many superpixels an image is to have, about."
    )
    compactness: float = Field(
        10.0,
        ge=0.001,
        le=1_000,
        description="Weight of nearness against colour (CIELAB); larger ones are squarer.",
    )
    sigma: float = Field(0.0, ge=0, le=100, description="Gaussian blur of the image before, pixels.")


class VoteConfig(Settings):
    """Region vote (FMA-WSSS, WACV 2024, section 3.4)."""

    regions: str = Field(
        "",
        description="Where the regions lie: a folder of propose-regions, of SA-1B-like JSON or of label images; or "
        "slic, superpixels.",
    )
    background_power: float = Field(
        0.6, ge=0.01, le=100, description="The background's score of a region is (1 - largest class score)^p."
    )
    uncovered: Literal["background", "crf"] = Field(
        "background",
        description="Pixels that no region covers: background, as published, or what the CRF says.",
    )


SCALES = (0.05, 20.0)  # of an image's sides at inference, smallest and largest


class InferenceConfig(Settings):
    """How an image goes through a segmentation network."""

    scales: tuple[Annotated[float, Field(ge=SCALES[0], le=SCALES[1])], ...] = Field(
        (1.0,), min_length=1, strict=False, description="Look at these scales of its sides, e.g. 0.5,0.75,1."
    )
    flip: bool = Field(False, description="Look at the mirrored image too.")
    window: int | None = Field(
        None, ge=16, le=100_000, description="Slide a window of this side over it, half overlapping."
    )
    window_stride: int | None = Field(
        None, ge=1, le=100_000, description="Pixels between windows, in place of half of one (WeakCLIP: 341)."
    )
    short_side: int | None = Field(
        None,
        ge=16,
        le=10_000,
        description="Scales are of a frame with this shorter side (WeakCLIP: 512), resized by OpenCV.",
    )
    long_side: int = Field(2048, ge=16, le=100_000, description="Longer side of that frame.")
    winners_only: bool = Field(
        False, description="Refine the classes alone that are the most probable ones somewhere (WeakCLIP)."
    )
    pixel_range: PixelRangeSetting = Field(
        None, description=f"{_PIXEL_RANGE} Left out, the network's, which it was trained with."
    )
    combine: Literal["mean", "max", "logits"] = Field(
        "mean",
        description="Mean of probabilities; maximum of logits, as DeepLabV2 was published; mean of logits, as WeCLIP "
        "and ExCEL were.",
    )

    @property
    def name(self) -> str:
        """What a table calls the result: ``raw`` where the image is looked at once, as it is."""
        if self.scales == (1.0,) and not self.flip and self.short_side is None:
            return "raw"
        frame = "" if self.short_side is None else f"short side {self.short_side}, "
        return f"{frame}scales {','.join(f'{scale:g}' for scale in self.scales)}" + (
            " flip" if self.flip else ""
        )

    @model_validator(mode="after")
    def _windows_without_gaps(self) -> InferenceConfig:
        if self.window_stride is not None and self.window_stride > (self.window or 0):
            raise ValueError(
                f"inference.window_stride {self.window_stride} goes with a window of at least that side; give "
                "inference.window, or a smaller one"
            )
        if self.short_side is not None and self.short_side > self.long_side:
            raise ValueError("inference.short_side is larger than inference.long_side")
        return self

    def determinants(self) -> dict[str, Any]:
        """What decides over a result, for its fingerprint: all but settings that do nothing here.

        Of those that came later, so that what was made before keeps its fingerprint; and how several looks are
        combined, where there is one.
        """
        unused = {"combine"} if len(set(self.scales)) == 1 and not self.flip else set()
        unused |= {"window_stride"} if self.window_stride is None else set()
        unused |= {"short_side", "long_side"} if self.short_side is None else set()
        unused |= set() if self.winners_only else {"winners_only"}
        unused |= {"pixel_range"} if self.pixel_range is None else set()
        return self.model_dump(mode="json", exclude=unused)


class MaskConfig(Settings):
    """What a user can choose about stage one and what changes the masks; a method adds its own settings."""

    method: str = Field("clip-es", description="Name of a method, or module path of one's own.")
    classes: str = Field("", description="Built-in class set, file of classes, or names with commas between.")
    templates: tuple[str, ...] = Field(
        (), strict=False, description="Prompt templates with one {}; empty means those of the class set."
    )
    images: ImagesConfig = ImagesConfig()
    clip: ClipConfig = ClipConfig()
    refine: RefinerName = Field("auto", description="From scores to masks; auto is what the method has.")
    crf: CrfConfig = CrfConfig()
    par: ParConfig = ParConfig()
    vote: VoteConfig = VoteConfig()
    slic: SlicConfig = SlicConfig()
    confidence: ConfidenceName = Field(
        "product",
        description="What says how sure a label is: the product of scores and their mean around, which tells errors "
        "best; the margin of its score over the best other; or the refiner's posterior, as published.",
    )
    max_pixels: int = Field(
        1_048_576,
        ge=4_096,
        le=1_000_000_000,
        description="Larger images are scaled to this area for CLIP and the refiner; masks keep their size.",
    )

    @field_validator("templates", mode="before")
    @classmethod
    def _one_text_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class PromptedMaskConfig(MaskConfig):
    """Settings of a method whose class texts may be learned prompts."""

    prompts: str = Field(
        "", description="File of learn-prompts, whose learned texts stand in for templates; empty for none."
    )


class RelabelConfig(Settings):
    """What a user can choose about a network's masks as a mask set."""

    inference: InferenceConfig = InferenceConfig()
    precision: Precision = Field(
        "fp32",
        description="Of the network's matrix products; auto is bf16 where the device is fast at it, else fp32.",
    )
    refine: NetworkRefinerName = Field("auto", description="From probabilities to masks; auto is crf.")
    crf: CrfConfig = CrfConfig()
    par: ParConfig = ParConfig()
    confidence: ConfidenceName = Field(
        "posterior", description="What says how sure a label is, as for generate-masks."
    )


def resolve(kind: type[Kind], layers: Iterable[Layer]) -> Kind:
    """The settings out of all their layers, later ones winning.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; the message names key and layer.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    origin = "settings"
    for origin, layer in layers:
        for key, value in _flat(layer, kind, origin):
            *outer, last = key.split(".")
            node = values
            for part in outer:
                if not isinstance(node.get(part), dict):
                    node[part] = {}
                node = node[part]
            node[last], origins[key] = value, origin
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # an unknown key may be what explains a missing one
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise ConfigError(_explained(first, kind, origins, origin)) from error


def _flat(
    values: Mapping[str, Any], kind: type[Settings], origin: str = "", prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each single setting."""
    for name, value in values.items():
        key = f"{prefix}{name}"  # YAML has keys that are numbers
        inner = section(kind, str(name))
        if inner is None:
            yield key, value
        elif isinstance(value, Mapping):
            yield from _flat(value, inner, origin, f"{key}.")
        else:
            raise ConfigError(f"{origin}: '{key}' holds several keys; write '{key}.NAME'")


def section(kind: type[Settings], key: str) -> type[Settings] | None:
    """Type of the settings below a key, None where it holds a single value or isn't there."""
    field = kind.model_fields.get(key)
    found = field.annotation if field is not None else None
    return found if isinstance(found, type) and issubclass(found, Settings) else None


def _explained(error: ErrorDetails, kind: type[Settings], origins: Mapping[str, str], last: str) -> str:
    """One line for one of pydantic's errors: layer (the last where none has the key), key, what would be right."""
    problem, value = error["type"], error["input"]
    if problem == "value_error" and not error["loc"]:  # two settings that contradict each other
        return str(error["ctx"]["error"])
    keys: list[str] = []
    for part in map(str, error["loc"]):
        if part not in kind.model_fields and problem != "extra_forbidden":
            break  # a member of a union, or a place in a list
        keys.append(part)
        kind = section(kind, part) or kind
    if not keys:  # half a character, which no key holds
        return f"{last}: a key isn't UTF-8 text; write it anew"
    key, name = ".".join(keys), keys[-1]
    origin = next((origins[k] for k in origins if f"{k}.".startswith(f"{key}.")), last)
    if problem == "extra_forbidden":
        close = difflib.get_close_matches(name, kind.model_fields, n=1)
        meant = ".".join(keys[:-1] + close)
        hint = f"did you mean '{meant}'?" if close else f"known here: {', '.join(kind.model_fields)}"
        return f"{origin}: unknown key '{key:.100}'; {hint}"
    if problem == "missing":
        return f"{origin}: '{key}' is missing; it takes: {kind.model_fields[name].description}"
    if problem in ("greater_than_equal", "less_than_equal", "finite_number") and (
        limits := bounds(kind, name)
    ):
        return f"{origin}: '{key}' is {value:g}; it must lie between {limits[0]:g} and {limits[1]:g}"
    if problem == "literal_error":
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{origin}: '{key}' is {value!r:.60}; choose one of {choices}"
    if problem == "value_error":
        return f"{origin}: '{key}': {error['ctx']['error']}"
    kinds = {"tuple_type": "a list of texts", "string_type": "text", "string_unicode": "UTF-8 text"}
    if len(keys) < len(error["loc"]):
        problem = "tuple_type"
    wanted = kinds.get(problem, f"a value of type {problem.removesuffix('_type')}")
    return f"{origin}: '{key}' takes {wanted}, not {value!r:.60}"


def bounds(kind: type[Settings], key: str) -> tuple[float, float] | None:
    """Smallest and largest value of a field, both allowed; None where it has no range."""
    found = {type(item).__name__: item for item in kind.model_fields[key].metadata}
    return (found["Ge"].ge, found["Le"].le) if {"Ge", "Le"} <= found.keys() else None


def fields(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, type[Settings], str]]:
    """Dotted key, owner and name of each single setting, in order."""
    for name in kind.model_fields:
        inner = section(kind, name)
        if inner is None:
            yield prefix + name, kind, name
        else:
            yield from fields(inner, f"{prefix}{name}.")


def default(kind: type[Settings], key: str) -> Any:
    """Default of a dotted key, for help texts."""
    return reduce(getattr, key.split("."), kind())


def description(kind: type[Settings], key: str) -> str:
    """Description and range of a dotted key, for help texts."""
    outer, _, name = key.rpartition(".")
    for part in outer.split(".") if outer else []:
        kind = section(kind, part) or kind
    limits = bounds(kind, name)
    text = kind.model_fields[name].description or ""
    # an upper limit that nobody meets says nothing
    return text + (f" {limits[0]:g} to {limits[1]:g}." if limits and limits[1] < 1e12 else "")


def differing_keys(one: Settings, other: Settings) -> list[str]:
    """Dotted keys whose values differ, as ``key: one, other``."""
    first, second = (dict(_flat(settings.model_dump(), type(settings))) for settings in (one, other))
    return [f"{key}: {first[key]}, {second[key]}" for key in first if first[key] != second[key]]


def to_yaml(settings: Settings, *, described: bool = False) -> str:
    """The settings as YAML that reads back to equal ones; ``described`` puts a comment behind each."""
    import yaml

    if not described:
        return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    lines: list[str] = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            lines.append(f"{name}:")
            lines += [f"  {line}" for line in to_yaml(value, described=True).splitlines()]
        else:
            single = yaml.safe_dump(
                settings.model_dump(mode="json")[name], default_flow_style=True, width=10**6
            )
            text = f"{name}: {single.removesuffix(chr(10)).removesuffix('...').strip()}"
            lines.append(f"{text}  # {description(type(settings), name)}")
    return "\n".join(lines) + "\n"


def user_layers(
    file: Path | None, overrides: Iterable[str], flags: Mapping[str, Any] | None
) -> Iterator[Layer]:
    """The layers that a user writes, in order: YAML file, ``key=value`` texts, flags that aren't None.

    Raises:
        ConfigError: the file can't be read or isn't YAML, a text isn't of that form.
    """
    if file is not None:
        yield str(file), yaml_mapping(read_yaml(file, f"configuration file {file}"), str(file))
    for text in overrides:
        key, separator, value = text.partition("=")
        shown = f"--set {text}" if len(text) <= 200 else f"--set {text[:200]}..."
        if not separator or not key.strip():
            raise ConfigError(f"{shown}: write it as key=value, for example cam.threshold=0.4")
        yield shown, {key.strip(): yaml_content(value, shown)}
    for key, value in (flags or {}).items():
        if value is not None:
            yield f"'{key}'", {key: value}


def read_yaml(file: Path, origin: str) -> str:
    """The text of a user's YAML file, which ``origin`` names in the ConfigError."""
    try:
        return read_text(file, MOST_YAML_BYTES)
    except (OSError, ValueError) as error:
        check_machine(error)
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{origin} can't be read as UTF-8 text: {reason}; check the path") from error


def yaml_mapping(text: str, origin: str) -> Mapping[str, Any]:
    """YAML text as a mapping, empty where it is; ``origin`` names it in the ConfigError."""
    values = yaml_content(text, origin)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def yaml_content(text: str, origin: str) -> Any:
    """What YAML text holds; ``origin`` names it in the ConfigError."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # before anything is made of it: merged mappings are copied for each alias
            if _expanded(node, {}) > MOST_EXPANDED:
                raise ConfigError(f"{origin}: its aliases (*name) stand for far too much; write it out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{origin}: not valid YAML: {reason[:300]}") from error


def _expanded(node: Any, known: dict[int, float]) -> float:
    """Characters of a YAML node with its aliases written out; infinite where it holds itself.

    Raises:
        ValueError: a number with more digits than any setting has, which may take minutes to make.
    """
    if isinstance(node.value, str):
        if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits")
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def recipe_names() -> list[str]:
    """Names of the training recipes in the package, such as ``voc12/deeplabv2-coco``."""
    root = Path(str(resources.files("wsss_pipeline") / "recipes"))
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.glob("*/*.yaml"))


def recipe(name: str) -> Layer:
    """The layer of a recipe in the package; a ConfigError where there is none of that name."""
    known = recipe_names()
    if name not in known:
        raise ConfigError(f"unknown recipe '{name}'; known: {', '.join(known)}")
    text = (resources.files("wsss_pipeline") / "recipes" / f"{name}.yaml").read_text("utf-8")
    return f"recipe {name}", yaml_mapping(text, f"recipe {name}")
