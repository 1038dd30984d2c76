"""Speed of one training step of WeCLIP or ExCEL, part by part.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.online --method weclip|excel --phase early|late [--repeats 3]

A CLIP ViT-B/16 and a decoder 256 wide with seeded random weights, texts of random unit rows, smooth random crops of
320x320 with 1 to 3 labels each: speed doesn't depend on what they mean. *plain* is the step of ``plain_online.py``,
checked first against the published code's outputs. The phase ``late`` is that with the decoder's affinity, of ExCEL
also with the guide. The optimiser isn't part of it. The ways take turns within one run, so what else the machine does
hits all alike; the first call of each warms up. Seconds a step: the median, and the range of the whole step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.plain_online import (
    AFFINITY,
    CAM,
    DECODER,
    EARLY,
    ENCODER,
    LATE,
    LVC,
    PAR,
    Classes,
    Decoder,
    ExcelStep,
    Seconds,
    WeclipStep,
    check,
    normalised,
    step,
)

SIDE, CLASSES, BACKGROUND = 320, 20, 25
PARTS = (ENCODER, CAM, AFFINITY, PAR, DECODER)
Run = Callable[[], Seconds]  # one step, with what each part of it took


@dataclass
class Setting:
    """What every way is given.

    Attributes:
        method: ``weclip`` or ``excel``.
        gated: the phase in which the decoder's affinity counts.
        vision: CLIP, frozen.
        texts: unit rows (T, P), those of the classes first.
        decoder: in training mode.
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


def setting(method: str, phase: str, batch: int) -> Setting:
    """Seeded."""
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
    texts = F.normalize(torch.randn(CLASSES + BACKGROUND, config.projection_dim), dim=1)
    layers = config.num_hidden_layers - (method == "weclip")
    decoder = Decoder(layers, config.hidden_size, classes=1 + CLASSES).train()
    coarse = torch.rand(batch, 3, 12, 12) * 255
    crops = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    labels = [sorted(torch.randperm(CLASSES)[: 1 + index % 3].tolist()) for index in range(batch)]
    images = normalised(crops.permute(0, 2, 3, 1).numpy())
    return Setting(method, phase == LATE, vision, texts, decoder, images, labels)


def plain(given: Setting) -> Run:
    """The published way."""
    kind = WeclipStep if given.method == "weclip" else ExcelStep
    method = kind(given.vision, given.texts, CLASSES, given.decoder)
    late = LATE if given.method == "weclip" else LVC

    def run() -> Seconds:
        seconds = Seconds()
        step(method, given.images, given.labels, late if given.gated else EARLY, seconds)
        return seconds

    return run


WAYS: dict[str, Callable[[Setting], Run]] = {"plain": plain}


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("weclip", "excel"), default="weclip")
    parser.add_argument("--phase", choices=(EARLY, LATE), default=EARLY)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    case = (
        "step_early"
        if options.phase == EARLY
        else {"weclip": "step_late", "excel": "step_lvc"}[options.method]
    )
    largest = max(value for stage, value in check(options.method, case).items() if stage != "pseudo")
    print(f"plain step against the published code: maps, losses and gradients within {largest:.1e}")
    given = setting(options.method, options.phase, options.batch)
    ways = {name: way(given) for name, way in WAYS.items()}
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, run in ways.items():
            taken = run()
            if repeat:
                seconds[name].append(taken)
    labels = sum(map(len, given.labels))
    print(
        f"{options.method}, {options.phase}; {options.batch} crops of {SIDE}x{SIDE}, {labels} labels in all; "
        f"{torch.get_num_threads()} threads\n"
    )
    show(seconds)


if __name__ == "__main__":
    main()
