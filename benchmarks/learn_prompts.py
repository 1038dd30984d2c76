"""An update of learn-prompts beside one written plainly, by autograd of the second order.

``python benchmarks/learn_prompts.py [--updates 2] [--precision bf16]``. A CLIP ViT-B/16 of seeded weights, 16 seeded
crops of 224 pixels, the classes of voc12 with a context for each of them and 25 free background rows, masks of 1 to 3
classes. The plain way works as the published code does: all texts at their full 77 tokens, the CAM as a gradient that
keeps its graph, class by class over the batch, and a backward pass through that graph and the text tower. The blocks
before the last one are the same in both ways, without gradients, and are timed apart. Ways take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from seeded_clip import write_clip
from torch import Tensor

from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.clip.learned_prompts import PromptEncoder, initial_context
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig, ResolvedPrecision
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.prompts.losses import activation_loss

CROPS, SIDE, FREE, LENGTH = 16, 224, 25, 16


class Plain:
    """The loss of an update and its gradient by autograd alone."""

    def __init__(self, clip: Clip, encoder: PromptEncoder) -> None:
        self._clip, self._encoder = clip, encoder
        self._mask = torch.full((77, 77), -torch.inf, device=encoder.tokens.device).triu(1)

    def rows(self, context: Tensor) -> Tensor:
        tower, embedded = self._clip.text.text_model, self._encoder.embedded(context)
        embedded = F.pad(embedded, (0, 0, 0, 77 - embedded.shape[1]))
        hidden = embedded + tower.embeddings.position_embedding.weight
        for layer in tower.encoder.layers:
            hidden = layer(hidden, self._mask[None, None])
        taken = tower.final_layer_norm(hidden[torch.arange(len(hidden)), self._encoder.ends])
        return F.normalize(self._clip.text.text_projection(taken), dim=1)

    def loss(self, hidden: Tensor, rows: Tensor, present: list[list[int]], masks: Tensor) -> Tensor:
        """``hidden``: (B, N, D), what goes into the last block."""
        model = self._clip.vision.vision_model
        layer = model.encoder.layers[-1]
        tokens = layer.layer_norm1(hidden).detach().requires_grad_()
        query, key, value = (
            f(tokens).unflatten(-1, (layer.self_attn.num_heads, -1)).transpose(1, 2)
            for f in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        attention = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
        stream = hidden + layer.self_attn.out_proj((attention @ value).transpose(1, 2).flatten(2))
        stream = stream + layer.mlp(layer.layer_norm2(stream))
        pooled = self._clip.vision.visual_projection(model.post_layernorm(stream)[:, 1:]).mean(dim=1)
        logits = self._clip.logit_scale * F.normalize(pooled, dim=1) @ rows.T
        allowed = torch.zeros_like(logits)
        for own, values in zip(allowed, present, strict=True):
            own[[value - 1 for value in values]] = 1
        allowed[:, -FREE:] = 1
        exponentials = (logits - logits.amax(dim=1, keepdim=True)).exp() * allowed
        probabilities = exponentials / (exponentials.sum(dim=1, keepdim=True) + 1e-5)
        maps: list[list[Tensor]] = [[] for _ in present]
        side = round((tokens.shape[1] - 1) ** 0.5)
        for turn in range(max(map(len, present))):
            images = [number for number, values in enumerate(present) if len(values) > turn]
            score = torch.stack([probabilities[number, present[number][turn] - 1] for number in images]).sum()
            (gradient,) = torch.autograd.grad(score, tokens, create_graph=True)
            weights = gradient[:, 1:].mean(dim=1)
            found = torch.einsum("bd,bnd->bn", weights, tokens.detach()[:, 1:]).view(-1, side, side)
            for number in images:
                maps[number].append(found[number])
        return activation_loss([torch.stack(several) for several in maps], present, masks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=2, help="of each way")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of ours")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        files = locate_clip(ClipConfig(weights=str(write_clip(Path(folder) / "clip"))), offline=True)
        clip = load_clip(files, device)
        seconds = measured(clip, device, arguments.updates, arguments.precision)
    for way, parts in seconds.items():
        listed = ", ".join(
            f"{part} {1000 * value / arguments.updates:.0f} ms" for part, value in parts.items()
        )
        print(f"{way}: {1000 * sum(parts.values()) / arguments.updates:.0f} ms an update ({listed})")
    trunk = seconds["ours"]["blocks before the last"]
    plain, ours = (sum(parts.values()) for parts in seconds.values())
    print(f"times as fast: {plain / ours:.2f}")
    print(f"without the blocks before the last: {(plain - trunk) / (ours - trunk):.2f}")


def measured(
    clip: Clip, device: torch.device, updates: int, precision: ResolvedPrecision
) -> dict[str, dict[str, float]]:
    """Seconds of each part of each way; both give the same gradient."""
    torch.manual_seed(0)
    texts = [*(entry.texts() for entry in load_class_set("voc12").classes), *[("",)] * FREE]
    encoder, trunk = PromptEncoder(clip, texts, "front", LENGTH), Trunk(clip.vision, rounded_positions=False)
    trunks = {"plain": trunk, "ours": Trunk(deepcopy(clip.vision), precision, rounded_positions=False)}
    plain = Plain(clip, encoder)
    shape = (len(texts), LENGTH, int(clip.text.config.hidden_size))
    context = initial_context(shape, 0.0125, "0").to(device).requires_grad_()
    images = torch.randn(CROPS, 3, SIDE, SIDE, device=device)
    present = [sorted(torch.randperm(20)[: 1 + number % 3].add(1).tolist()) for number in range(CROPS)]
    drawn = [torch.randint(1 + len(values), (SIDE, SIDE)) for values in present]
    masks = torch.stack([torch.tensor([0, *values])[own] for values, own in zip(present, drawn, strict=True)])
    masks = masks.to(device)
    seconds: dict[str, dict[str, float]] = {"plain": defaultdict(float), "ours": defaultdict(float)}
    for _ in range(updates):
        gradients = {}
        for way, parts in seconds.items():
            clock = Clock(parts, device)
            with torch.no_grad():
                trunk = trunks[way]
                before = trunk.encode(images, taps=[trunk.depth - 2], attention="none").taps[trunk.depth - 2]
            clock.part("blocks before the last")
            with torch.autocast(device.type, torch.bfloat16, enabled=way == "ours" and precision == "bf16"):
                rows = plain.rows(context) if way == "plain" else encoder(context).float()
            clock.part("texts")
            leaf = rows.detach().requires_grad_()
            loss = (
                plain.loss(before, leaf, present, masks)
                if way == "plain"
                else closed_form(trunk, before, leaf, present, masks, clip.logit_scale)
            )
            clock.part("maps")
            loss.backward()
            clock.part("maps, backward")
            rows.backward(leaf.grad)
            clock.part("texts, backward")
            gradients[way], context.grad = context.grad, None
        difference = (gradients["plain"] - gradients["ours"]).abs().max() / gradients["plain"].abs().max()
        assert float(difference) < (1e-3 if precision == "fp32" else 0.2), float(difference)
    return seconds


class Clock:
    """Adds the seconds since it was made, or since the last part, to a part."""

    def __init__(self, parts: dict[str, float], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._start = time.perf_counter()

    def part(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._parts[name] += time.perf_counter() - self._start
        self._start = time.perf_counter()


def closed_form(
    trunk: Trunk, hidden: Tensor, rows: Tensor, present: list[list[int]], masks: Tensor, logit_scale: float
) -> Tensor:
    """The loss as ``PromptObjective`` makes it, from what goes into the last block on."""
    with torch.no_grad():
        passes = [trunk._last.forward(image) for image in hidden]
    side = SIDE // trunk.patch_size
    features = Features((side, side), hidden.new_zeros(0), {}, passes)
    texts = [torch.cat([rows[[value - 1 for value in values]], rows[-FREE:]]) for values in present]
    maps = softmax_gradcam(features, texts, [len(own) for own in present], logit_scale, everything=rows)
    return activation_loss(maps, present, masks)


if __name__ == "__main__":
    main()
