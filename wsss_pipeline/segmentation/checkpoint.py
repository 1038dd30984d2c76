"""Trained networks and the state of their training as folders, written so that a kill never loses the last one.

A folder is written beside the one that it replaces and then takes its name. Networks are safetensors and a
config.json; nothing is read that could run code.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from wsss_pipeline import __version__
from wsss_pipeline.errors import CheckpointError, NetworkError
from wsss_pipeline.runtime.output import one_line, writing
from wsss_pipeline.segmentation.networks import SegmentationNetwork, build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

LAST, BEST = "last", "best"  # folders of a run that hold a network each
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "wsss-segmentation"

_NETWORK, _AVERAGE = "network.safetensors", "average.safetensors"
_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.json"


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
    values = {
        "model_type": KIND,
        "network": config.model_dump(),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "image_mean": network.image_mean,
        "image_std": network.image_std,
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
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        settle(folder)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        settle(folder)


def settle(folder: Path) -> None:
    """After a kill while ``folder`` was replaced: the previous one comes back where the new one isn't in place."""
    previous = folder.absolute().parent / f".{folder.absolute().name}.previous"  # a folder may be called .
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.exists():
        previous.rename(folder)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at ``path``: itself, or ``best`` or else ``last`` of a training run.

    Raises:
        CheckpointError: neither.
    """
    try:
        for folder in (path, path / BEST, path / LAST):
            settle(folder)
            if (folder / CONFIG).is_file():
                return folder
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path} holds no checkpoint: give the folder of a training run, or one with {CONFIG} and {WEIGHTS}"
    )


def load_network(path: Path, device: torch.device | str = "cpu") -> LoadedNetwork:
    """The network of a checkpoint or training run, in evaluation mode. Nothing is fetched, no pickle read.

    Raises:
        CheckpointError: there is none, it is damaged, or another program's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find_checkpoint(path)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} can't be read: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != KIND:
        raise CheckpointError(f"checkpoint {folder} isn't one of this package: no model_type {KIND}")
    try:
        names = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        network = build_network(NetworkConfig(**config["network"]), len(names))
        mean, std = (tuple(float(value) for value in config[key]) for key in ("image_mean", "image_std"))
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"image_mean {mean} and image_std {std} are no statistics of RGB images")
        network.image_mean, network.image_std = mean, std
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, TypeError, ValueError, NetworkError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} isn't whole: {reason}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder} lacks {WEIGHTS}") from error
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"checkpoint {folder}: {WEIGHTS} doesn't fit or is damaged: {reason}"
        ) from error
    return LoadedNetwork(network.to(device).eval(), tuple(names[1:]), config)


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
        from safetensors.torch import load_file

        if not (folder / _PROGRESS).is_file():
            return
        try:
            self.network.load_state_dict(load_file(folder / _NETWORK))
            if self.average is not None:
                self.average.load_state_dict(load_file(folder / _AVERAGE))
            values: dict[str, Any] = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(values["optimizer"])
            if self.scaler is not None and "scaler" in values:  # a run on a CPU has none
                self.scaler.load_state_dict(values["scaler"])
            torch.set_rng_state(values["rng"])
            if torch.cuda.is_available() and "cuda_rng" in values:
                torch.cuda.set_rng_state(values["cuda_rng"])
            progress = json.loads((folder / _PROGRESS).read_text("utf-8"))
            self.step, self.best_miou = int(progress["step"]), progress["best_miou"]
        except Exception as error:  # what a damaged file raises is up to its format
            raise CheckpointError(
                f"training state {folder} can't be read ({one_line(error)[:200]}); start anew with --overwrite"
            ) from error
