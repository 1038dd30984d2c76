"""Options that several commands share, and their way into the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsss_pipeline.config import SCALES, InferenceConfig, bounds, default
from wsss_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from wsss_pipeline.config import MaskConfig
    from wsss_pipeline.stages.mask_inputs import MaskInputs

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)

# option as click names it -> dotted key of the configuration
CONFIG_KEYS = {
    "clip": "clip.weights",
    "tokenizer": "clip.tokenizer",
    "precision": "clip.precision",
    "max_pixels": "max_pixels",
    "crf": "crf.backend",
    "crf_image": "crf.image",
}


def read_options(options: dict[str, Any]) -> tuple[MaskConfig, MaskInputs]:
    """Configuration and inputs out of what ``input_options``, ``config_options`` and ``crf_options`` took."""
    from wsss_pipeline.stages.mask_inputs import read_inputs

    flags = {key: options.get(name) for name, key in CONFIG_KEYS.items()}
    others = {name: value for name, value in options.items() if name not in CONFIG_KEYS}
    return read_inputs(flags=flags, **others)


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


input_options = _all(
    click.option(
        "--images",
        type=PATH,
        help="Folder of images, searched with all below it, or WebDataset archives: 'shards/{000..127}.tar'.",
    ),
    click.option(
        "--labels",
        type=PATH,
        help="Image-level labels: .json, .csv, .txt, a folder of VOC XML, or COCO instances JSON. "
        "Without it they lie beside the images in the archives, or the images in one folder per class.",
    ),
    click.option("--classes", help="voc12, coco14, demo, a YAML file, or names: cat,dog."),
    click.option("--voc", type=PATH, help="VOC2012 folder, instead of --images and --labels."),
    click.option("--coco", type=PATH, help="COCO folder, instead of --images and --labels."),
    click.option("--split", help="With --voc or --coco: which part, for example train_aug or train2014."),
)

config_options = _all(
    click.option(
        "--clip",
        metavar="ID_OR_PATH",
        help="CLIP: hub id, Hugging Face folder, OpenAI .pt file, or demo.  [default: openai/clip-vit-base-patch16]",
    ),
    click.option("--tokenizer", metavar="ID_OR_PATH", help="Its vocabulary, where a .pt has none beside it."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        help="Of CLIP's matrix products.  [default: auto, which is bf16 where the device is fast at it, else fp32]",
    ),
    click.option(
        "--max-pixels",
        type=int,
        help="Larger images are scaled to this area for CLIP and the CRF; the mask keeps the image's size.  "
        "[default: 1048576]",
    ),
    click.option("--preset", metavar="NAME", help="Published settings: clip-es/voc12 or clip-es/coco14."),
    click.option("--config", "config_file", type=PATH, help="YAML file of settings."),
    click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="One setting, for example cam.threshold=0.7; may be repeated.",
    ),
)

template_option = click.option(
    "--template",
    "templates",
    metavar="TEXT",
    multiple=True,
    help="Prompt template with one {}; repeated ones are averaged.  [default: that of the class set]",
)

crf_options = _all(
    click.option(
        "--crf",
        type=click.Choice(["auto", "pydensecrf", "lattice", "none"]),
        help="Dense CRF.  [default: auto, which is lattice]",
    ),
    click.option(
        "--crf-image",
        type=click.Choice(["bgr", "reference"]),
        help="What the CRF sees: the picture, or the picture as the published script alters it.  [default: bgr]",
    ),
)

machine_options = _all(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--offline", is_flag=True, help="Use only what is on this machine already."),
)


def _scales(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """The numbers of ``--scales 0.5,0.75,1``."""
    if text is None:
        return InferenceConfig().scales
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--scales {text}: write numbers with commas between them, e.g. 0.5,0.75,1"
        ) from error
    low, high = SCALES
    if not all(low <= scale <= high for scale in scales):
        raise ConfigError(f"--scales {text}: each must lie between {low:g} and {high:g}")
    return scales


def _inference_option(key: str, **options: Any) -> Callable[[Command], Command]:
    description = InferenceConfig.model_fields[key].description
    return click.option(f"--{key}", help=f"Network: {description}", **options)


inference_options = _all(
    _inference_option("scales", metavar="S,S,...", callback=_scales),
    _inference_option("flip", is_flag=True),
    _inference_option("window", type=click.IntRange(*(bounds(InferenceConfig, "window") or ()))),
    _inference_option(
        "combine",
        type=click.Choice(["mean", "max"]),
        default=default(InferenceConfig, "combine"),
        show_default=True,
    ),
    click.option("--crf", is_flag=True, help="Network: refine with the dense CRF."),
)
