"""The loop that learns a context: one process, resumable at any update.

CLIP is frozen, so an update looks at the crops once, without gradients, and at the texts once, with them. In between
lie the losses: of a mean patch embedding or of class activation maps, either a smooth function of the text rows with
a first-order gradient (see ``clip.last_block``).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.clip.learned_prompts import LearnedPrompts, PromptEncoder, seed_number
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import ResolvedPrecision
from wsss_pipeline.data.masks import ignore_value
from wsss_pipeline.errors import CheckpointError, TrainingError
from wsss_pipeline.prompts.config import PromptConfig, PromptOptimisationConfig
from wsss_pipeline.prompts.losses import activation_loss, contrastive_loss
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import append_line
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.segmentation.checkpoint import TrainingState
from wsss_pipeline.segmentation.dataset import SegmentationDataset, sample_order
from wsss_pipeline.segmentation.trainer import LOG, STATE, SamplesSeen, loading, next_batch

PROMPTS = "prompts.safetensors"


class LearnedContext(nn.Module):
    """The one thing that is learned."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(initial)


class PromptObjective:
    """Losses of crops as functions of the text rows.

    Args:
        config: settings, see ``PromptConfig``.
        trunk: CLIP's vision transformer.
        logit_scale: factor on the cosine.
        num_classes: C; the other rows are the background's.
    """

    def __init__(self, config: PromptConfig, trunk: Trunk, logit_scale: float, num_classes: int) -> None:
        self._config, self._trunk = config, trunk
        self._logit_scale, self._num_classes = logit_scale, num_classes

    def __call__(self, images: Tensor, masks: Tensor, present: Tensor, rows: Tensor) -> tuple[Tensor, int]:
        """The loss of a batch, differentiable in the rows.

        Args:
            images: float32 (B, 3, S, S), normalised with CLIP's statistics.
            masks: int64 (B, S, S), ``ignore_value`` of 1+C where nothing is known; contrastive learning doesn't
                look at it.
            present: bool (B, C), classes of the images; with ``labels: mask`` it isn't looked at.
            rows: float32 (C+G, P), unit rows of classes and background; contrastive learning takes (C, P).

        Returns:
            float32 (), and the number of pairs of an image and a class that have a say in it; without any 0.
        """
        if self._config.objective == "cam" and self._config.labels == "mask":
            values = torch.arange(1, 1 + self._num_classes, device=masks.device)
            present = (masks.flatten(1)[:, None] == values[:, None]).any(dim=2)
        if self._config.objective == "contrastive":
            says_something = present.any(dim=1) & ~present.all(dim=1)
        else:
            says_something = present.any(dim=1)
        images, masks, present = images[says_something], masks[says_something], present[says_something]
        if not len(images):
            return rows.sum() * 0, 0
        with torch.no_grad():
            features = self._trunk.encode(images, last_layers=1)
        if self._config.objective == "contrastive":
            pooled = F.normalize(torch.stack([last.pooled for last in features.last]), dim=1)
            loss = contrastive_loss(self._logit_scale * pooled @ rows[: self._num_classes].T, present)
        else:
            places = [torch.nonzero(row)[:, 0].tolist() for row in present]
            background = rows[self._num_classes :]
            texts = [torch.cat([rows[own], background]) for own in places]
            counts = [len(own) for own in places]
            maps = softmax_gradcam(features, texts, counts, self._logit_scale, everything=rows)
            values_in = [[1 + place for place in own] for own in places]
            loss = activation_loss(maps, values_in, masks, ignore_value(1 + self._num_classes))
        return loss, int(present.sum())


