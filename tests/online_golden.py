"""What the tests against published training steps of WeCLIP and ExCEL share: their CLIP, decoder, texts, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from tests.segmentation.published_decoder import own_name, renamed
from wsss_pipeline.clip import learned_prompts
from wsss_pipeline.clip.attributes import enriched
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.masks import CERTAIN
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, normalise
from wsss_pipeline.methods import excel, load_mask_config, load_method
from wsss_pipeline.refine import load_refiner
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import TrainConfig, load_train_config

GOLDEN = Path(__file__).parent / "golden"
LOGIT_SCALE = 4.60546875  # of a vision tower that lies alone


@dataclass(frozen=True)
class Published:
    """A system with the weights and texts of its published numbers.

    Attributes:
        folder: its golden files.
        method: maker of CAMs.
        network: its decoder on its CLIP.
        target: both together, as in training.
        config: settings of its recipe.
    """

    folder: Path
    method: Any
    network: FrozenClip
    target: OnlineTarget
    config: TrainConfig

    def golden(self, name: str) -> dict[str, Tensor]:
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: torch.from_numpy(value) for key, value in file.items() if value.dtype.kind in "fui"}

    def step(
        self, crops: Tensor, present: list[list[int]], update: int, pseudo: Tensor | None = None
    ) -> Step:
        """Losses and gradients of one update; with the pseudo masks given, if any."""
        network = self.network.train()
        network.zero_grad()
        images = torch.stack([pixels(crop) for crop in crops])
        outputs = network.training_outputs(images, **self.method.encoding)
        nothing = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
        maps = self.method.cams(outputs["encoded"].features, present)
        mask, confidence = self.target(images, outputs, present, nothing, update)
        if pseudo is not None:
            mask, confidence = pseudo.long(), torch.full_like(confidence, CERTAIN)
        losses = weighted_losses(outputs, mask, confidence, self.config, update, lambda sums: sums)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
        network.eval()
        return Step(
            outputs, mask, {name: float(loss.detach()) for name, loss in losses.items()}, gradients, maps
        )


@dataclass(frozen=True)
class Step:
    outputs: Mapping[str, Any]
    mask: Tensor
    losses: Mapping[str, float]
    gradients: Mapping[str, Tensor]
    static: list[Tensor]


def pixels(crop: Tensor) -> Tensor:
    return normalise(crop.numpy(), IMAGENET_STATISTICS)


def published(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path | None = None,
    clip_folder: Path = GOLDEN / "vision",
) -> Published:
    """WeCLIP or ExCEL for VOC, its decoder without dropout; of the small set where no folders are given."""
    folder = folder or GOLDEN / name
    vision: Any = CLIPVisionModelWithProjection.from_pretrained(clip_folder, dtype=torch.float32)
    texts = dict(np.load(folder / "text.npz"))
    if name == "weclip":
        vision.load_state_dict(load_file(folder / "query_bias.safetensors"), strict=False)
        foreground, background = (torch.from_numpy(texts[key]) for key in ("voc_fg", "voc_bg"))
    else:
        rows = torch.from_numpy(texts["voc_text"])
        foreground, background = enriched(rows[:20], torch.from_numpy(texts["voc_bank"].T)), rows[20:]
    scale = load_file(clip_folder / "model.safetensors").get("logit_scale", LOGIT_SCALE)
    clip = Clip(vision.requires_grad_(False).eval(), SimpleNamespace(), None, float(np.exp(float(scale))))
    for module in (excel, learned_prompts):
        monkeypatch.setattr(module, "class_embeddings", lambda *_: ClassEmbeddings(foreground, background))
        monkeypatch.setattr(module, "TextEncoder", lambda *_: SimpleNamespace(encode=None))
    attributes = ["excel.attributes=none"] if name == "excel" else []
    settings = load_mask_config(f"{name}/voc12", overrides=["clip.weights=demo", *attributes])
    method: Any = load_method(name)(settings, clip, load_class_set("voc12"), "fp32")
    tensors = renamed(load_file(folder / "decoder.safetensors"))
    width = len(tensors["model.fusion.fuse.bias"])
    overrides = [f"network.frozen.width={width}", "network.frozen.dropout=0"]
    config = load_train_config(f"{name}/voc12", overrides=overrides)
    network = FrozenClip(config.network.frozen, 21, clip).eval()
    network.load_state_dict(tensors)
    target = OnlineTarget(
        method, load_refiner(settings, "par"), config.online, network.image_mean, network.image_std
    )
    return Published(folder, method, network, target, config)


def largest(found: Tensor, expected: Tensor, relative: bool = False) -> float:
    assert found.shape == expected.shape
    difference = float((found.detach().double() - expected.double()).abs().max())
    return difference / float(expected.double().abs().max()) if relative else difference


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of the pixels."""
    assert found.shape == expected.shape
    return float((found.long() != expected.long()).double().mean())


def gradient_differences(step: Step, golden: Mapping[str, Tensor]) -> tuple[float, float, int]:
    """Largest relative differences of the norms and of the stored gradients, and how many norms there are."""
    norms = {key.partition("/")[2]: value for key, value in golden.items() if key.startswith("norm/")}
    whole = {key.partition("/")[2]: value for key, value in golden.items() if key.startswith("grad/")}
    by_norm = [
        abs(float(step.gradients[own_name(name)].norm()) / float(value) - 1) for name, value in norms.items()
    ]
    by_value = [
        largest(step.gradients[own_name(name)].reshape(value.shape), value, relative=True)
        for name, value in whole.items()
    ]
    assert whole
    return max(by_norm), max(by_value), len(norms)
