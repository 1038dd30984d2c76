"""Trained networks and the state of their training as folders, written so that a kill never loses the last one.

A folder is written beside the one that it replaces and then takes its name. Networks are safetensors and a
config.json; nothing is read that could run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from wsss_pipeline import __version__
from wsss_pipeline.clip.tensor_files import MOST_WEIGHT_BYTES, check_unpacked, shapes_in, tensors_in
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import PixelRangeSetting, ResolvedPrecision
from wsss_pipeline.data.classes import MAX_CLASSES
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS
from wsss_pipeline.errors import CheckpointError, NetworkError, OutputError, ResourceError, WeightsError
from wsss_pipeline.files import check_plain, open_plain, read_json
from wsss_pipeline.runtime.output import one_line, open_new, printable, writing
from wsss_pipeline.segmentation.clip_network import ClipNetwork
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.hf_networks import TransformersNetwork
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import TRANSFORMERS, NetworkConfig

LAST, BEST = "last", "best"  # folders of a run that hold a network each
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "wsss-segmentation"

_NETWORK, _AVERAGE = "network.safetensors", "average.safetensors"
_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.json"
_FILES = {CONFIG, WEIGHTS, _NETWORK, _AVERAGE, _OPTIMIZER, _PROGRESS}
MAX_CONFIG_BYTES = 2**24


@dataclass(frozen=True)
class LoadedNetwork:
    """A network ready to predict, the names of mask values 1..C, and all of its ``config.json``."""

    network: SegmentationNetwork
    class_names: tuple[str, ...]
    config: dict[str, Any]


def save_network(
    network: SegmentationNetwork,
    folder: Path,
    config: NetworkConfig,
    class_names: Sequence[str],
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes or replaces ``folder``.

    Args:
        network: its tensors are written as they are, on whatever device.
        folder: folder of the checkpoint.
        config: settings that ``build_network`` built it from.
        class_names: names of mask values 1..C.
        extra: further plain values for ``config.json``, such as the step.

    Raises:
        OutputError: the folder can't be written; what it held before is still there.
    """
    names = dict(enumerate(("background", *class_names)))
    frozen: dict[str, Any] = {}
    if isinstance(network, ClipNetwork):
        frozen = {"frozen": network.frozen_digests()}
    elif isinstance(network, TransformersNetwork):
        frozen = {"architecture": network.architecture}
    values = {
        "model_type": KIND,
        "network": config.model_dump(),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "image_mean": network.image_mean,
        "image_std": network.image_std,
        **({"pixel_range": network.pixel_range} if network.pixel_range else {}),
        **frozen,
        "wsss_pipeline_version": __version__,
        **(extra or {}),
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    _replace(folder, {WEIGHTS: _safetensors(network), CONFIG: text.encode()})


def _safetensors(module: nn.Module) -> bytes:
    """In memory: where the disk is full, these libraries raise errors of their own kinds."""
    from safetensors.torch import save

    return save({name: value.detach().cpu().clone() for name, value in module.state_dict().items()})


def _replace(folder: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Puts a folder of these files in the place of another; ``settle`` mends what a kill in between leaves."""
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    with writing(folder):
        remove_checkpoint(partial)
        partial.mkdir(parents=True)
        for name, content in files.items():
            with open_new(partial / name) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        settle(folder)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        settle(folder)


def settle(folder: Path) -> None:
    """After a kill while ``folder`` was replaced: the previous one comes back where the new one isn't in place.

    Raises:
        OSError, OutputError: as ``remove_checkpoint``.
    """
    previous = folder.with_name(f".{folder.name}.previous")
    if folder.exists():
        remove_checkpoint(previous)
    elif previous.is_dir() and not previous.is_symlink():
        previous.rename(folder)


def remove_checkpoint(folder: Path) -> None:
    """Removes the files that this module writes, and their folder; nothing happens where there is none.

    Raises:
        OSError: it can't be removed.
        OutputError: it is a link, or holds anything else; that is left as it is.
    """
    if not folder.is_symlink() and not folder.exists():
        return
    if strangers := [entry.name for entry in _entries(folder) if entry.name not in _FILES]:
        raise OutputError(
            f"{folder} holds what this program didn't write ({printable(strangers[0])}); move it away"
        )
    for entry in _entries(folder):
        entry.unlink()
    folder.rmdir()


def _entries(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{folder} is no folder of this program's; move it away")
    return sorted(folder.iterdir())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at ``path``: itself, or ``best`` or else ``last`` of a training run. Nothing is written.

    Raises:
        CheckpointError: neither.
    """
    try:
        for folder in (path, path / BEST, path / LAST):
            if (folder / CONFIG).is_file():
                return folder
            place = folder.absolute()
            # a kill, or the run that writes it, may be between the two steps of replacing it
            if place.name and not folder.exists():
                previous = place.with_name(f".{place.name}.previous")
                if (previous / CONFIG).is_file():
                    return previous
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path} holds no checkpoint: give the folder of a training run, or one with {CONFIG} and {WEIGHTS}"
    )


