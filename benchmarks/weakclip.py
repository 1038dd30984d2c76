"""Speed of WeakCLIP: one training step, and one image's masks out of twelve views.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.weakclip --part step|image|loss [--batch 2] [--crop 512]
        [--classes 20] [--scales 6] [--repeats 3] [--device cuda] [--precision fp32|bf16]

A CLIP ViT-B/16 with seeded random weights, drawn images: speed doesn't depend on what they mean. *plain* computes in
the published way: the CRF of the loss by pydensecrf, image after image on one core; texts encoded for each window,
all tokens of each; a window at a time; adapter, neck and head one after the other; a CRF by pydensecrf; the optimiser
weight by weight. *ours* is what ``train-seg`` and ``relabel`` do. ``loss`` is the boundary loss's CRF alone. The ways
take turns within one run; the first call of each warms up. Seconds of CPU time, so that other work on its cores
matters less (on a GPU seconds): median and range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from wsss_pipeline.clip.learned_prompts import text_features
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.refine.dense_crf import infer_by_pydensecrf
from wsss_pipeline.segmentation import inference, objectives, weakclip
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.network import resized
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.train_config import load_train_config
from wsss_pipeline.segmentation.weakclip import WeakClip, _Head, _Neck
from wsss_pipeline.segmentation.weakclip_losses import BOUNDARY_CRF, Pictures, crf_posterior
from wsss_pipeline.stages.relabel import relabel_config

GRID = 64
WEAKCLIP_TEXT = WeakClip.text
Way = Callable[[], object]


def drawn_network(
    recipe: str, classes: int, device: str, precision: Any, clip: Clip | None = None
) -> WeakClip:
    """Seeded; a name is two tokens, where no other CLIP is given."""
    torch.manual_seed(0)
    clip = clip or drawn_clip()
    config = load_train_config(recipe).network.weakclip
    names = [f"class {value}" for value in range(classes)]
    return WeakClip(config, names, clip, precision).to(device)


def drawn_clip() -> Clip:
    """ViT-B/16."""
    width = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512}
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**width, num_attention_heads=12, patch_size=16))
    text = CLIPTextModelWithProjection(CLIPTextConfig(eos_token_id=49407, bos_token_id=49406))
    towers: list[Any] = [tower.eval().requires_grad_(False) for tower in (vision, text)]
    return Clip(*towers, lambda *_, **__: {"input_ids": [49406, 320, 321, 49407]}, 100.0)


def plain_posterior(seen: Tensor, probability: Tensor, present: Tensor | None = None) -> Tensor:
    """As ``crf_posterior``, one image after another."""
    energy = -probability.clamp(min=1e-4).log().cpu()
    found = [
        infer_by_pydensecrf(image.cpu().numpy(), own.numpy(), BOUNDARY_CRF)
        for image, own in zip(seen, energy, strict=True)
    ]
    posterior = torch.from_numpy(np.stack(found)).to(probability.device).clamp(min=1e-4)
    return posterior / posterior.sum(dim=1, keepdim=True)


def plain_neck(self: Any, adapter: Any, patches: Any, score: Tensor) -> list[Tensor]:
    """As ``_Neck.forward``, layer after layer."""
    maps = []
    for lateral, adapt, level in zip(self.lateral, adapter, patches, strict=True):
        adapted = adapt(level)
        guide = F.interpolate(score, adapted.shape[-2:], mode="bilinear", align_corners=True)
        maps.append(lateral(torch.cat([adapted, guide], dim=1)))
    for finer in (2, 1, 0):
        maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], maps[finer].shape[-2:], mode="nearest")
    return [smooth(level) for smooth, level in zip(self.smooth, maps, strict=True)]


def plain_head(self: Any, maps: Sequence[Tensor]) -> Tensor:
    """As ``_Head.forward``, all levels brought to one size before they are classified."""
    total = self.branches[0][0](maps[0])
    for level in (1, 2, 3):
        branch = maps[level]
        for block in self.branches[level]:
            branch = resized(block(branch), scale_factor=2)
        total = total + resized(branch, size=maps[0].shape[-2:])
    logits: Tensor = self.classify(self.dropout(total))
    return logits


def plain_text(self: Any) -> Tensor:
    """As ``WeakClip.text``, with all tokens of each text and every time anew."""
    self._kept_text = None
    with patch.object(weakclip, "text_features", lambda *given: text_features(*given[:3])):
        return WEAKCLIP_TEXT(self)


@contextmanager
def plainly() -> Iterator[None]:
    """The network computes in the published way."""
    with (
        patch.object(_Neck, "forward", plain_neck),
        patch.object(_Head, "forward", plain_head),
        patch.object(WeakClip, "text", plain_text),
        patch.object(inference, "WINDOWS_AT_A_TIME", 1),
        patch.object(objectives, "crf_posterior", plain_posterior),
    ):
        yield


def step(arguments: argparse.Namespace, clip: Clip | None = None) -> dict[str, Way]:
    """A forward and a backward pass with all losses, and the update."""
    device = arguments.device
    config = load_train_config("weakclip/voc12")
    pixels = torch.randn(arguments.batch, 3, arguments.crop, arguments.crop, device=device)
    mask = torch.randint(0, 1 + arguments.classes, (arguments.batch, 16, 16), device=device)
    times = arguments.crop // 16
    target = mask.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    certain = torch.full_like(target, 200)

    def way(recipe: str, precision: str, *, is_plain: bool = False) -> Way:
        network = drawn_network(recipe, arguments.classes, device, precision, clip).train()
        chosen = config.optimisation
        groups = network.parameter_groups(chosen.lr, chosen.weight_decay, chosen.head_lr_factor)
        optimizer = torch.optim.AdamW(groups, fused=(device == "cpu" and not is_plain) or None)
        known = torch.zeros(arguments.batch, 1 + arguments.classes, dtype=torch.bool, device=device)
        counted = torch.ones(arguments.batch, dtype=torch.bool, device=device)
        pictures = Pictures(pixels, network.image_mean, network.image_std, known, counted)

        def run() -> float:
            torch.manual_seed(0)  # all ways draw the same of dropout
            with plainly() if is_plain else nullcontext():
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    outputs = network.training_outputs(pixels)
                losses = weighted_losses(outputs, target, certain, config, 1, lambda sums: sums, pictures)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(total.detach())

        return run

    return {
        "plain, published": way("weakclip/voc12", "fp32", is_plain=True),
        "ours, published": way("weakclip/voc12", "fp32"),
        f"ours, {arguments.precision}": way("weakclip/voc12", arguments.precision),
        f"ours, frozen, {arguments.precision}": way("weakclip/voc12-frozen", arguments.precision),
    }


def image(arguments: argparse.Namespace, clip: Clip | None = None) -> dict[str, Way]:
    """Masks of a picture of 500x375."""
    config, names = relabel_config("weakclip/voc12"), [f"class {value}" for value in range(arguments.classes)]
    views = config.inference.model_copy(update={"scales": config.inference.scales[: arguments.scales]})
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    pixels = getattr(arguments, "pixels", coarse.repeat(16, axis=0).repeat(16, axis=1)[:375, :500])

    def way(recipe: str, backend: str, precision: str) -> Way:
        network = drawn_network(recipe, arguments.classes, arguments.device, precision, clip).eval()
        crf = config.crf.model_copy(update={"backend": backend})
        segmenter = Segmenter(network, names, arguments.device, views, crf, precision=precision)

        def run() -> object:
            with plainly() if backend == "pydensecrf" else nullcontext():
                return segmenter(pixels)

        return run

    return {
        "plain, fp32": way("weakclip/voc12", "pydensecrf", "fp32"),
        "ours, fp32": way("weakclip/voc12", "auto", "fp32"),
        f"ours, {arguments.precision}": way("weakclip/voc12", "auto", arguments.precision),
        f"ours, frozen, {arguments.precision}": way("weakclip/voc12-frozen", "auto", arguments.precision),
    }


def loss(arguments: argparse.Namespace) -> dict[str, Way]:
    """The posterior that the boundary loss learns from."""
    coarse = torch.randn(arguments.batch, 1 + arguments.classes, 8, 8, device=arguments.device)
    probability = torch.nn.functional.interpolate(3 * coarse, (GRID, GRID), mode="bilinear").softmax(dim=1)
    seen = torch.randint(0, 256, (arguments.batch, 8, 8, 3), dtype=torch.uint8, device=arguments.device)
    seen = seen.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).contiguous()
    present = torch.zeros(arguments.batch, 1 + arguments.classes, dtype=torch.bool, device=arguments.device)
    present[:, 1:3] = True

    def waited(function: Callable[..., Tensor], *more: Tensor) -> Way:
        return lambda: float(function(seen, probability, *more).sum())

    return {
        "plain": waited(plain_posterior),
        "ours": waited(crf_posterior),
        "ours, two labels": waited(crf_posterior, present),
    }


def main() -> None:
    """Print seconds of each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["step", "image", "loss"], required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=512, help="side of a step's pictures")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--scales", type=int, default=6, help="of the image's, the smallest ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    ways = SimpleNamespace(step=step, image=image, loss=loss).__dict__[arguments.part](arguments)
    clock = time.process_time if arguments.device == "cpu" else time.monotonic
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + arguments.repeats):
        for name, run in ways.items():
            start = clock()
            run()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - start)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
