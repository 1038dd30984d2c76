"""Methods that make pseudo masks: one file a published system, with its settings and presets, found by its name.

A module of this folder, or one of the user's own that can be imported, holds the class as ``METHOD``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from wsss_pipeline.config import MaskConfig, RefinerName, ResolvedPrecision, resolve, user_layers
from wsss_pipeline.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from wsss_pipeline.clip.weights import Clip
    from wsss_pipeline.data.classes import ClassSet
    from wsss_pipeline.data.transforms import Prepared

DEFAULT_METHOD = "clip-es"


class Method(Protocol):
    """What makes class activation maps out of images and the classes that are present.

    Attributes:
        name: word for ``--method``.
        version: raise it when the same settings give other masks; part of the fingerprint.
        Config: the type of its settings: those of every method, and its own under keys of their own.
        presets: name to the settings of a preset, nested by key; that of a built-in class set's name comes with it.
        refiner: meaning of ``refine: auto``.
        background_power: p in the background's score (1 - max)^p.

    Where several classes score alike, the first of the image's labels wins; with ``ties = "index"``, an attribute
    that a method may have, the first in the class set.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    Config: ClassVar[type[MaskConfig]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    refiner: ClassVar[RefinerName]
    background_power: float

    def __init__(
        self, config: Any, clip: Clip, class_set: ClassSet, precision: ResolvedPrecision
    ) -> None: ...

    @classmethod
    def determinants(cls, config: Any) -> Mapping[str, Any]:
        """The part of the fingerprint that is its own; settings of what is switched off are left out.

        A method that takes more from a class set than names, prompts and background words also has a class method
        ``class_determinants(config, class_set)``, with what enters the fingerprint of that, in place of these too.
        """

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """An image, uint8 (H, W, 3) RGB, at the size and with the pixel statistics that the method wants."""

    def scores(self, batch: Tensor, present: Sequence[Sequence[int]]) -> list[Tensor]:
        """Class activation maps of a batch.

        Args:
            batch: float32 (B, 3, h, w) of prepared pixels, on the device.
            present: per image its present classes as mask values 1..C, at least one, in label order.

        Returns:
            Per image float32 (K, h', w'), a map for each present class, affinity done. What is under 0 counts as 0
            once the map is scaled to the image. Whether they are finite is looked at by who asked for them.
        """


def method_names() -> list[str]:
    """Names of the methods in this package."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> type[Method]:
    """The method of that name, or in the module of that path (``my_package.my_method``).

    Raises:
        ConfigError: there is none.
    """
    if name in method_names():  # what fails in ours is no wrong name
        found: type[Method] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
        return found
    try:
        method: type[Method] = importlib.import_module(name).METHOD
    except Exception as error:  # a module of the user's own may fail in any way
        close = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(method_names())}"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"unknown method '{name}'; {hint}, or a module of yours with a METHOD (tried: {reason})"
        ) from error
    return method


def preset_names() -> list[str]:
    """Names of all presets, such as ``clip-es/voc12``."""
    return [f"{name}/{preset}" for name in method_names() for preset in sorted(load_method(name).presets)]


def _refuse_settings_of_others(
    origin: str, layer: Mapping[str, Any], name: str, method: type[Method]
) -> None:
    """A ConfigError that names the methods that do have a setting, where the chosen one hasn't."""
    for key in map(str, layer):  # YAML has keys that are numbers
        section, _, rest = key.partition(".")
        if section in method.Config.model_fields:
            continue
        owners = [other for other in method_names() if section in load_method(other).Config.model_fields]
        if owners:
            # an option of one method's own has the name of its setting
            where = f"--{rest}" if rest and origin == f"'{key}'" else origin
            raise ConfigError(
                f"{where}: method {name} has no setting '{key}'; give --method {' or '.join(owners)}, "
                "or leave it out"
            )


def load_mask_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> MaskConfig:
    """The resolved configuration of stage one, of the method's own type, from all its layers.

    Args:
        preset: ``METHOD/NAME``. Without one, a built-in class set brings the method's preset of its name, since
            published numbers belong to the data set.
        file: YAML file of the user's.
        overrides: ``key=value`` texts, the key dotted (``cam.threshold=0.4``), the value YAML.
        flags: dotted key to value, as typed on the command line; None values are passed over.

    Raises:
        ConfigError: unknown method, preset or key, unreadable file, wrong type, value out of range.
    """
    layers = list(user_layers(file, overrides, flags))
    chosen = [layer["method"] for _, layer in layers if "method" in layer]
    family, _, preset_name = (preset or "").rpartition("/")
    name = chosen[-1] if chosen else family or DEFAULT_METHOD
    if not isinstance(name, str):
        raise ConfigError(f"'method' takes text, not {name!r:.60}")
    method = load_method(name)
    if preset is not None and (family != name or preset_name not in method.presets):
        known = ", ".join(f"{name}/{known}" for known in sorted(method.presets))
        raise ConfigError(f"unknown preset '{preset}' of method {name}; known: {known or 'none'}")
    for origin, layer in layers:
        _refuse_settings_of_others(origin, layer, name, method)
    config = resolve(method.Config, [("", {"method": name}), *layers])
    if preset is None and config.classes in method.presets:
        preset_name = config.classes
    if preset_name:
        values = {"method": name, **method.presets[preset_name]}
        config = resolve(method.Config, [(f"preset {name}/{preset_name}", values), *layers])
    return config
