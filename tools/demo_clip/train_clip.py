"""Trains the demo's CLIP from scratch: contrastive losses on drawn scenes and their captions, nothing else.

The losses are CLIP's: of the class token and, with a small weight, of the mean patch against all captions,
and of the patches against the captions that speak of one thing or place. No pixel of the scenes' ground
truth is trained on; it only decides what a caption of a near view may say.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from tools.demo_clip.captions import write_caption
from tools.demo_clip.clip_model import build_model, embed_images, embed_texts, normalise
from tools.demo_clip.contrastive_loss import contrastive_loss, patch_similarity
from tools.demo_clip.scene_pool import ScenePool, draw_pool
from tools.demo_clip.training_batches import TrainingBatch, TrainingBatches
from tools.demo_clip.vocabulary import build_tokenizer
from tools.demo_clip.zero_shot import zero_shot_accuracy
from wsss_pipeline.errors import MissingDependencyError

logger = logging.getLogger(__name__)

LARGEST_SCALE = 100.0  # of the cosine, as in CLIP
STEPS_PER_LINE = 100


@dataclass(frozen=True)
class TrainingPlan:
    """What determines the weights.

    Attributes:
        steps, batch: how many updates, and views per update.
        scenes: how many different scenes are drawn.
        seed: of scenes, views, captions, order and initial weights.
        learning_rate: its peak, after ``warm_up`` steps; a cosine to 0 follows.
        patch_weight, pooled_weight: of the loss of the patches and of their mean, beside the class token's.
        width, layers: of the vision transformer; the text transformer has half its layers.
    """

    steps: int = 6000
    batch: int = 64
    scenes: int = 30000
    seed: int = 0
    learning_rate: float = 3e-3
    warm_up: int = 100
    weight_decay: float = 0.1
    patch_weight: float = 1.0
    pooled_weight: float = 0.1
    width: int = 128
    layers: int = 6


class Trainer:
    """Weights in float32, and a copy of them in bf16 that does the computing."""

    def __init__(self, plan: TrainingPlan, tokenizer: Any, device: torch.device) -> None:
        torch.manual_seed(plan.seed)
        self.model = build_model(tokenizer, plan.width, plan.layers).to(device).train()
        self._plan = plan
        self._tokenizer = tokenizer
        self._worker = copy.deepcopy(self.model).bfloat16()
        self._optimizers = _optimizers(self.model, plan)

    def step(self, number: int, batch: TrainingBatch) -> float:
        """One update; the loss before it."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(number, self._plan)
        with torch.no_grad():
            for master, copied in self._pairs():
                copied.copy_(master)
                copied.grad = None
        loss = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for master, copied in self._pairs():
            master.grad = None if copied.grad is None else copied.grad.float()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return loss.item()

    def _loss(self, batch: TrainingBatch) -> torch.Tensor:
        device = self.model.device
        different = list(dict.fromkeys(batch.texts))
        place = [different.index(text) for text in batch.texts]
        texts = embed_texts(self._worker, self._tokenizer, different)[place]
        images = embed_images(self._worker, normalise(batch.images).to(device, torch.bfloat16))
        truth = torch.from_numpy(batch.truth).to(device, torch.float32)
        single = torch.from_numpy(batch.single).to(device)
        scale = self._worker.logit_scale.float().exp()
        plan = self._plan
        whole = contrastive_loss(images.whole @ texts.T, truth, scale)
        pooled = contrastive_loss(images.pooled @ texts.T, truth, scale)
        patches = contrastive_loss(patch_similarity(images.patches, texts[single]), truth[:, single], scale)
        return whole + plan.pooled_weight * pooled + plan.patch_weight * patches

    def _pairs(self) -> zip[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.model.parameters(), self._worker.parameters(), strict=True)


def _optimizers(model: Any, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (Jordan et al., 2024), AdamW at half its rate for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise MissingDependencyError(f"training needs torch 2.9 or newer, this is {torch.__version__}")
    inside: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_inside = parameter.ndim == 2 and ".layers." in name
        (inside if is_inside else decayed if parameter.ndim > 1 else others).append(parameter)
    rate, decay = plan.learning_rate, plan.weight_decay
    adam = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": decay, "peak": rate / 2},
            {"params": others, "weight_decay": 0.0, "peak": rate / 2},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = torch.optim.Muon(
        [{"params": inside, "peak": rate}], weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adam, muon]


def _schedule(step: int, plan: TrainingPlan) -> float:
    if step < plan.warm_up:
        return (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def train(
    out: Path, plan: TrainingPlan, device: torch.device, workers: int = 1, save_every: int = 500
) -> list[float]:
    """Draws the scenes, trains, writes the folder ``out`` now and then and at the end; the losses.

    Args:
        workers: processes that make batches, beside this one; 0 makes them in between.
    """
    started = time.monotonic()
    pool = draw_pool(plan.seed, plan.scenes, os.cpu_count() or 1)
    logger.info("%d scenes drawn in %.0f s", plan.scenes, time.monotonic() - started)
    tokenizer = build_tokenizer(_captions(pool, plan.seed), length=77)
    batches = TrainingBatches(pool, plan.seed, plan.steps, plan.batch)
    trainer = Trainer(plan, tokenizer, device)
    losses: list[float] = []
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    for step, batch in enumerate(loader):
        losses.append(trainer.step(step, batch))
        if (step + 1) % STEPS_PER_LINE == 0:
            loss, scale = float(np.mean(losses[-STEPS_PER_LINE:])), trainer.model.logit_scale.exp().item()
            seconds = time.monotonic() - started
            logger.info("step %d: loss %.3f, scale %.1f, %.0f s", step + 1, loss, scale, seconds)
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            save(trainer.model, tokenizer, out)
    accuracy = measure(trainer.model, tokenizer, plan.seed + 1)
    logger.info("zero-shot accuracy on fresh scenes of one object: %.1f %%", 100 * accuracy)
    return losses


def _as_it_is(batch: Any) -> Any:
    return batch


def _captions(pool: ScenePool, seed: int, count: int = 5000) -> list[str]:
    """Texts for the vocabulary to be learnt from."""
    rng = np.random.default_rng(seed)
    contents = (pool.contents[index] for index in rng.integers(len(pool), size=count))
    return [write_caption(objects, backgrounds, rng).text for objects, backgrounds, _ in contents]


@torch.no_grad()
def measure(model: Any, tokenizer: Any, seed: int, count: int = 500) -> float:
    """Zero-shot accuracy on scenes of ``seed``, with the class token as CLIP has it."""
    model.eval()
    accuracy = zero_shot_accuracy(
        lambda images: embed_images(model, normalise(images).to(model.device)).whole.cpu(),
        lambda texts: embed_texts(model, tokenizer, texts).cpu(),
        seed,
        count,
    )
    model.train()
    return accuracy


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes a folder that ``transformers`` loads: config, fp16 weights, vocabulary."""
    shipped = copy.deepcopy(model).half()
    shipped.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
