"""Speed of one training step of WeCLIP or ExCEL, part by part.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.online --method weclip|excel --phase early|late [--repeats 3]
        [--device cuda]

A CLIP ViT-B/16 and a decoder 256 wide with seeded random weights and no dropout, texts of random unit rows, smooth
random crops of 320x320 with 1 to 3 labels each: speed doesn't depend on what they mean. *plain* is the step of
``plain_online.py``, checked first against the published code's outputs; *ours* that of ``wsss train-seg --online``,
in float32, and with matrix products in bfloat16. The losses of all are printed. The phase ``late`` is that with the
decoder's affinity, of ExCEL also with the guide. The optimiser isn't part of it. The ways take turns within one run,
so what else the machine does hits all alike; the first call of each warms up. Seconds a step: the median, and the
range of the whole step. Of ours, the affinity is part of the CAM.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from benchmarks.plain_online import (
    AFFINITY,
    CAM,
    DECODER,
    EARLY,
    ENCODER,
    LATE,
    LOGIT_SCALE,
    LVC,
    PAR,
    Classes,
    Decoder,
    ExcelStep,
    Seconds,
    WeclipStep,
    assemble,
    check,
    grid_of,
    normalised,
    pseudo_mask,
    size_of,
    step,
    transition,
)
from tests.segmentation.published_decoder import renamed
from wsss_pipeline.clip import learned_prompts
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.clip.trunk import Features
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.methods import excel, load_mask_config, load_method
from wsss_pipeline.refine import load_refiner
from wsss_pipeline.segmentation.dino import Dino
from wsss_pipeline.segmentation.frozen_clip import Encoded, FrozenClip
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import TrainConfig, load_train_config

SIDE, CLASSES, BACKGROUND = 320, 20, 25
PARTS = (ENCODER, CAM, AFFINITY, PAR, DECODER)
Run = Callable[[], tuple[Seconds, float]]  # one step, with what each part of it took and its loss


@dataclass
class Setting:
    """What every way is given.

    Attributes:
        method: ``weclip``, ``excel`` or ``weclip-plus``.
        gated: the phase in which the decoder's affinity counts.
        vision: CLIP, frozen.
        texts: unit rows (T, P), those of the classes first.
        decoder: in training mode, without dropout.
        images: (B, 3, H, W), normalised.
        labels: each image's classes, from 0.
    """

    method: str
    gated: bool
    vision: Any
    texts: Tensor
    decoder: Decoder
    images: Tensor
    labels: Sequence[Classes]


def seeded_vision() -> Any:
    """A vision tower of ViT-B/16."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=16,
        image_size=224,
        projection_dim=512,
    )
    vision: Any = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    for name, parameter in vision.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.mul_(6)  # sharp attention, as trained models have it
    return vision


def setting(method: str, phase: str, batch: int, device: str, vision: Any, side: int = SIDE) -> Setting:
    """Seeded; ``vision``: CLIP's tower, frozen."""
    torch.manual_seed(0)
    config = vision.config
    texts = F.normalize(torch.randn(CLASSES + BACKGROUND, config.projection_dim), dim=1)
    layers = config.num_hidden_layers - (method != "excel")
    decoder = Decoder(layers, config.hidden_size, classes=1 + CLASSES, dropout=0.0).train()
    coarse = torch.rand(batch, 3, 12, 12) * 255
    crops = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)
    labels = [sorted(torch.randperm(CLASSES)[: 1 + index % 3].tolist()) for index in range(batch)]
    images = normalised(crops.permute(0, 2, 3, 1).numpy()).to(device)
    vision, texts, decoder = vision.to(device), texts.to(device), decoder.to(device)
    return Setting(method, phase == LATE, vision, texts, decoder, images, labels)


def plain(given: Setting) -> Run:
    """The published way."""
    if given.method == "weclip-plus":
        return plain_plus(given)
    kind = WeclipStep if given.method == "weclip" else ExcelStep
    method = kind(given.vision, given.texts, CLASSES, given.decoder)
    late = LATE if given.method == "weclip" else LVC

    def run() -> tuple[Seconds, float]:
        seconds = Seconds()
        found = step(method, given.images, given.labels, late if given.gated else EARLY, seconds)
        return seconds, float(found.total.detach())

    return run