class _Config(BaseModel):
    """What a network is built from, out of a ``config.json`` that may be anybody's."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    network: NetworkConfig
    frozen: dict[str, str | None] = Field(default={}, max_length=2)
    architecture: dict[str, Any] | None = None
    id2label: dict[str, str] = Field(min_length=1, max_length=MAX_CLASSES + 1)
    label2id: dict[str, int] = Field(default={}, max_length=MAX_CLASSES + 1)
    image_mean: tuple[float, float, float] = Field(strict=False)
    image_std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=3, max_length=3, strict=False)
    pixel_range: PixelRangeSetting = None

    @property
    def names(self) -> list[str]:
        return [self.id2label[str(index)] for index in range(len(self.id2label))]

    @model_validator(mode="after")
    def _labels_are_numbered(self) -> _Config:
        if set(self.id2label) != {str(index) for index in range(len(self.id2label))}:
            raise ValueError("id2label isn't numbered from 0")
        if any(not name.isprintable() or not name.strip() for name in self.names):
            raise ValueError("id2label holds a name that is no plain text")
        if (self.network.name in TRANSFORMERS) != (self.architecture is not None):
            raise ValueError(
                f"architecture is for {', '.join(TRANSFORMERS)}, and all that they are built from"
            )
        return self


def load_network(
    path: Path,
    device: torch.device | str = "cpu",
    clip: Clip | str | None = None,
    precision: ResolvedPrecision = "fp32",
) -> LoadedNetwork:
    """The network of a checkpoint or training run, in evaluation mode. Nothing is fetched, no pickle read.

    Args:
        path: folder of the checkpoint or the run.
        device: where to put it.
        clip: CLIP of a network on a frozen one, loaded or as ``--clip`` has it, in place of that which the
            checkpoint names; it has to be the same.
        precision: type of the frozen encoders' matrix products.

    Raises:
        CheckpointError: there is none, it is damaged, or another program's; or its CLIP isn't here, or is another.
    """
    folder = find_checkpoint(path)
    try:
        content = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} can't be read: {reason}") from error
    if not isinstance(content, dict) or content.get("model_type") != KIND:
        raise CheckpointError(f"checkpoint {folder} isn't one of this package: no model_type {KIND}")
    try:
        config = _Config.model_validate(content)
        chosen = config.network
        if isinstance(clip, str):
            chosen, clip = chosen.model_copy(update={"encoder": clip}), None
        build = partial(
            build_network,
            chosen,
            len(config.names),
            class_names=config.names[1:],
            clip=clip,
            precision=precision,
            architecture=config.architecture,
        )
        if config.architecture is None:
            network = build()
        else:
            with torch.device("meta"):  # shapes alone, until it is known that the file has them
                network = build()
    except (ValueError, NetworkError) as error:
        reason = one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} isn't whole: {reason[:300]}") from error
    except WeightsError as error:
        raise CheckpointError(
            f"checkpoint {folder} needs its frozen encoder, which can't be had: {one_line(error)[:300]}; where CLIP "
            "lies elsewhere now, give --clip"
        ) from error
    if isinstance(network, ClipNetwork):
        _check_frozen(network, config.frozen, folder)
    try:
        if config.architecture is not None:
            _check_shapes(network, folder / WEIGHTS)
            network = build()
        network.image_mean, network.image_std = config.image_mean, tuple(config.image_std)
        network.pixel_range = config.pixel_range
        _load_tensors(network, folder / WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder} lacks {WEIGHTS}") from error
    except ResourceError:
        raise
    except Exception as error:  # what a damaged file raises is up to its format
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"checkpoint {folder}: {WEIGHTS} doesn't fit or is damaged: {reason}"
        ) from error
    return LoadedNetwork(network.to(device).eval(), tuple(config.names[1:]), content)


def check_frozen(network: ClipNetwork, folder: Path) -> None:
    """A CheckpointError where a checkpoint wasn't trained on this network's CLIP and DINOv2."""
    try:
        stored = _Config.model_validate(read_json(folder / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {CONFIG} can't be read: {one_line(error)[:200]}"
        ) from error
    _check_frozen(network, stored.frozen, folder)
    if (stored.image_mean, tuple(stored.image_std)) != (network.image_mean, network.image_std):
        raise CheckpointError(
            f"checkpoint {folder} was trained on pixels of mean {stored.image_mean}, and its CLIP is for "
            f"{network.image_mean}; train it anew"
        )


def _check_frozen(network: ClipNetwork, stored: Mapping[str, str | None], folder: Path) -> None:
    files = network.frozen.clip.files
    names = {
        "clip": ("CLIP", files.name if files else "this"),
        "dino": ("DINOv2", (isinstance(network, FrozenClip) and network.config.dino) or "none"),
    }
    for key, digest in network.frozen_digests().items():
        what, given = names[key]
        if digest and not stored.get(key):
            raise CheckpointError(
                f"checkpoint {folder}: {CONFIG} doesn't say which {what} it was trained on; train it anew"
            )
        if digest != stored.get(key):
            raise CheckpointError(
                f"checkpoint {folder} was trained on another {what} than {given:.200}; give the one it was trained on"
            )


def load_frozen_clip(
    path: Path,
    clip: Clip,
    precision: ResolvedPrecision,
    class_names: Sequence[str],
    method: str,
    encoding: Mapping[str, Any],
) -> FrozenClip:
    """The decoder of a checkpoint on the CLIP that is given, for these classes and beside this method's CAMs.

    Args:
        path: folder of the checkpoint or the run.
        clip: CLIP that it was trained on.
        precision: type of CLIP's matrix products.
        class_names: names of mask values 1..C.
        method, encoding: see ``FrozenClip.check_method``.

    Raises:
        CheckpointError: see ``load_network``; or it holds another network, or one that doesn't fit.
    """
    loaded = load_network(path, clip.vision.device, clip, precision)
    if not isinstance(loaded.network, FrozenClip):
        raise CheckpointError(
            f"{path} holds a {loaded.config['network']['name']}; give a run of --network frozen-clip"
        )
    if loaded.class_names != tuple(class_names):
        known = ", ".join(loaded.class_names)
        raise CheckpointError(
            f"{path} was trained on other classes than those that masks are to be made of: it knows {known:.200}; "
            "give these with --classes, or a network that was trained on yours"
        )
    own = clip.own_statistics or IMAGENET_STATISTICS
    if (loaded.network.image_mean, loaded.network.image_std) != tuple(own):
        raise CheckpointError(
            f"{path} was trained on pixels of mean {loaded.network.image_mean}, and {method} has {own.mean} for this "
            "CLIP; train it anew"
        )
    try:
        loaded.network.check_method(method, encoding)
    except NetworkError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return loaded.network


def decoder_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of all that determines what a decoder on a frozen CLIP says, wherever its parts lie.

    Raises:
        CheckpointError: there is no checkpoint, or it can't be read.
    """
    folder = find_checkpoint(path)
    try:
        content = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
        if content["network"]["name"] != "frozen-clip":
            raise CheckpointError(
                f"{folder} holds no network on a frozen CLIP; give a run of --network frozen-clip"
            )
        # what acts in training alone, and where DINOv2 lies, is left out; its digest is in "frozen"
        dropped = {"dropout", "affinity_mean", "dino"}
        decoder = {key: value for key, value in content["network"]["frozen"].items() if key not in dropped}
        network = json.dumps([decoder, content["frozen"]], sort_keys=True)
        with open_plain(folder / WEIGHTS, MOST_WEIGHT_BYTES) as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} can't be read: {one_line(error)[:200]}") from error
    return hashlib.sha256(f"{network} {weights}".encode()).hexdigest()