class PromptTrainer:
    """One run, at the update where its folder says that it is.

    Args:
        config: settings of the run.
        clip: the frozen CLIP, on the device to use.
        trunk: its vision transformer.
        prompts: prompts to start from, with what they are learned for.
        dataset: samples to learn from.
        out: folder of the run.
        workers: number of processes that load samples.
        precision: type of the text tower's matrix products; those of fp16 are float32.

    Attributes:
        state: progress of the run, with all that it goes on with.

    Raises:
        CheckpointError: the run's state can't be read, or is beyond its end.
        ConfigError: a text is too long.
    """

    def __init__(
        self,
        config: PromptConfig,
        clip: Clip,
        trunk: Trunk,
        prompts: LearnedPrompts,
        dataset: SegmentationDataset,
        out: Path,
        workers: int = 0,
        precision: ResolvedPrecision = "fp32",
    ) -> None:
        self._config, self._prompts, self._dataset = config, prompts, dataset
        self._out, self._workers, self._device = out, workers, trunk.device
        self._precision = precision
        # contrastive learning doesn't look at the background
        words = prompts.background if config.objective == "cam" else ()
        texts = [*prompts.texts, *((word,) for word in words)]
        self._num_texts = len(texts)
        self._encoder = PromptEncoder(clip, texts, prompts.layout, prompts.context.shape[-2])
        self._learned = LearnedContext(prompts.context.to(self._device, copy=True))
        self._objective = PromptObjective(config, trunk, clip.logit_scale, len(prompts.texts))
        sgd = config.optimisation
        optimizer = torch.optim.SGD(
            self._learned.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay
        )
        self.state = TrainingState(self._learned, None, optimizer)
        self.state.load(out / STATE)
        if self.state.step > sgd.iterations:
            raise CheckpointError(
                f"{out / STATE} says update {self.state.step} of {sgd.iterations}; start anew with --overwrite"
            )

    def run(self) -> bool:
        """Learns to the end, or to the update in which it was asked to stop; whether the end was reached.

        Raises:
            TrainingError: the loss isn't a number, and the context before it is in the run's folder; or too many
                samples can't be used.
            OutputError: the run's folder can't be written.
        """
        config, state = self._config, self.state
        chosen, seed = config.optimisation, seed_number(config.seed)
        images_per_update = chosen.batch * chosen.accumulate
        loader = DataLoader(
            self._dataset,
            batch_size=chosen.batch,
            sampler=sample_order(len(self._dataset), seed, state.step * images_per_update),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),
        )
        unusable = SamplesSeen(config.max_unusable, len(self._dataset))
        smooth_loss = math.nan
        with (
            loading(loader) as batches,
            StopRequest() as stop,
            Progress(chosen.iterations, "updates", done=state.step) as progress,
        ):
            while state.step < chosen.iterations:
                started = time.monotonic()
                loss, pairs, damaged = self._update(batches)
                state.step += 1
                rate = state.optimizer.param_groups[0]["lr"]
                numbers = {
                    "step": state.step,
                    "loss": loss,
                    "lr": rate,
                    "pairs": pairs,
                    "seconds": time.monotonic() - started,
                    "images": images_per_update,
                    "damaged": damaged,
                }
                append_line(self._out / LOG, json.dumps(numbers))
                is_last, is_stopped = state.step == chosen.iterations, stop.requested
                unusable.count(damaged, images_per_update, is_last)
                smooth_loss = loss if math.isnan(smooth_loss) else 0.9 * smooth_loss + 0.1 * loss
                progress.advance(note=f"loss {smooth_loss:.4g}, lr {rate:.2g}", show=is_last)
                if is_last or is_stopped or state.step % config.save_every == 0:
                    self._save()
                    state.save(self._out / STATE)
                if is_stopped:
                    break
        return state.step == chosen.iterations

    def _update(self, batches: Iterator[Any]) -> tuple[float, int, int]:
        """One update out of ``accumulate`` batches: its loss, pairs that had a say, samples that can't be used."""
        chosen, optimizer = self._config.optimisation, self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.state.step, chosen)
        context = self._learned.context
        # in half precision the gradients of so small a loss would vanish; bfloat16 has float32's range
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            rows = self._encoder(context[: self._num_texts] if context.ndim == 3 else context).float()
        # the texts are the same for all batches: what each wants of them is summed, and goes back once
        at_rows = rows.detach().requires_grad_()
        total, pairs, damaged = 0.0, 0, 0
        seen: list[str] = []
        for _ in range(chosen.accumulate):
            batch = next_batch(batches)
            seen += batch["image_id"]
            usable = ~batch["damaged"]
            damaged += int(batch["damaged"].sum())
            images, masks, present = (
                batch[name][usable].to(self._device, non_blocking=True)
                for name in ("image", "mask", "present")
            )
            loss, count = self._objective(images, masks, present[:, 1:], at_rows)
            loss = loss / chosen.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total, pairs = total + float(loss.detach()), pairs + count
        if not math.isfinite(total) or not (at_rows.grad is not None and at_rows.grad.isfinite().all()):
            self._save()
            raise TrainingError(
                f"the loss or its gradient is no number at update {self.state.step + 1}; the context before it is in "
                f"{self._out / PROMPTS}, the images were {', '.join(seen)}: lower the rate with "
                "--set optimisation.lr=RATE, or try --precision fp32"
            )
        if pairs:  # else weight decay would be all that is learned
            rows.backward(at_rows.grad)  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return total, pairs, damaged

    def _save(self) -> None:
        """Write the prompts as they are; an OutputError where that can't be done."""
        replace(self._prompts, context=self._learned.context.detach().cpu()).save(self._out / PROMPTS)


def learning_rate(step: int, config: PromptOptimisationConfig) -> float:
    """Learning rate of update ``step``, counted from 0: a constant in the warm-up, then a cosine down to 0."""
    if step < config.warm_up:
        return config.warm_up_lr
    done = (step - config.warm_up) / max(1, config.iterations - config.warm_up)
    return config.lr / 2 * (1 + math.cos(math.pi * done))
