"""Trained networks as folders: config.json and safetensors, written so that a kill never loses the last one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsss_pipeline import __version__
from wsss_pipeline.errors import CheckpointError, NetworkError
from wsss_pipeline.segmentation.networks import (
    IMAGE_MEAN,
    IMAGE_STD,
    SegmentationNetwork,
    build_network,
)
from wsss_pipeline.segmentation.train_config import NetworkConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "wsss-segmentation"


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
        config: what ``build_network`` built it from.
        class_names: of mask values 1..C.
        extra: further plain values for ``config.json``, such as the step.

    Raises:
        CheckpointError: the folder can't be written; what it held before is still there.
    """
    from safetensors.torch import save

    names = ("background", *class_names)
    values = {
        "model_type": KIND,
        "network": config.model_dump(),
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "wsss_pipeline_version": __version__,
        **(extra or {}),
    }
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        # not save_file: where the disk is full, that raises an error of its own kind
        (partial / WEIGHTS).write_bytes(save({name: value.clone() for name, value in tensors.items()}))
        (partial / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
        swap_in(partial, folder)
    except OSError as error:
        raise not_written(f"checkpoint {folder}", error) from error


def not_written(what: str, error: OSError) -> CheckpointError:
    """The error for a disk that is full, read-only, ..."""
    return CheckpointError(
        f"{what} can't be written: {error.strerror or error}; free some space or mend the permissions there, then "
        "run the same command again: training goes on from what was saved last"
    )


def swap_in(partial: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another; ``settle`` mends what a kill in between leaves."""
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    previous = _previous(folder)
    settle(folder)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def settle(folder: Path) -> None:
    """After a kill during ``swap_in``: the previous folder comes back where the new one isn't in place."""
    previous = _previous(folder)
    if previous.exists():
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(folder)


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at ``path``: itself, or ``best`` or else ``last`` of a training run.

    Raises:
        CheckpointError: neither.
    """
    for folder in (path, path / "best", path / "last"):
        if folder.parent.is_dir():
            try:
                settle(folder)
            except OSError as error:
                raise CheckpointError(f"checkpoint {folder}: {error.strerror or error}") from error
        if (folder / CONFIG).is_file():
            return folder
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
    config = _read_config(folder / CONFIG)
    try:
        names = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        network_config = NetworkConfig(**config["network"])
        network = build_network(network_config, len(names))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, TypeError, NetworkError) as error:
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} isn't whole: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder} lacks {WEIGHTS}") from error
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {folder}: {WEIGHTS} doesn't fit or is damaged: {reason}"
        ) from error
    return LoadedNetwork(network.to(device).eval(), tuple(names[1:]), config)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {file.parent}: {file.name} can't be read: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != KIND:
        raise CheckpointError(f"checkpoint {file.parent} isn't one of this package: no model_type {KIND}")
    return values