def plain_plus(given: Setting) -> Run:
    """That of WeCLIP+, in its encoders and its masks; decoder and losses are the same code in all ways."""
    book = WeclipStep(given.vision, given.texts, CLASSES, given.decoder)
    network, config = plus_network(given, Clip(given.vision, None, None, math.exp(LOGIT_SCALE)), "fp32")
    dino, grid = network.frozen.dino, grid_of(given.vision, given.images)
    assert dino is not None
    update, size = 18001 if given.gated else 1, size_of(given.images)

    def run() -> tuple[Seconds, float]:
        seconds, pseudo = Seconds(), []
        network.zero_grad()
        with seconds.part(ENCODER):
            encoding = book.encode(given.images)
            with torch.no_grad():
                maps = network._dino_maps(dino.model, given.images)
        features = Features(grid, given.images.new_zeros(0), {}, [])
        encoded = Encoded(features, [encoding.features[-1][:, 1:]], maps)
        with seconds.part(DECODER), patch.object(network, "encode", lambda *_, **__: encoded):
            outputs = network.training_outputs(given.images)
        gates = outputs["similarity"].detach().sigmoid()
        priors = outputs["grid_logits"].detach().softmax(dim=1)
        for index, classes in enumerate(given.labels):
            with seconds.part(CAM):  # a block is left out before the last one
                found, last = book.cams(encoding.features[-2][index], classes, grid)
            with seconds.part(AFFINITY):
                attentions = torch.stack([*(own[index] for own in encoding.attentions), last])
                weighted = found * priors[index, [1 + value for value in classes]]
                spread = transition(attentions[-6:], gates[index]) @ weighted.flatten(1).T
            with seconds.part(PAR):
                scores = assemble([cam.view(grid).cpu().numpy() for cam in spread.T], size)
                pseudo.append(pseudo_mask(given.images[index], scores, classes))
        with seconds.part(DECODER):
            mask = torch.stack(pseudo)
            certain = torch.full_like(mask, 200, dtype=torch.uint8)
            losses = weighted_losses(outputs, mask, certain, config, update, lambda sums: sums)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
        return seconds, float(total.detach())

    return run


def plus_network(given: Setting, clip: Clip, precision: Any) -> tuple[FrozenClip, TrainConfig]:
    """WeCLIP+'s network and settings, seeded, beside a DINOv2 half as wide as CLIP: with ViT-B its smallest one."""
    config = load_train_config("weclip-plus/voc12", overrides=["network.frozen.dropout=0"])
    torch.manual_seed(0)
    own = clip.vision.config
    width, heads = own.hidden_size // 2, max(1, own.num_attention_heads // 2)
    table = Dinov2Config(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=own.num_hidden_layers, image_size=518
    )
    dino = Dino(Dinov2Model(table).eval().requires_grad_(False), "drawn")
    network = FrozenClip(config.network.frozen, 1 + CLASSES, clip, precision, dino)
    return network.to(given.images.device).train(), config


class Timed:
    """A method or a refiner, with what its calls take."""

    def __init__(self, inner: Any, name: str, part: str) -> None:
        self.inner, self.name, self.part, self.seconds = inner, name, part, Seconds()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return self._timed(found) if name == self.name else found

    def __call__(self, *arguments: Any) -> Any:
        return self._timed(self.inner)(*arguments)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.seconds.part(self.part):
                return function(*arguments, **named)

        return call


