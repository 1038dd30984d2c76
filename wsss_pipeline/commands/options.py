"""Options that several commands share, and their way into the configuration.

A help text takes default, range and description from the field of the configuration that the option sets.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from wsss_pipeline.config import (
    SCALES,
    ConfidenceName,
    CrfBackend,
    CrfImage,
    InferenceConfig,
    LabelFormat,
    MaskConfig,
    NetworkRefinerName,
    Precision,
    PromptedMaskConfig,
    RefinerName,
    RelabelConfig,
    Settings,
    default,
    description,
    resolve,
    user_layers,
)
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import printable

if TYPE_CHECKING:
    from wsss_pipeline.pseudo_masks.job import JobPaths
    from wsss_pipeline.pseudo_masks.report import MaskReport

Command = Callable[..., Any]

PATH = click.Path(path_type=Path)

# where a command's context keeps what options were given that many commands share
_SETTINGS, _PATHS = "wsss_pipeline.settings", "wsss_pipeline.paths"


def setting(
    kind: type[Settings], key: str, *names: str, about: str = "", **attributes: Any
) -> Callable[[Command], Command]:
    """An option that sets one field of a configuration; left out, it sets nothing. See ``given_settings``.

    Args:
        kind: type of the configuration.
        key: dotted key of the field.
        names: names of the option, as for ``click.option``.
        about: text before the description.
        attributes: further attributes of the option.
    """
    value = default(kind, key)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    shown = f"  [default: {value}]" if value is not False and value not in (None, "") else ""
    attributes = {"default": None, "help": about + description(kind, key) + shown, **attributes}
    return _kept(_SETTINGS, key, *names, **attributes)


def given_settings(context: click.Context) -> dict[str, Any]:
    """Dotted key to value, None where not given, of a command's ``setting`` options."""
    return dict(context.meta.get(_SETTINGS, {}))


def given_paths(context: click.Context) -> JobPaths:
    """What the ``input_options``, ``layer_options`` and ``--cache`` of a command were given."""
    paths: JobPaths = {**context.meta.get(_PATHS, {})}  # type: ignore[typeddict-item]  # by their names
    return paths