def _load_tensors(module: nn.Module, path: Path) -> None:
    """Gives a module the tensors of a safetensors file, of which none is read before all names and shapes fit."""
    _check_shapes(module, path)
    module.load_state_dict(tensors_in(path))


def _check_shapes(module: nn.Module, path: Path) -> None:
    """A ValueError where a safetensors file holds other tensors than a module's."""
    own, shapes = module.state_dict(), shapes_in(path)
    if odd := own.keys() ^ shapes.keys():
        raise ValueError(f"{len(odd)} tensors are missing or too many, such as {min(odd)}")
    for name, tensor in own.items():
        if shapes[name] != tensor.shape:
            raise ValueError(f"{name} has shape {shapes[name]} instead of {tuple(tensor.shape)}")


class _Progress(BaseModel):
    """How far a training run is, in ``progress.json``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int = Field(ge=0, le=10**9)
    best_miou: float | None = Field(ge=0, le=1)


@dataclass
class TrainingState:
    """All that a run needs to go on as if nothing had happened, torch's random numbers left aside.

    Attributes:
        network: being trained.
        average: average of its weights; None where none is kept.
        optimizer: optimiser of the network.
        scaler: scaler of the gradients in fp16; None in other precisions.
        step: number of updates done.
        best_miou: largest mIoU of the validations so far, in [0, 1]; None before the first.
    """

    network: nn.Module
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: Any = None
    step: int = 0
    best_miou: float | None = None

    def save(self, folder: Path) -> None:
        """Replaces ``folder``; the random numbers, of the CPU and of the CUDA device in use, are written as well.

        Raises:
            OutputError: it can't be written; what it held before is still there.
        """
        values: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if self.scaler is not None:
            values["scaler"] = self.scaler.state_dict()
        if torch.cuda.is_available():
            values["cuda_rng"] = torch.cuda.get_rng_state()
        buffer = io.BytesIO()
        torch.save(values, buffer)
        files: dict[str, bytes | memoryview] = {_NETWORK: _safetensors(self.network)}
        if self.average is not None:
            files[_AVERAGE] = _safetensors(self.average)
        progress = json.dumps({"step": self.step, "best_miou": self.best_miou})
        _replace(folder, {**files, _OPTIMIZER: buffer.getbuffer(), _PROGRESS: progress.encode()})

    def load(self, folder: Path) -> None:
        """Brings all back to where ``save`` left it; nothing changes where there is no state.

        Raises:
            CheckpointError: it is damaged or another network's.
        """
        if not folder.is_dir():
            return
        try:
            content = read_json(folder / _PROGRESS, MAX_CONFIG_BYTES)
            progress = _Progress.model_validate(content)
            _load_tensors(self.network, folder / _NETWORK)
            if self.average is not None:
                _load_tensors(self.average, folder / _AVERAGE)
            values = _read_optimizer(folder / _OPTIMIZER)
            self.optimizer.load_state_dict(values["optimizer"])
            for parameter, kept in self.optimizer.state.items():
                for value in kept.values():
                    if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                        raise ValueError(f"the optimiser's state has shape {tuple(value.shape)}")
            if self.scaler is not None and "scaler" in values:  # a run on a CPU has none
                self.scaler.load_state_dict(values["scaler"])
            torch.set_rng_state(values["rng"])
            if torch.cuda.is_available() and "cuda_rng" in values:
                torch.cuda.set_rng_state(values["cuda_rng"])
            self.step, self.best_miou = progress.step, progress.best_miou
        except ResourceError:
            raise
        except Exception as error:  # what a damaged file raises is up to its format
            raise CheckpointError(
                f"training state {folder} can't be read ({one_line(error)[:200]}); start anew with --overwrite"
            ) from error


def _read_optimizer(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, no larger than the file: torch inflates what is compressed in it."""
    check_plain(path, MOST_WEIGHT_BYTES)
    with zipfile.ZipFile(path) as archive:
        check_unpacked(archive, path.stat().st_size)
    values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return values