def ours(given: Setting, precision: Literal["fp32", "bf16"] = "fp32") -> Run:
    """The step of ``wsss train-seg --online``, without reading and without the optimiser."""
    overrides = ["clip.weights=demo", *(["excel.attributes=none"] if given.method == "excel" else [])]
    is_plus = given.method == "weclip-plus"
    settings = load_mask_config(
        "weclip/plus-voc12" if is_plus else f"{given.method}/voc12", overrides=overrides
    )
    texts = given.texts.cpu()
    rows = ClassEmbeddings(texts[:CLASSES], texts[CLASSES:])
    vision = given.vision if precision == "fp32" else deepcopy(given.vision)
    clip = Clip(vision, SimpleNamespace(), None, math.exp(LOGIT_SCALE))
    with ExitStack() as stack:
        for module in (excel, learned_prompts):
            stack.enter_context(patch.object(module, "class_embeddings", lambda *_: rows))
            stack.enter_context(patch.object(module, "TextEncoder", lambda *_: SimpleNamespace(encode=None)))
        kind: Any = load_method(settings.method)
        method = Timed(kind(settings, clip, load_class_set("voc12"), precision), "cams", CAM)
    if is_plus:
        network, config = plus_network(given, clip, precision)
    else:
        config = load_train_config(f"{given.method}/voc12", overrides=["network.frozen.dropout=0"])
        network = (
            FrozenClip(config.network.frozen, 1 + CLASSES, clip, precision).to(given.images.device).train()
        )
        network.load_state_dict(renamed(given.decoder.state_dict()))
    refiner = Timed(load_refiner(settings, "par"), "", PAR)
    target = OnlineTarget(method, refiner, config.online, network.image_mean, network.image_std)
    present = [[value + 1 for value in values] for values in given.labels]
    within = torch.zeros_like(given.images[:, 0], dtype=torch.bool)
    update = {"weclip-plus": 18001}.get(given.method, 14001) if given.gated else 1

    def run() -> tuple[Seconds, float]:
        seconds = Seconds()
        method.seconds, refiner.seconds = seconds, seconds
        network.zero_grad()
        with seconds.part(ENCODER):
            encoded = network.encode(given.images, **method.encoding)
        with (
            seconds.part(DECODER),
            patch.object(network, "encode", lambda *_, **__: encoded),
            torch.autocast(given.images.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            outputs = network.training_outputs(given.images)
        with seconds.part("target"):
            mask, confidence = target(given.images, outputs, present, within, update)
        seconds[PAR] += seconds.pop("target") - seconds[CAM] - seconds[PAR]  # with what lies between them
        with seconds.part(DECODER):
            losses = weighted_losses(outputs, mask, confidence, config, update, lambda sums: sums)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
        return seconds, float(total.detach())

    return run


WAYS: dict[str, Callable[[Setting], Run]] = {
    "plain": plain,
    "ours, fp32": ours,
    "ours, bf16": partial(ours, precision="bf16"),
}


def show(seconds: dict[str, list[Seconds]]) -> None:
    """Print each part's median for every way."""
    print(f"| part | {' | '.join(f'{way}, s' for way in seconds)} |")
    print(f"| --- |{' ---: |' * len(seconds)}")
    for part in PARTS:
        medians = [statistics.median(taken[part] for taken in steps) for steps in seconds.values()]
        print(f"| {part} | {' | '.join(f'{median:.3f}' for median in medians)} |")
    totals = [[sum(taken.values()) for taken in steps] for steps in seconds.values()]
    shown = [f"{statistics.median(steps):.2f} ({min(steps):.2f} to {max(steps):.2f})" for steps in totals]
    print(f"| the step | {' | '.join(shown)} |")
    times = [statistics.median(totals[0]) / statistics.median(steps) for steps in totals]
    print(f"| times as fast | {' | '.join(f'{factor:.2f}' for factor in times)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("weclip", "excel"), default="weclip")
    parser.add_argument("--phase", choices=(EARLY, LATE), default=EARLY)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    case = (
        "step_early"
        if options.phase == EARLY
        else {"weclip": "step_late", "excel": "step_lvc"}[options.method]
    )
    largest = max(value for stage, value in check(options.method, case).items() if stage != "pseudo")
    print(f"plain step against the published code: maps, losses and gradients within {largest:.1e}")
    given = setting(options.method, options.phase, options.batch, options.device, seeded_vision())
    ways = {name: way(given) for name, way in WAYS.items()}
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for repeat in range(options.repeats + 1):
        for name, run in ways.items():
            taken, losses[name] = run()
            if repeat:
                seconds[name].append(taken)
    labels = sum(map(len, given.labels))
    print(
        f"{options.method}, {options.phase}; {options.batch} crops of {SIDE}x{SIDE}, {labels} labels in all; "
        f"{options.device}, {torch.get_num_threads()} threads\n"
    )
    show(seconds)
    print("losses: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
