"""The training loop: one process or many (accelerate), resumable at any update."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from wsss_pipeline.errors import TrainingError
from wsss_pipeline.segmentation.checkpoint import not_written, save_network
from wsss_pipeline.segmentation.dataset import EpochSampler, SegmentationDataset
from wsss_pipeline.segmentation.losses import confidence_weights, segmentation_loss
from wsss_pipeline.segmentation.networks import SegmentationNetwork
from wsss_pipeline.segmentation.train_config import OptimisationConfig, TrainConfig
from wsss_pipeline.segmentation.training_state import TrainingProgress, load_state, save_state

LAST, BEST, STATE, NAN, LOG = "last", "best", "state", "nan", "log.jsonl"


@dataclass(frozen=True)
class TrainingHooks:
    """What the loop calls.

    ``validate``: mIoU of a network in evaluation mode, or None where there's no ground truth. ``stop``: whether
    to save and stop after this update. ``log``: gets each update's numbers.
    """

    validate: Callable[[SegmentationNetwork], float] | None
    stop: Callable[[], bool]
    log: Callable[[dict[str, Any]], None]


class _TrainingForward(nn.Module):
    """Distributed training sees ``forward`` alone, so the training outputs have to be it."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.training_outputs(images)


class Trainer:
    """One training run.

    Args:
        accelerator: of this process; knows device, precision and the other processes.
        config: see there.
        network: with the weights to start from.
        dataset: what to train on.
        class_names: of mask values 1..C, for the checkpoints.
        out: folder of the run.
        workers: processes that load samples.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        network: SegmentationNetwork,
        dataset: SegmentationDataset,
        class_names: tuple[str, ...],
        out: Path,
        workers: int = 0,
    ) -> None:
        self._accelerator = accelerator
        self._config = config
        self._network = network.to(accelerator.device).train()
        self._dataset = dataset
        self._class_names = class_names
        self._out = out
        self._workers = workers
        groups = network.parameter_groups(
            config.optimisation.lr, config.optimisation.weight_decay, config.optimisation.head_lr_factor
        )
        for group in groups:
            group["peak"] = group["lr"]
        self._optimizer = _optimizer(groups, config.optimisation)
        decay = config.optimisation.ema
        self._average = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
            if decay
            else None
        )
        torch.manual_seed(config.seed)
        self._progress = (
            load_state(out / STATE, network, self._average, self._optimizer) or TrainingProgress()
        )
        self._forward, self._prepared = accelerator.prepare(_TrainingForward(network), self._optimizer)

    @property
    def progress(self) -> TrainingProgress:
        """How far the run is."""
        return self._progress

    @property
    def _images_per_update(self) -> int:
        optimisation = self._config.optimisation
        return optimisation.batch * optimisation.accumulate * int(self._accelerator.num_processes)

    def run(self, hooks: TrainingHooks) -> bool:
        """Trains to the end or until ``hooks.stop``; whether the end was reached.

        Raises:
            TrainingError: the loss isn't a number; the network as it was is in the run's folder ``nan``.
        """
        config, progress = self._config, self._progress
        batches = self._batches()
        while progress.step < config.optimisation.iterations:
            started = time.monotonic()
            loss, damaged = self._update(batches)
            progress.step += 1
            ended = progress.step == config.optimisation.iterations
            numbers = {
                "step": progress.step,
                "loss": loss,
                "lr": self._optimizer.param_groups[0]["lr"],
                "seconds": time.monotonic() - started,
                "images": self._images_per_update,
                "damaged": damaged,
            }
            if hooks.validate is not None and (ended or progress.step % config.validate_every == 0):
                numbers["miou"] = self._validate(hooks.validate)
            self._log(numbers, hooks)
            stop = hooks.stop()
            if ended or stop or progress.step % config.save_every == 0:
                self._save()
            if stop:
                break
        return progress.step == config.optimisation.iterations

    def _update(self, batches: Iterator[Any]) -> tuple[float, int]:
        """One update out of ``accumulate`` batches; mean loss and number of samples that couldn't be used."""
        optimisation, accelerator = self._config.optimisation, self._accelerator
        share = schedule(self._progress.step, optimisation)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        total, damaged, seen = 0.0, 0, []
        for part in range(optimisation.accumulate):
            batch = next(batches)
            seen += batch["image_id"]
            damaged += int(batch["damaged"].sum())
            is_last = part == optimisation.accumulate - 1
            with nullcontext() if is_last else accelerator.no_sync(self._forward):
                loss = self._loss(batch)
                accelerator.backward(loss * accelerator.num_processes / optimisation.accumulate)
            total += float(accelerator.reduce(loss.detach(), "sum")) / optimisation.accumulate
        if not math.isfinite(total):
            self._stop_at_nan(total, seen)
        if optimisation.clip_norm:
            accelerator.clip_grad_norm_(self._forward.parameters(), optimisation.clip_norm)
        self._prepared.step()
        self._prepared.zero_grad()
        if self._average is not None:
            self._average.update_parameters(self._network)
        return total, damaged

    def _loss(self, batch: Any) -> Tensor:
        """This process's part of the mean over all processes' pixels."""
        device, loss = self._accelerator.device, self._config.loss
        images = batch["image"].to(device, non_blocking=True)
        target = batch["mask"].to(device, non_blocking=True)
        confidence = batch["confidence"].to(device, non_blocking=True)
        with self._accelerator.autocast():
            outputs = self._forward(images)
        weights = confidence_weights(confidence, loss.confidence, loss.min_confidence)
        return segmentation_loss(
            outputs,
            target,
            weights,
            balanced=loss.balanced,
            total=lambda sums: self._accelerator.reduce(sums, "sum"),
        )

    def _batches(self) -> Iterator[Any]:
        optimisation, accelerator = self._config.optimisation, self._accelerator
        sampler = EpochSampler(
            len(self._dataset),
            self._config.seed,
            self._progress.step * self._images_per_update,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return iter(
            DataLoader(
                self._dataset,
                batch_size=optimisation.batch,
                sampler=sampler,
                num_workers=self._workers,
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator(),  # or it would draw from the numbers that dropout uses
            )
        )

    def _evaluated(self) -> SegmentationNetwork:
        """The network to keep: the averaged one where there is one."""
        return self._average.module if self._average is not None else self._network  # type: ignore[return-value]

    def _validate(self, validate: Callable[[SegmentationNetwork], float]) -> float:
        network, progress = self._evaluated(), self._progress
        miou = 0.0
        if self._accelerator.is_main_process:
            miou = validate(network.eval())
            network.train()
            if progress.best_miou is None or miou > progress.best_miou:
                progress.best_miou = miou
                self._save_network(BEST, miou=miou)
        self._accelerator.wait_for_everyone()
        return miou

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            self._save_network(LAST)
            save_state(self._out / STATE, self._network, self._average, self._optimizer, self._progress)
        self._accelerator.wait_for_everyone()

    def _save_network(self, name: str, **extra: Any) -> None:
        extra = {"step": self._progress.step, **extra}
        save_network(self._evaluated(), self._out / name, self._config.network, self._class_names, extra)

    def _stop_at_nan(self, loss: float, image_ids: list[str]) -> None:
        step = self._progress.step + 1
        if self._accelerator.is_main_process:
            self._save_network(NAN, image_ids=image_ids)
        raise TrainingError(
            f"the loss is {loss} at update {step}; the network before it is in {self._out / NAN}, the images were "
            f"{', '.join(image_ids)}: lower the rate (--lr), or try --balanced or --set optimisation.clip_norm=1"
        )

    def _log(self, numbers: dict[str, Any], hooks: TrainingHooks) -> None:
        self._accelerator.log({k: v for k, v in numbers.items() if k != "step"}, step=numbers["step"])
        if self._accelerator.is_main_process:
            try:
                with (self._out / LOG).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(numbers) + "\n")
            except OSError as error:
                raise not_written(str(self._out / LOG), error) from error
            hooks.log(numbers)


def schedule(step: int, config: OptimisationConfig) -> float:
    """Share of the peak learning rate at update ``step``, counted from 0.

    Linear warm-up; then ``poly``: (1 - done)^power (Chen et al., "DeepLab", section 4.1), or ``cosine``.
    """
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    done = (step - config.warm_up) / max(1, config.iterations - config.warm_up)
    if config.schedule == "poly":
        return float((1 - done) ** config.power)
    return 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(groups: list[dict[str, Any]], config: OptimisationConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)
