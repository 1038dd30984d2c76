"""One training step of WeCLIP and of ExCEL written plainly, step by step as the published code computes it: what our
speed is measured against.

Frozen CLIP over a batch in float32 with all attention maps held; pseudo masks a picture at a time; then the decoder
on CLIP's features, its losses and gradients. WeCLIP takes a forward and a backward pass of the last block for each
class. ExCEL holds the maps of every head of its calibrated blocks, and with a guide runs the whole encoder a second
time. The affinity is a matrix, squared, once a picture; PAR holds the scores once for each of 48 neighbours.
``check`` compares with the outputs of the published code under tests/golden:

    python -m benchmarks.plain_online
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.plain_excel import CALIBRATED, GOLDEN, assemble, cams, enriched, labels, par

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of values in 0..255
EARLY, LATE, LVC, SELF = "early", "late", "lvc", "self"  # LATE is WeCLIP's, LVC and SELF are ExCEL's
RADIUS = 8  # patches
LOGIT_SCALE = 4.60546875
Classes = Sequence[int]  # of a picture, from 0, ascending


class Projection(nn.Module):
    """One block's tokens brought to the decoder's width."""

    def __init__(self, width: int, decoder_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, decoder_width)
        self.proj_2 = nn.Linear(decoder_width, decoder_width)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.proj_2(F.relu(self.proj(tokens)))
        return found


class Fusion(nn.Module):
    """The features of all blocks as one map (B, C, h, w)."""

    def __init__(self, layers: int, width: int, decoder_width: int, dropout: float) -> None:
        super().__init__()
        self.linears_modulelist = nn.ModuleList(Projection(width, decoder_width) for _ in range(layers))
        self.linear_fuse = nn.Conv2d(layers * decoder_width, decoder_width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """``features`` of each block, (B, N, D) with the class token."""
        projected = [
            projection(tokens[:, 1:]).transpose(1, 2).unflatten(2, grid)
            for projection, tokens in zip(self.linears_modulelist, features, strict=True)
        ]
        fused: Tensor = self.dropout(self.linear_fuse(torch.cat(projected, dim=1)))
        return fused


class QuickGelu(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * torch.sigmoid(1.702 * values)


class Block(nn.Module):
    """A transformer block that normalises first."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": QuickGelu(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        normalised = self.ln_1(tokens)
        tokens = tokens + self.attn(normalised, normalised, normalised)[0]
        output: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return output


class Head(nn.Module):
    """Three blocks over the fused map, and the classes' logits."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*[Block(width) for _ in range(3)])})
        self.linear_pred = nn.Conv2d(width, classes, 1)

    def forward(self, fused: Tensor) -> Tensor:
        tokens = self.transformer["resblocks"](fused.flatten(2).permute(2, 0, 1))
        logits: Tensor = self.linear_pred(tokens.permute(1, 2, 0).unflatten(2, fused.shape[2:]))
        return logits


class Decoder(nn.Module):
    """What is trained; its parameters have the published names.

    Args:
        layers: blocks of CLIP that it is fed.
        width: of CLIP.
        decoder_width: its step_losses.
        classes: with the background.
    """

    def __init__(
        self, layers: int, width: int, decoder_width: int = 256, classes: int = 21, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.decoder_fts_fuse = Fusion(layers, width, decoder_width, dropout)
        self.decoder = Head(decoder_width, classes)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The fused map (B, C, h, w) and logits (B, L, h, w)."""
        fused = self.decoder_fts_fuse(features, grid)
        return fused, self.decoder(fused)


@dataclass
class Encoding:
    """What CLIP sees in a batch of images of N - 1 patches.

    Attributes:
        attentions: of each block, (B, N, N).
        features: what the decoder is fed, of each block, (B, N, D).
        calibrated: ExCEL's attention of each calibrated block, (B, N, N).
        patches: ExCEL's last tokens in the space of the texts, (B, N, P).
    """

    attentions: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    calibrated: list[Tensor] = field(default_factory=list)
    patches: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Forward:
    """A batch before its losses.

    Attributes:
        logits: (B, L, h, w).
        affinity: the decoder's, of patches, (B, h * w, h * w).
        refined: each picture's maps (K, h, w), spread along the affinity.
        pseudo: masks (B, H, W).
        maps: ExCEL's maps of all classes, (B, h * w, C).
    """

    logits: Tensor
    affinity: Tensor
    refined: list[Tensor]
    pseudo: Tensor
    maps: Tensor | None = None

    @property
    def prediction(self) -> Tensor:
        """Classes (B, H, W)."""
        return enlarged(self.logits, self.pseudo.shape[1:]).argmax(dim=1)


@dataclass
class Losses:
    """``positives`` and ``negatives`` are the pairs of patches of one class and of two, one added."""

    segmentation: Tensor
    affinity: Tensor
    positives: Tensor
    negatives: Tensor

    @property
    def total(self) -> Tensor:
        return self.segmentation + 0.1 * self.affinity


class Seconds(defaultdict[str, float]):
    """What each part of a step has taken."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self[name] += time.perf_counter() - started


ENCODER, CAM, AFFINITY, PAR, DECODER = "encoder", "CAM", "affinity", "PAR", "decoder, losses, backward"


class Step:
    """What the two methods share.

    Attributes:
        threshold: of the boxes.
        layers, gated_layers: the last blocks whose attention spreads the maps, without and with a gate.
        guard: added to the numbers of pixels that the cross-entropy is divided by.
    """

    threshold: float
    layers: int
    gated_layers: int
    guard: float

    def __init__(self, vision: Any, decoder: Decoder) -> None:
        self.vision, self.decoder = vision, decoder

    def forward(
        self, images: Tensor, labels_of: Sequence[Classes], phase: str, seconds: Seconds | None = None
    ) -> Forward:
        """Images (B, 3, H, W), normalised, up to their pseudo masks and logits."""
        raise NotImplementedError

    def refine(self, maps: Tensor, attentions: Tensor, gate: Tensor | None) -> Tensor:
        """Maps (K, h, w) spread along the attention of blocks (L, N, N)."""
        layers = self.layers if gate is None else self.gated_layers
        matrix = transition(attentions[-layers:], gate)
        return torch.stack([spread(cam, matrix, self.threshold) for cam in maps])


class WeclipStep(Step):
    """WeCLIP's step by the book.

    Args:
        vision: ``transformers.CLIPVisionModelWithProjection``, frozen, float32.
        texts: unit rows (T, P), those of the classes first.
        classes: number of them.
        decoder: fed with all blocks but the last.
        logit_scale: CLIP's, a logarithm.
    """

    threshold, layers, gated_layers, guard = 0.4, 8, 6, 0.0

    def __init__(
        self, vision: Any, texts: Tensor, classes: int, decoder: Decoder, logit_scale: float = LOGIT_SCALE
    ) -> None:
        super().__init__(vision, decoder)
        self.foreground, self.background = texts[:classes], texts[classes:]
        self.scale = math.exp(logit_scale)

    def forward(
        self, images: Tensor, labels_of: Sequence[Classes], phase: str, seconds: Seconds | None = None
    ) -> Forward:
        """Images (B, 3, H, W), normalised; the decoder's affinity is a gate in the phase ``late``."""
        seconds = Seconds() if seconds is None else seconds
        with seconds.part(ENCODER):
            encoding = self.encode(images)
        with seconds.part(DECODER):
            fused, logits = self.decoder(encoding.features, grid_of(self.vision, images))
            affinity = self.affinity(fused)
        refined, pseudo = [], []
        for index, classes in enumerate(labels_of):
            with seconds.part(CAM):
                found, last = self.cams(encoding.features[-1][index], classes, grid_of(self.vision, images))
            with seconds.part(AFFINITY):
                attentions = torch.stack([*(maps[index] for maps in encoding.attentions), last])
                gate = affinity[index].detach() if phase == LATE else None
                refined.append(self.refine(found, attentions, gate))
            with seconds.part(PAR):
                scores = assemble([cam.cpu().numpy() for cam in refined[-1]], size_of(images))
                pseudo.append(pseudo_mask(images[index], scores, classes))
        return Forward(logits, affinity, refined, torch.stack(pseudo))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoding:
        """All blocks but the last."""
        encoding, hidden = Encoding(), embedded(self.vision, images)
        for layer in self.vision.vision_model.encoder.layers[:-1]:
            query, key, value = projected(layer, layer.layer_norm1(hidden))
            attention = probabilities(query, key)
            hidden = hidden + joined(layer, attention @ value)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            encoding.attentions.append(attention.mean(dim=1))
            encoding.features.append(hidden)
        return encoding

    def affinity(self, fused: Tensor) -> Tensor:
        """How alike the fused map's patches are, (B, h * w, h * w) in 0..1."""
        vectors = fused.flatten(2)
        return torch.sigmoid(vectors.transpose(1, 2) @ vectors)

    def cams(self, hidden: Tensor, classes: Classes, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Maps (K, h, w) in 0..1 of a picture's classes, and the last block's attention (N, N)."""
        found = []
        for target in range(len(classes)):
            tokens = self.last_tokens(hidden)
            chances, attention = self.probabilities(hidden, tokens, classes)
            chances[target].backward()
            assert tokens.grad is not None
            weights = tokens.grad[1:].mean(dim=0)
            cam = F.relu(tokens.detach()[1:] @ weights).view(grid)
            found.append(rescaled(rescaled(cam)))
        return torch.stack(found), attention.detach()

    def last_tokens(self, hidden: Tensor) -> Tensor:
        """What the last block's attention is given, (N, D)."""
        tokens: Tensor = self.vision.vision_model.encoder.layers[-1].layer_norm1(hidden)
        return tokens.detach().requires_grad_()

    def probabilities(self, hidden: Tensor, tokens: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
        """Of the picture's classes and the background words (K + G), and the last block's attention (N, N)."""
        model = self.vision.vision_model
        layer = model.encoder.layers[-1]
        query, key, value = projected(layer, tokens[None])
        attention = probabilities(query, key)
        output = hidden[None] + joined(layer, attention @ value)
        output = output + layer.mlp(layer.layer_norm2(output))
        mean = model.post_layernorm(output)[0, 1:].mean(dim=0)
        vector = F.normalize(self.vision.visual_projection(mean), dim=0)
        texts = torch.cat([self.foreground[list(classes)], self.background])
        return torch.softmax(self.scale * texts @ vector, dim=0), attention[0].mean(dim=0)


class ExcelStep(Step):
    """ExCEL's step by the book.

    Args:
        vision: ``transformers.CLIPVisionModelWithProjection``, frozen, float32.
        texts: unit rows (T, P), those of the classes first and enriched.
        classes: number of them.
        decoder: fed with all blocks.
    """

    threshold, layers, gated_layers, guard = 0.79, 6, 6, 1e-6

    def __init__(self, vision: Any, texts: Tensor, classes: int, decoder: Decoder) -> None:
        super().__init__(vision, decoder)
        self.texts, self.classes = texts, classes

    def forward(
        self, images: Tensor, labels_of: Sequence[Classes], phase: str, seconds: Seconds | None = None
    ) -> Forward:
        """Images (B, 3, H, W), normalised; after ``early`` the decoder guides and gates."""
        seconds = Seconds() if seconds is None else seconds
        with seconds.part(ENCODER):
            encoding = self.encode(images)
        with seconds.part(DECODER):
            fused, logits = self.decoder(encoding.features, grid_of(self.vision, images))
            affinity = self.affinity(fused)
        if phase != EARLY:
            with seconds.part(ENCODER):
                encoding = self.encode(images, guide=self.guide(fused.detach()))
        with seconds.part(CAM):
            maps = self.cams(encoding)
        refined, pseudo, pictures = [], [], denormalised(images)
        for index, classes in enumerate(labels_of):
            with seconds.part(AFFINITY):
                attentions = torch.stack([found[index] for found in encoding.attentions])
                gate = None if phase == EARLY else affinity[index].detach()
                chosen = maps[index][:, list(classes)].T.unflatten(1, grid_of(self.vision, images))
                refined.append(self.refine(chosen, attentions, gate))
            with seconds.part(PAR):
                scores = assemble([cam.cpu().numpy() for cam in refined[-1]], size_of(images))
                pseudo.append(pseudo_mask(pictures[index], scores, classes))
        return Forward(logits, affinity, refined, torch.stack(pseudo), maps)

    @torch.no_grad()
    def encode(self, images: Tensor, guide: Tensor | None = None) -> Encoding:
        """All blocks, and the calibrated stream beside the last ones; a guide is (B, h * w, h * w)."""
        model = self.vision.vision_model
        encoding, hidden = Encoding(), embedded(self.vision, images)
        first = len(model.encoder.layers) - CALIBRATED
        stream, middles = hidden, []
        for index, layer in enumerate(model.encoder.layers):
            query, key, value = projected(layer, layer.layer_norm1(hidden))
            attention = probabilities(query, key)
            if index == first:
                stream = hidden
            if index >= first:
                likenesses = [probabilities(part, part) for part in (query, key, value)]
                calibrated = torch.stack(likenesses).mean(dim=0)
                if guide is not None:
                    calibrated[:, :, 1:, 1:] += guide[:, None]
                encoding.calibrated.append(calibrated.sum(dim=1))
                stream = stream + joined(layer, encoding.calibrated[-1][:, None] @ value)
            encoding.attentions.append(attention.sum(dim=1) if index >= first else attention.mean(dim=1))
            hidden = hidden + joined(layer, attention @ value)
            middles.append(hidden)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            encoding.features.append(hidden)
        stream = torch.cat([hidden[:, :1], stream[:, 1:]], dim=1)
        # the published code adds in place, so that its decoder is fed with other tensors than the blocks' outputs
        encoding.features[first - 1 : -1] = [stream, *middles[first + 1 :]]
        found = self.vision.visual_projection(model.post_layernorm(stream))
        encoding.patches = found / found.norm(dim=1, keepdim=True)
        return encoding

    def likeness(self, fused: Tensor) -> Tensor:
        """3 times the cosines of the fused map's patches (B, h * w, h * w), less their mean over the batch."""
        vectors = F.normalize(fused.flatten(2), dim=1)
        cosines = vectors.transpose(1, 2) @ vectors
        return 3 * (cosines - cosines.mean())

    def affinity(self, fused: Tensor) -> Tensor:
        """How alike the fused map's patches are, (B, h * w, h * w) in 0..1."""
        return torch.sigmoid(self.likeness(fused))

    def guide(self, fused: Tensor) -> Tensor:
        """What the calibrated attention is given of the fused map, (B, h * w, h * w)."""
        likeness = self.likeness(fused)
        return torch.softmax(likeness.masked_fill(likeness < 0, -torch.inf), dim=2)

    def cams(self, encoding: Encoding) -> Tensor:
        """Maps (B, h * w, C) in 0..1 of all classes."""
        return torch.stack([cams(patches, self.texts)[1:, : self.classes] for patches in encoding.patches])


def grid_of(vision: Any, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = vision.config.patch_size
    return images.shape[2] // patch, images.shape[3] // patch


def size_of(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def normalised(crops: NDArray[np.uint8]) -> Tensor:
    """CLIP's input (B, 3, H, W) of crops (B, H, W, 3)."""
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def denormalised(images: Tensor) -> Tensor:
    """Values in 0..1 again, cut to whole numbers of 0..255 in between."""
    mean, deviation = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, DEVIATION)
    )
    pixels = images * deviation + mean
    return pixels.to(torch.uint8).float() / 255


def embedded(vision: Any, images: Tensor) -> Tensor:
    """Tokens (B, N, D) before the first block."""
    embeddings, grid = vision.vision_model.embeddings, grid_of(vision, images)
    cells = embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    before = int((len(table) - 1) ** 0.5)
    positions = table[1:].T.reshape(1, -1, before, before)
    positions = F.interpolate(positions, size=grid, mode="bilinear", align_corners=False)
    table = torch.cat([table[:1], positions.flatten(2)[0].T])
    first = embeddings.class_embedding.expand(len(images), 1, -1)
    found: Tensor = vision.vision_model.pre_layrnorm(torch.cat([first, cells], dim=1) + table)
    return found


def projected(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of tokens (B, N, D)."""
    module = layer.self_attn
    query, key, value = (
        projection(tokens).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    return query, key, value


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Attention (B, H, N, N)."""
    return torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)


def joined(layer: Any, values: Tensor) -> Tensor:
    """The attention's output (B, N, D) out of what its heads mixed (B, H, N, d)."""
    output: Tensor = layer.self_attn.out_proj(values.transpose(1, 2).flatten(2))
    return output


def rescaled(values: Tensor) -> Tensor:
    """Minimum 0, divided by the maximum plus 1e-7."""
    shifted = values - values.min()
    return shifted / (1e-7 + shifted.max())


@torch.no_grad()
def transition(attentions: Tensor, gate: Tensor | None) -> Tensor:
    """How patches pass on to each other (N - 1, N - 1), out of blocks' attention (L, N, N) and a gate for it."""
    maps = attentions[:, 1:, 1:]
    if gate is None:
        matrix = maps.mean(dim=0)
    else:
        kept = maps[gaps(attentions, gate) <= 0]
        matrix = kept.sum(dim=0) / (len(kept) + 1e-5) * gate
    for _ in range(3):
        matrix = matrix / matrix.sum(dim=0, keepdim=True)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    matrix = (matrix + matrix.T) / 2
    return matrix @ matrix


def gaps(attentions: Tensor, gate: Tensor) -> Tensor:
    """How much further than the mean the blocks' attention (L, N, N) is from the gate, (L)."""
    differences = (gate - attentions[:, 1:, 1:]).sum(dim=(1, 2))
    return differences - differences.mean()


def spread(cam: Tensor, matrix: Tensor, threshold: float) -> Tensor:
    """A map (h, w) spread from within its boxes."""
    mask = box_mask(cam.cpu().numpy(), threshold).to(cam.device)
    return ((matrix * mask.view(1, -1)) @ cam.flatten()).view(cam.shape)


def box_mask(cam: NDArray[np.float32], threshold: float) -> Tensor:
    """1 within the boxes around the parts of a map above the threshold, short of its last row and column."""
    steps = (cam * 255).astype(np.uint8)
    foreground = (steps > int(threshold * steps.max())).astype(np.uint8)
    contours, _ = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask = torch.zeros(cam.shape)
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        mask[y : min(y + height, cam.shape[0] - 1), x : min(x + width, cam.shape[1] - 1)] = 1
    return mask


def pseudo_mask(image: Tensor, scores: Tensor, classes: Classes) -> Tensor:
    """Mask (H, W), 0 for the background, out of an image (3, H, W) and scores (1 + K, H, W)."""
    refined = par(image[None], scores[None].to(image.device))[0]
    return torch.from_numpy(labels(refined, classes)).long().to(image.device)


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def losses(method: Step, forward: Forward, pseudo: Tensor, phase: str) -> Losses:
    """The step's losses for masks (B, H, W)."""
    segmentation = balanced_cross_entropy(enlarged(forward.logits, pseudo.shape[1:]), pseudo, method.guard)
    grid = forward.logits.shape[2:]
    target = pair_target(forward.prediction if phase == SELF else pseudo, (grid[0], grid[1]))
    return Losses(segmentation, *affinity_loss(forward.affinity, target))


def balanced_cross_entropy(logits: Tensor, target: Tensor, guard: float) -> Tensor:
    """Mean of that of the background and that of the rest; without a guard NaN where one of them is missing."""
    every = F.cross_entropy(logits, target, reduction="none")
    background = target == 0
    sides = [every[side].sum() / (side.sum() + guard) for side in (background, ~background)]
    return (sides[0] + sides[1]) / 2


def pair_target(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of each pair of patches (B, h * w, h * w): 1 of one class, 0 of two, 255 too far apart."""
    rows = torch.arange(grid[0], device=masks.device) * masks.shape[1] // grid[0]
    columns = torch.arange(grid[1], device=masks.device) * masks.shape[2] // grid[1]
    small = masks[:, rows][:, :, columns].flatten(1)
    alike = (small[:, :, None] == small[:, None]).long()
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(masks.device)
    far = (places[:, None] - places[None]).abs().amax(dim=2) > RADIUS
    return alike.masked_fill(far, 255)


def affinity_loss(affinity: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of pairs (B, n, n), and the numbers of pairs of one class and of two, one added."""
    same, other = target == 1, target == 0
    positives, negatives = same.sum() + 1, other.sum() + 1
    loss = (1 - affinity[same]).sum() / positives + affinity[other].sum() / negatives
    return loss / 2, positives, negatives


def step(
    method: Step, images: Tensor, labels_of: Sequence[Classes], phase: str, seconds: Seconds | None = None
) -> Losses:
    """One step up to the gradients, which are left at the decoder's parameters."""
    seconds = Seconds() if seconds is None else seconds
    forward = method.forward(images, labels_of, phase, seconds)
    with seconds.part(DECODER):
        found = losses(method, forward, forward.pseudo, phase)
        method.decoder.zero_grad()
        found.total.backward()
    return found


def load(method: str, folder: Path, clip: Path) -> Step:
    """The method with the published numbers' weights and texts."""
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    vision: Any = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=torch.float32)
    vision.eval().requires_grad_(False)
    with np.load(folder / "text.npz") as file:
        text = {key: torch.from_numpy(value) for key, value in file.items()}
    weights = {name: value.float() for name, value in load_file(folder / "decoder.safetensors").items()}
    width = len(weights["decoder_fts_fuse.linear_fuse.bias"])
    layers = vision.config.num_hidden_layers - (method == "weclip")
    decoder = Decoder(layers, vision.config.hidden_size, width, dropout=0.0)
    decoder.load_state_dict(weights)
    if method == "weclip":
        vision.load_state_dict(load_file(folder / "query_bias.safetensors"), strict=False)
        texts = torch.cat([text["voc_fg"], text["voc_bg"]])
        scale = load_file(clip / "model.safetensors").get("logit_scale", torch.tensor(LOGIT_SCALE))
        return WeclipStep(vision, texts, 20, decoder, float(scale))
    own = text["voc_text"]
    return ExcelStep(vision, torch.cat([enriched(own[:20], text["voc_bank"]), own[20:]]), 20, decoder)


def weclip_stages(method: WeclipStep, images: Tensor, classes: Classes) -> dict[str, Tensor]:
    """What each stage makes of an image (1, 3, H, W), under the names of the published numbers."""
    grid, size = grid_of(method.vision, images), size_of(images)
    encoding = method.encode(images)
    hidden = encoding.features[-1][0]
    with torch.no_grad():
        fused, logits = method.decoder(encoding.features, grid)
        affinity = method.affinity(fused)[0]
        chances, _ = method.probabilities(hidden, method.last_tokens(hidden), classes)
    found, last = method.cams(hidden, classes, grid)
    attentions = torch.stack([*(maps[0] for maps in encoding.attentions), last])
    static, gated = (method.refine(found, attentions, gate) for gate in (None, affinity))
    scores = assemble([cam.numpy() for cam in static], size)
    gated_scores = assemble([cam.numpy() for cam in gated], size)
    return {
        "features_rows": torch.stack(encoding.features)[:, 0],
        "attention_rows": attentions,
        "gradcam": found,
        "probabilities": chances,
        "refined_static": static,
        "scores_static": scores,
        "par_static": par(images, scores[None])[0],
        "pseudo_static": pseudo_mask(images[0], scores, classes),
        "layer_gap": gaps(attentions[-6:], affinity),
        "refined_gated": gated,
        "pseudo_gated": pseudo_mask(images[0], gated_scores, classes),
        "fused": fused[0],
        "logits": logits[0],
        "affinity_rows": affinity,
    }


def excel_stages(method: ExcelStep, images: Tensor, classes: Classes) -> dict[str, Tensor]:
    """What each stage makes of an image (1, 3, H, W), under the names of the published numbers."""
    grid, size = grid_of(method.vision, images), size_of(images)
    encoding = method.encode(images)
    with torch.no_grad():
        fused, logits = method.decoder(encoding.features, grid)
        affinity = method.affinity(fused)[0]
    guided = method.encode(images, guide=method.guide(fused))
    attentions = torch.stack([maps[0] for maps in encoding.attentions])
    raw, lvc = method.cams(encoding)[0], method.cams(guided)[0]

    def refine(maps: Tensor, gate: Tensor | None) -> Tensor:
        return method.refine(maps[:, list(classes)].T.unflatten(1, grid), attentions, gate)

    static = refine(raw, None)
    scores = assemble([cam.numpy() for cam in static], size)
    return {
        "input": images[0],
        "features_rows": torch.stack(encoding.features)[:, 0],
        "attention_rows": attentions,
        "calibrated_rows": torch.stack(encoding.calibrated)[:, 0],
        "calibrated_guided_rows": torch.stack(guided.calibrated)[:, 0],
        "patch_features": encoding.patches[0],
        "cam_raw": raw,
        "cam_refined": static,
        "mask_train": pseudo_mask(denormalised(images)[0], scores, classes),
        "fused": fused[0],
        "logits": logits[0],
        "affinity_rows": affinity,
        "layer_gap": gaps(attentions[-6:], affinity),
        "cam_lvc": lvc,
        "refined_gated": refine(raw, affinity),
        "refined_gated_lvc": refine(lvc, affinity),
    }


def check(
    method: str, case: str, folder: Path | None = None, clip: Path = GOLDEN / "vision"
) -> dict[str, float]:
    """Stage to the largest difference to the published code's numbers, in units of their largest.

    Of masks it is the share of pixels that differ. Losses and gradients are those for the published pseudo masks.

    Args:
        method: ``weclip`` or ``excel``.
        case: the file: ``step_early`` and its like, or ``motorcycle_voc`` for the stages of a picture.
    """
    folder = folder or GOLDEN / method
    plain = load(method, folder, clip)
    with np.load(folder / f"{case}.npz") as file:
        expected = dict(file.items())
    if case.startswith("step_"):
        return check_step(plain, folder, case.removeprefix("step_"), expected)
    return check_stages(plain, folder / "images" / f"{case.removesuffix('_voc')}.png", expected)


def check_stages(method: Step, picture: Path, expected: dict[str, NDArray[Any]]) -> dict[str, float]:
    """:func:`check` of one picture's stages."""
    classes = expected["label_ids"].tolist()
    if isinstance(method, WeclipStep):
        found = weclip_stages(method, normalised(expected["crop"][None]), classes)
    else:
        assert isinstance(method, ExcelStep)
        rgb = np.ascontiguousarray(cv2.imread(str(picture))[..., ::-1])
        images = F.interpolate(normalised(rgb[None]), size=expected["input"].shape[1:], mode="bilinear")
        found = excel_stages(method, images, classes)
    differences = {}
    for stage, value in found.items():
        if stage in expected:
            if stage == "features_rows" and "features_index" in expected:
                value = value[..., expected["features_index"], :]
            elif stage == "affinity_rows":
                value = value[expected["rows"][1:] - 1]
            elif stage.endswith("_rows"):
                value = value[..., expected["rows"], :]
            elif stage in ("scores_static", "par_static"):
                value = value[:, :: int(expected["stride"]), :: int(expected["stride"])]
            differences[stage] = difference(stage, value, expected[stage])
    return differences


def check_step(method: Step, folder: Path, phase: str, expected: dict[str, NDArray[Any]]) -> dict[str, float]:
    """:func:`check` of one training step."""
    with np.load(folder / "step_early.npz") as file:
        early = dict(file.items())
    if isinstance(method, WeclipStep):
        names = list(json.loads((folder / "labels.json").read_text()))[:2]
        labels_of = [np.load(folder / f"{name}_voc.npz")["label_ids"].tolist() for name in names]
    else:
        labels_of = [early[f"label_ids_{index}"].tolist() for index in range(2)]
    method.decoder.train()
    forward = method.forward(normalised(early["crops"]), labels_of, phase)
    step_losses = losses(method, forward, torch.from_numpy(expected["pseudo"]).long(), phase)
    step_losses.total.backward()
    found = {
        "refined": torch.cat(forward.refined),
        "pseudo": forward.pseudo,
        "prediction": forward.prediction,
        "logits": forward.logits,
        "loss_seg": step_losses.segmentation,
        "loss_aff": step_losses.affinity,
        "loss": step_losses.total,
        "positives": step_losses.positives,
        "negatives": step_losses.negatives,
    }
    if forward.maps is not None:
        found["cam_raw"] = forward.maps
    for name, parameter in method.decoder.named_parameters():
        assert parameter.grad is not None
        found[f"norm/{name}"] = parameter.grad.norm()
        found[f"grad/{name}"] = parameter.grad
    assert all(key in found for key in expected if key.startswith("norm/"))
    return {
        stage: difference(stage, value, expected[stage])
        for stage, value in found.items()
        if stage in expected
    }


def difference(stage: str, found: Tensor, expected: NDArray[Any]) -> float:
    """The largest, in units of the largest expected value; of masks the share of pixels."""
    values = found.detach().numpy()
    assert values.shape == expected.shape, stage
    if stage in ("prediction", "mask_train") or stage.startswith("pseudo"):
        return float((values != expected).mean())
    return float(np.abs(values - expected.astype(np.float64)).max() / np.abs(expected).max())


CASES = {
    "weclip": ("motorcycle_voc", "astronaut_voc", "step_early", "step_late"),
    "excel": ("motorcycle_voc", "astronaut_voc", "step_early", "step_lvc", "step_self"),
}


if __name__ == "__main__":
    for method, cases in CASES.items():
        for case in cases:
            print(f"{method}, {case}")
            shown: dict[str, float] = {}
            for stage, value in check(method, case).items():
                kind = stage.split("/")[0]
                shown[kind] = max(value, shown.get(kind, 0.0))
            for stage, value in shown.items():
                print(f"    {stage:<24} {value:.1e}")
