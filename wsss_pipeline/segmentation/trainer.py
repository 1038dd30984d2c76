"""The training loop: one process or many (accelerate), resumable at any update."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from wsss_pipeline.data.masks import ignore_value
from wsss_pipeline.errors import CheckpointError, TrainingError, WsssError
from wsss_pipeline.runtime.interrupts import SIGNALS, StopRequest
from wsss_pipeline.runtime.output import append_line, one_line
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.segmentation.checkpoint import BEST, LAST, TrainingState, save_network
from wsss_pipeline.segmentation.dataset import SegmentationDataset, sample_order
from wsss_pipeline.segmentation.losses import confidence_weights
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import OptimisationConfig, TrainConfig
from wsss_pipeline.segmentation.weakclip_losses import Pictures

SAMPLES_TO_JUDGE = 100  # before the share of those that can't be used is held against its bound
UPDATES_IN_VAIN = 10
STATE, NAN, LOG = "state", "nan", "log.jsonl"


def _leave_signals_to_the_trainer(worker: int) -> None:
    # a terminal and a scheduler tell all processes to stop; without its samples the trainer couldn't finish an update
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _TrainingForward(nn.Module):
    """Distributed training sees ``forward`` alone, so the training outputs have to be it."""

    def __init__(self, network: SegmentationNetwork, wanted: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.wanted = network, wanted

    def forward(self, images: Tensor) -> dict[str, Any]:
        return self.network.training_outputs(images, **self.wanted)


class Trainer:
    """One training run, at the update where its folder says that it is.

    Args:
        accelerator: accelerator of this process; knows device, precision and the other processes.
        config: settings of the run.
        network: network with the weights to start from.
        dataset: samples to train on.
        out: folder of the run.
        workers: number of processes that load samples.
        online: maker of the targets, where the samples have image-level labels alone.

    Attributes:
        state: progress of the run, with all that it goes on with.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        network: SegmentationNetwork,
        dataset: SegmentationDataset,
        out: Path,
        workers: int = 0,
        online: OnlineTarget | None = None,
    ) -> None:
        self._online = online
        self._accelerator = accelerator
        self._config = config
        self._network = network.to(accelerator.device).train()
        self._dataset = dataset
        self._out = out
        self._workers = workers
        chosen = config.optimisation
        self._images_per_update = chosen.batch * chosen.accumulate * accelerator.num_processes
        groups = network.parameter_groups(chosen.lr, chosen.weight_decay, chosen.head_lr_factor)
        for group in groups:
            group["peak"] = group["lr"]
        optimizer: torch.optim.Optimizer
        if chosen.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.momentum)
        else:
            # one pass over the weights in place of five, where memory is what an update waits for
            is_fused = accelerator.device.type == "cpu"
            optimizer = torch.optim.AdamW(groups, lr=chosen.lr, fused=is_fused or None)
        average = None
        if chosen.ema:
            decay = get_ema_multi_avg_fn(chosen.ema)  # type: ignore[no-untyped-call]
            average = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
        torch.manual_seed(config.seed)
        self.state = TrainingState(network, average, optimizer, accelerator.scaler)
        self.state.load(out / STATE)
        if self.state.step > chosen.iterations:
            raise CheckpointError(
                f"{out / STATE} says update {self.state.step} of {chosen.iterations}; start anew with --overwrite"
            )
        if self.state.best_miou is not None and not (out / BEST).is_dir():
            raise CheckpointError(
                f"{out} lacks its best network, which {STATE} speaks of; start anew with --overwrite"
            )
        forward = _TrainingForward(network, {} if online is None else online.method.encoding)
        self._forward, self._optimizer = accelerator.prepare(forward, optimizer)

    def run(self, validate: Callable[[SegmentationNetwork], float] | None = None) -> bool:
        """Trains to the end, or to the update in which any of the processes was asked to stop.

        Args:
            validate: mIoU in [0, 1] of a network in evaluation mode; called in all processes, and has the same
                result in each. None where there is no ground truth.

        Returns:
            Whether the end was reached.

        Raises:
            TrainingError: the loss isn't a number, and the network as it was is in the run's folder ``nan``; or too
                many samples can't be used, or no pixel is certain enough to count.
            OutputError: the run's folder can't be written.
        """
        config, state, accelerator = self._config, self.state, self._accelerator
        updates, log = config.optimisation.iterations, self._out / LOG
        progress = Progress(updates, "updates", done=state.step)
        smooth_loss, miou, updates_here, seconds_here = math.nan, "", 0, 0.0
        passed, rank = state.step * self._images_per_update, accelerator.process_index
        loader = DataLoader(
            self._dataset,
            batch_size=config.optimisation.batch,
            sampler=sample_order(len(self._dataset), config.seed, passed, rank, accelerator.num_processes),
            num_workers=self._workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the numbers that dropout uses
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        seen = SamplesSeen(
            config.max_unusable, len(self._dataset), config.loss.threshold, has_learnt=state.step > 0
        )
        with (
            loading(loader) as batches,
            StopRequest() as stop,
            progress if accelerator.is_main_process else nullcontext(),
        ):
            while state.step < updates:
                started = time.monotonic()
                losses, damaged, counted, is_stopped = self._update(batches, stop.requested)
                state.step += 1
                loss = sum(losses.values())
                parts = {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
                numbers = {
                    "step": state.step,
                    "loss": loss,
                    **parts,
                    "lr": self._optimizer.param_groups[0]["lr"],
                    "seconds": time.monotonic() - started,
                    "images": self._images_per_update,
                    "damaged": damaged,
                }
                is_last = state.step == updates
                try:
                    seen.count(damaged, self._images_per_update, is_last, counted)
                except TrainingError:
                    if seen.has_learnt:
                        self._save_all()
                    raise
                if validate is not None and (is_last or state.step % config.validate_every == 0):
                    numbers["miou"] = self._validate(validate)
                    miou = f", mIoU {100 * numbers['miou']:.2f} %"
                accelerator.log({k: v for k, v in numbers.items() if k != "step"}, step=state.step)
                if accelerator.is_main_process:
                    append_line(log, json.dumps(numbers))
                    smooth_loss = 0.9 * smooth_loss + 0.1 * loss if updates_here else loss
                    updates_here, seconds_here = updates_here + 1, seconds_here + numbers["seconds"]
                    rate = updates_here * self._images_per_update / max(1e-9, seconds_here)
                    note = f"loss {smooth_loss:.3f}, lr {numbers['lr']:.2g}, {rate:.3g} images/s{miou}"
                    progress.advance(note=note, show=is_last or "miou" in numbers)
                if is_last or is_stopped or state.step % config.save_every == 0:
                    self._save_all()
                if is_stopped:
                    break
        return state.step == updates

    def _update(self, batches: Iterator[Any], stop: bool) -> tuple[dict[str, float], int, int, bool]:
        """One update out of ``accumulate`` batches of this process, which was asked to ``stop`` or not.

        Returns:
            Mean losses by name, number of samples that couldn't be used, number of pixels that have a label and a
            weight, and whether to stop, of all processes together.
        """
        accelerator, chosen = self._accelerator, self._config.optimisation
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(group["peak"], self.state.step, chosen)
        # of samples that can't be used, of requests to stop, of pixels that count, of each loss
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        seen: list[str] = []
        for part in range(chosen.accumulate):
            batch = next_batch(batches)
            seen += batch["image_id"]
            is_last = part == chosen.accumulate - 1
            with nullcontext() if is_last else accelerator.no_sync(self._forward):
                losses, counted = self._losses(batch)
                loss = torch.stack(list(losses.values())).sum() / chosen.accumulate
                # distributed training takes the mean of the processes' gradients
                accelerator.backward(loss * accelerator.num_processes)
            if not part:
                sums = torch.cat([sums, sums.new_zeros(len(losses))])
            sums[0] += int(batch["damaged"].sum())
            sums[2] += counted
            sums[3:] += torch.stack(list(losses.values())).detach() / chosen.accumulate
        sums[1] = float(stop)
        # a signal may reach one process alone, but they have to stop at the same update
        damaged, stops, pixels, *values = accelerator.reduce(sums, "sum").tolist()
        total = sum(values)
        if not math.isfinite(total):
            self._save_network(NAN, image_ids=seen)
            raise TrainingError(
                f"the loss is {total} at update {self.state.step + 1}; the network before it is in "
                f"{self._out / NAN}, the images were {', '.join(seen)}: lower the rate (--lr), or try --balanced or "
                "--set optimisation.clip_norm=1"
            )
        if chosen.clip_norm:
            accelerator.clip_grad_norm_(self._forward.parameters(), chosen.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.state.average is not None:
            self.state.average.update_parameters(self._network)
        return dict(zip(losses, values, strict=True)), int(damaged), int(pixels), stops > 0

    def _losses(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """This process's part of each mean over all processes' pixels, and how many of its own count in them."""
        accelerator, update, chosen = self._accelerator, self.state.step + 1, self._config.loss
        ignore = ignore_value(batch["present"].shape[1])
        images, target, confidence = (
            batch[name].to(accelerator.device, non_blocking=True) for name in ("image", "mask", "confidence")
        )
        usable = torch.nonzero(~batch["damaged"])[:, 0].tolist()
        if usable and len(usable) < len(images):
            # a copy of another picture, without its labels: batch norm sees nothing that doesn't belong there
            images = images[[place if place in usable else usable[0] for place in range(len(images))]]
        with accelerator.autocast():
            outputs = self._forward(images)
        if self._online is not None:
            present = [torch.nonzero(row)[:, 0].tolist() for row in batch["present"]]
            target, confidence = self._online(images, outputs, present, target == ignore, update)
        mean, std, device = self._network.image_mean, self._network.image_std, accelerator.device
        counted, present = ~batch["damaged"].to(device), batch["present"].to(device)
        pictures = Pictures(images, mean, std, present, counted)
        weights = confidence_weights(confidence, chosen.confidence, chosen.threshold)
        losses = weighted_losses(
            outputs, target, confidence, self._config, update, accelerator.reduce, pictures
        )
        return losses, ((target != ignore) & (weights > 0)).sum()

    def _validate(self, validate: Callable[[SegmentationNetwork], float]) -> float:
        network, state = self._kept(), self.state
        if self._accelerator.num_processes > 1:
            broadcast(list(network.buffers()))  # batch norm's statistics are of each process's own images
        miou = validate(network.eval())
        network.train()
        if state.best_miou is None or miou > state.best_miou:
            state.best_miou = miou
            self._save_network(BEST, miou=miou)
        return miou

    def _kept(self) -> SegmentationNetwork:
        """The network of validation and checkpoints: the averaged one where there is one."""
        average = self.state.average
        return self._network if average is None else average.module  # type: ignore[return-value]

    def _save_all(self) -> None:
        """The network as it is, and all that the run goes on with."""
        self._save_network(LAST)
        if self._accelerator.is_main_process:
            self.state.save(self._out / STATE)
        self._accelerator.wait_for_everyone()

    def _save_network(self, name: str, **extra: Any) -> None:
        if self._accelerator.is_main_process:
            names, step = self._dataset.masks.class_names, self.state.step
            save_network(self._kept(), self._out / name, self._config.network, names, {"step": step, **extra})


class SamplesSeen:
    """Ends a training that sees too little, before it ends well on nothing.

    Args:
        largest_share: share of the samples that may be unusable.
        images: number of images of the data set.
        min_confidence: what a pixel's confidence must reach to count, for the message.
        has_learnt: whether a pixel counted before.

    Attributes:
        has_learnt: whether any pixel has counted by now.
    """

    def __init__(
        self, largest_share: float, images: int, min_confidence: float = 0, *, has_learnt: bool = False
    ) -> None:
        self._largest_share, self._min_confidence = largest_share, min_confidence
        self._judged_from = min(images, SAMPLES_TO_JUDGE)
        self._samples = self._unusable = self._updates_in_vain = 0
        self._empty_updates = self._empty_samples = 0
        self.has_learnt = has_learnt

    def count(self, unusable: int, samples: int, is_last: bool, counted: int = 1) -> None:
        """Count the samples of an update, and its pixels that count; a TrainingError where training is of no use."""
        self._samples, self._unusable = self._samples + samples, self._unusable + unusable
        self.has_learnt = self.has_learnt or counted > 0
        self._empty_updates = 0 if counted else self._empty_updates + 1
        self._empty_samples = 0 if counted else self._empty_samples + samples
        self._updates_in_vain = self._updates_in_vain + 1 if unusable == samples else 0
        is_judged = is_last or self._samples >= self._judged_from
        if is_judged and self._unusable > self._largest_share * self._samples:
            reason = f"{self._unusable:,} of {self._samples:,} samples couldn't be used"
            remedy = f", or allow more than {self._largest_share:.0%} with --set max_unusable=SHARE"
        elif self._updates_in_vain >= UPDATES_IN_VAIN or (is_last and self._unusable == self._samples):
            reason, remedy = f"the last {self._updates_in_vain} updates had no sample that could be used", ""
        elif (is_last and not self.has_learnt) or (
            self._empty_updates >= UPDATES_IN_VAIN and self._empty_samples >= self._judged_from
        ):
            raise TrainingError(
                f"the last {self._empty_updates} updates had no pixel that counts: none has a label as certain as "
                f"--min-confidence {self._min_confidence:g} (loss.min_confidence); lower it, or make the masks anew"
            )
        else:
            return
        raise TrainingError(
            f"{reason}, as each is warned of above: mend the images or their masks, and run the same command{remedy}"
        )


@contextmanager
def loading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The batches of a loader, whose processes end with the block."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        # an error holds on to the frames in which they are known, and what is deaf to signals would be waited for
        # without end when the interpreter exits; torch has no public name for it
        getattr(batches, "_shutdown_workers", lambda: None)()


def next_batch(batches: Iterator[Any]) -> Any:
    """The next batch, with one line for what the processes that load it die of."""
    try:
        return next(batches)
    except WsssError as error:  # torch puts the traceback of the other process in front
        raise type(error)(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
    except (OSError, RuntimeError) as error:
        reason = _loading_failed(str(error))
        if reason is None:
            raise
        raise TrainingError(reason) from error


# as torch and Linux put it that /dev/shm has no room: on being asked for, and on being written to
_SHARED_MEMORY_IS_FULL = ("allocate shared memory", "unable to write to file </torch", "signal: Bus error")


def _loading_failed(text: str) -> str | None:
    """Why samples can't be had from other processes, of torch's words for it; None where these say something else."""
    cause = text.strip().splitlines()[-1] if text.strip() else ""
    if "Too many open files" in cause:
        return f"too many open files ({one_line(cause)[:200]}): raise the limit (ulimit -n 4096), or give --workers 0"
    if any(words in text for words in _SHARED_MEMORY_IS_FULL):
        return (
            "shared memory (/dev/shm) is full: load samples in the training process with --workers 0, or give more "
            "of it (docker run --shm-size=2g)"
        )
    if "shared memory" in cause or ("DataLoader worker" in text and "is killed" in text):
        return (
            f"a process that loads samples died ({one_line(cause)[:200]}): give fewer --workers, or more memory; "
            "--workers 0 loads in the training process"
        )
    return None


def learning_rate(peak: float, step: int, config: OptimisationConfig) -> float:
    """Rate of parameters at update ``step``, counted from 0.

    With ``cosine-total`` it goes from ``peak`` to ``min_lr``, downwards or upwards: the published WeakCLIP gives what
    it means to freeze the peak 0.
    """
    if config.schedule != "cosine-total":
        return peak * schedule(step, config)
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.iterations))
    return (config.min_lr + (peak - config.min_lr) * cosine) * _warm_up_of_a_millionth(step, config)


def _warm_up_of_a_millionth(step: int, config: OptimisationConfig) -> float:
    """Factor of the warm-up that begins at a millionth."""
    return 1 - (1 - step / config.warm_up) * (1 - 1e-6) if step < config.warm_up else 1.0


def schedule(step: int, config: OptimisationConfig) -> float:
    """Share of the peak learning rate at update ``step``, counted from 0.

    Linear warm-up; then ``poly``: (1 - done)^power (Chen et al., "DeepLab", section 4.1), or ``cosine``. With
    ``poly-total``, as the published code of WeCLIP and ExCEL has it, the first update's rate is a millionth, and the
    warm-up's updates count among those over which it falls.
    """
    if config.schedule == "poly-total":
        if step < config.warm_up:
            return _warm_up_of_a_millionth(step, config)
        return float((1 - step / config.iterations) ** config.power)
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    done = (step - config.warm_up) / max(1, config.iterations - config.warm_up)
    if config.schedule == "poly":
        return float((1 - done) ** config.power)
    return 0.5 * (1 + math.cos(math.pi * done))