def _kept(where: str, key: str | None, *names: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option whose value is kept in the command's context, under ``key`` or its name, not passed on."""

    def keep(context: click.Context, parameter: click.Parameter, given: Any) -> None:
        context.meta.setdefault(where, {})[key or parameter.name] = given

    return click.option(*names, expose_value=False, callback=keep, **attributes)


_path = partial(_kept, _PATHS, None)


def say(text: object, err: bool = False) -> None:
    """Print text, a line or several, that may hold others' names: what isn't printable in a line is shown escaped.

    A stderr that can't be written, unlike stdout, is no error: nobody listens.
    """
    with suppress(OSError) if err else nullcontext():
        click.echo("\n".join(printable(line) for line in str(text).split("\n")), err=err)


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in their order."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


def choice(names: Any) -> click.Choice[str]:
    """One of the texts of a ``Literal``."""
    return click.Choice(get_args(names))


LABELS_FORMAT: dict[str, Any] = {
    "type": choice(LabelFormat),
    "metavar": "NAME",
    "help": "Form of the labels: csv, npy, yolo, ..., see docs/inputs.md.  [default: what the content shows]",
}

labels_format_option = click.option("--labels-format", **LABELS_FORMAT)

CLASSES_FORMS = "voc12, coco14, demo, a file of classes, or names: cat,dog"

OTHER_CLASSES: dict[str, Any] = {
    "type": click.Choice(["error", "ignore"]),
    "help": "Labels that are none of the classes: an error, or passed over, so that these objects are background.  "
    "[default: error]",
}

image_suffix_option = _path(
    "--image-suffix",
    metavar="TEXT",
    help="Which files of --images count: names that end so (.jpg, _rgb), a pattern ('*_left.*'), or with ! before it "
    "all others ('!_mask').",
)

gt_suffix_option = _path(
    "--gt-suffix",
    metavar="TEXT",
    help="Ending of ground-truth names, such as _mask or .png: other files don't count, and ids go without it.",
)

input_options = all_of(
    _path(
        "--images",
        type=PATH,
        help="Folder of images, searched with all below it, or WebDataset archives: 'shards/{000..127}.tar'.",
    ),
    image_suffix_option,
    _path(
        "--labels",
        type=PATH,
        help="Image-level labels: .json, .jsonl, .csv, .tsv, .txt, .npy, .xml, or a folder of VOC XML, LabelMe or "
        "YOLO files; docs/inputs.md lists the forms. Without it they lie beside the images in the archives, or the "
        "images in one folder per class.",
    ),
    _path("--labels-format", **LABELS_FORMAT),
    _path("--classes", help=f"{CLASSES_FORMS}."),
    _path("--other-classes", **OTHER_CLASSES),
    _path("--voc", type=PATH, help="VOC2012 folder, instead of --images and --labels."),
    _path("--coco", type=PATH, help="COCO folder, instead of --images and --labels."),
    _path("--split", help="With --voc or --coco: which part, for example train_aug or train2014."),
)

cache_option = _path(
    "--cache", type=PATH, default="cache", show_default=True, help="Folder that holds the mask sets."
)

clip_options = all_of(
    setting(MaskConfig, "clip.weights", "--clip", metavar="ID_OR_PATH"),
    setting(MaskConfig, "clip.tokenizer", "--tokenizer", metavar="ID_OR_PATH"),
)


def file_options(example: str, listed: str = "`wsss config show` lists them") -> Callable[[Command], Command]:
    """``--config`` and ``--set``, with an example of a setting and where all of them are listed."""
    return all_of(
        _path("--config", "config_file", type=PATH, help="YAML file of settings."),
        _path(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help=f"One setting, for example {example}; may be repeated; {listed}.",
        ),
    )


layer_options = all_of(
    _path("--preset", metavar="NAME", help="Published settings of stage one, such as clip-es/voc12."),
    file_options("cam.threshold=0.7"),
)

config_options = all_of(
    clip_options,
    setting(MaskConfig, "clip.precision", "--precision", type=choice(Precision)),
    setting(MaskConfig, "max_pixels", "--max-pixels", type=int),
    setting(MaskConfig, "images.pixel_range", "--pixel-range", metavar="LOW:HIGH"),
    layer_options,
)

template_option = click.option(
    "--template",
    "templates",
    metavar="TEXT",
    multiple=True,
    help="Prompt template with one {}; repeated ones are averaged.  [default: that of the class set]",
)

# of one method, whose own settings would need torch to be imported for a help text
attributes_option = _kept(
    _SETTINGS,
    "excel.attributes",
    "--attributes",
    metavar="FILE",
    default=None,
    help="Method excel: JSON of sentences by class, or none.  [default: those of the class set]",
)


def _refiner_options(kind: type[MaskConfig | RelabelConfig], names: Any) -> Callable[[Command], Command]:
    return all_of(
        setting(kind, "refine", "--refine", type=choice(names)),
        setting(kind, "crf.backend", "--crf", type=choice(CrfBackend)),
        setting(kind, "crf.image", "--crf-image", type=choice(CrfImage)),
        setting(kind, "confidence", "--confidence", type=choice(ConfidenceName)),
    )


method_options = all_of(
    setting(MaskConfig, "method", "--method", metavar="NAME"),
    attributes_option,
    setting(PromptedMaskConfig, "prompts", "--prompts", metavar="FILE"),
    _refiner_options(MaskConfig, RefinerName),
    setting(MaskConfig, "vote.regions", "--regions", metavar="DIR|slic"),
)

frozen_clip_option = click.option(
    "--clip",
    metavar="ID_OR_PATH",
    help="Network on a frozen CLIP: where that CLIP lies.  [default: where it lay in training]",
)

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")

offline_option = click.option("--offline", is_flag=True, help="Use only what is on this machine already.")

machine_options = all_of(device_option, offline_option)

# of commands that fetch nothing anyway: what is given is heard by the command group
offline_guarantee = click.option(
    "--offline", is_flag=True, expose_value=False, help="Fetch nothing; this command never does."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")

shard_option = click.option(
    "--shard", metavar="I/N", help="Share I (from 0) of N.  [default: from SLURM arrays or torchrun]"
)

# of a run that fills the cache
run_options = all_of(
    click.option("--limit", type=click.IntRange(1), help="At most so many images."),
    click.option("--overwrite", is_flag=True, help="Compute again what the cache already holds."),
    click.option(
        "--check-bytes",
        is_flag=True,
        help="Read every finished image again, even where size and time are the same.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Say what would be done and how much disk it takes, and stop."
    ),
    json_option,
)


def report_masks(context: click.Context, report: MaskReport, as_json: bool) -> None:
    """End a command that filled the cache: the report, the mask set as stdout's last line, the exit code."""
    from wsss_pipeline.runtime.share import is_torchrun

    say("\n".join(report.lines()), err=True)
    if as_json:
        say(json.dumps(report.as_dict()))
    if report.interrupted:
        say(f"interrupted; go on with: {shlex.join(['wsss', *sys.argv[1:]])}", err=True)
    say(report.path)
    # torchrun ends all other processes as soon as one ends with anything but 0
    some_failed = 0 if is_torchrun() else 1 if report.computed or report.reused else 2
    context.exit(130 if report.interrupted else some_failed if report.failed else 0)


def _scales(text: str) -> tuple[float, ...]:
    """The numbers of ``--scales 0.5,0.75,1``."""
    low, high = SCALES
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--scales {text}: write numbers with commas between them, e.g. 0.5,0.75,1"
        ) from error
    if not all(low <= scale <= high for scale in scales):
        raise ConfigError(f"--scales {text}: each must lie between {low:g} and {high:g}")
    return scales


def _look_options(kind: type[Settings], prefix: str, about: str) -> Callable[[Command], Command]:
    """How a network looks at an image; ``prefix``: of the keys of ``InferenceConfig`` in ``kind``."""
    look = partial(setting, kind, about=about)
    return all_of(
        look(f"{prefix}scales", "--scales", metavar="S,S,...", type=_scales),
        look(f"{prefix}flip", "--flip", is_flag=True),
        look(f"{prefix}window", "--window", type=int),
        look(f"{prefix}pixel_range", "--pixel-range", metavar="LOW:HIGH"),
        look(f"{prefix}combine", "--combine", type=click.Choice(["mean", "max", "logits"])),
    )


inference_options = all_of(
    _look_options(InferenceConfig, "", "Network: "),
    click.option("--crf", is_flag=True, help="Network: refine with the dense CRF."),
)

relabel_options = all_of(
    _look_options(RelabelConfig, "inference.", ""),
    setting(RelabelConfig, "precision", "--precision", type=choice(Precision)),
    _refiner_options(RelabelConfig, NetworkRefinerName),
    _path("--preset", metavar="NAME", help="Published settings: weakclip/voc12 or weakclip/coco14."),
    file_options("crf.iterations=5", "docs/settings.md lists them"),
)


proposal_options = all_of(
    _path(
        "--preset", metavar="NAME", help="Settings: fma, as FMA-WSSS published them, or fast.  [default: fma]"
    ),
    setting(MaskConfig, "images.pixel_range", "--pixel-range", metavar="LOW:HIGH"),
    file_options("smallest_area=0", "docs/settings.md lists them"),
)


def inference_config(context: click.Context) -> InferenceConfig:
    """What the ``inference_options`` of a command come to."""
    return resolve(InferenceConfig, user_layers(None, (), given_settings(context)))
