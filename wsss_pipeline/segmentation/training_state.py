"""All that a training run needs to go on as if nothing had happened; one folder, replaced as a whole."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.errors import CheckpointError
from wsss_pipeline.segmentation.checkpoint import not_written, settle, swap_in

_NETWORK, _AVERAGE, _OPTIMIZER, _PROGRESS = (
    "network.safetensors",
    "average.safetensors",
    "optimizer.pt",
    "progress.json",
)


@dataclass
class TrainingProgress:
    """``step``: updates done. ``best_miou``: of the validations so far, None before the first."""

    step: int = 0
    best_miou: float | None = None


def save_state(
    folder: Path,
    network: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    progress: TrainingProgress,
) -> None:
    """Replaces ``folder`` by the present state, torch's random numbers included.

    Raises:
        CheckpointError: it can't be written; what it held before is still there.
    """
    from safetensors.torch import save

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # through memory: where the disk is full, these libraries raise errors of their own kinds
        (partial / _NETWORK).write_bytes(save(_tensors(network)))
        if average is not None:
            (partial / _AVERAGE).write_bytes(save(_tensors(average)))
        buffer = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, buffer)
        (partial / _OPTIMIZER).write_bytes(buffer.getbuffer())
        values = {"step": progress.step, "best_miou": progress.best_miou}
        (partial / _PROGRESS).write_text(json.dumps(values), "utf-8")
        swap_in(partial, folder)
    except OSError as error:
        raise not_written(f"training state {folder}", error) from error


def load_state(
    folder: Path, network: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer
) -> TrainingProgress | None:
    """Brings everything back to where ``save_state`` left it; None where there is no state.

    Raises:
        CheckpointError: it is damaged or another network's.
    """
    from safetensors.torch import load_file

    if folder.parent.is_dir():
        settle(folder)
    if not (folder / _PROGRESS).is_file():
        return None
    try:
        network.load_state_dict(load_file(folder / _NETWORK))
        if average is not None:
            average.load_state_dict(load_file(folder / _AVERAGE))
        state: dict[str, Any] = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        values = json.loads((folder / _PROGRESS).read_text("utf-8"))
        return TrainingProgress(int(values["step"]), values["best_miou"])
    except Exception as error:  # what a damaged file raises is up to its format
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"training state {folder} can't be read ({reason}); start anew with --overwrite"
        ) from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
