"""ExCEL without training written plainly, step by step as the published code does it: what our speed is measured
against.

One image at a time in float32; of all blocks the attention maps of every head are kept, and of the calibrated ones
the maps of queries, keys and values too; the likeness of patches and texts as one product per channel; the affinity
as a matrix, squared; PAR with the scores held once for each of 48 neighbours. ``check`` compares it with the outputs
of the published code under tests/golden/excel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SIDE, CALIBRATED, LAYERS, THRESHOLD = 320, 5, 6, 0.79
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DILATIONS, ITERATIONS, WIDTH = (1, 2, 4, 8, 12, 24), 20, 0.3
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


@dataclass
class Encoding:
    """What CLIP sees in an image of N - 1 patches.

    Attributes:
        grid: rows and columns of patches.
        attentions: of each block, (H, N, N).
        likenesses: of each calibrated block, the maps of queries, of keys and of values, (3, H, N, N).
        stream: the calibrated stream's last tokens (N, D), the class token that of the plain one.
        features: these in the space of the texts (N, P), each channel of length 1 over the tokens.
    """

    grid: tuple[int, int]
    attentions: list[Tensor] = field(default_factory=list)
    likenesses: list[Tensor] = field(default_factory=list)
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    features: Tensor = field(default_factory=lambda: torch.empty(0))


class PlainExcel:
    """Masks by the book.

    Args:
        vision: ``transformers.CLIPVisionModelWithProjection``, frozen, float32.
        texts: unit rows (T, P), those of the classes first and enriched.
        side: of the square that CLIP sees, pixels.
    """

    def __init__(self, vision: Any, texts: Tensor, side: int = SIDE) -> None:
        self.vision, self.texts, self.side = vision, texts, side

    def mask(self, rgb: NDArray[np.uint8], classes: Sequence[int]) -> NDArray[np.uint8]:
        """Label (H, W) of an image (H, W, 3); ``classes`` are rows from 0."""
        square = self.square(rgb)
        scores = self.scores(square, classes, (rgb.shape[0], rgb.shape[1]))
        return labels(refined(square, scores), classes)

    def square(self, rgb: NDArray[np.uint8]) -> Tensor:
        """CLIP's input (3, side, side) of an image (H, W, 3)."""
        device = self.texts.device
        pixels = torch.from_numpy(rgb).to(device).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, DEVIATION))
        pixels = (pixels - mean) / deviation
        size = (self.side, self.side)
        return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]

    def scores(self, square: Tensor, classes: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Background and classes (1 + K, H, W) in 0..1."""
        encoding = self.encode(square)
        maps = cams(encoding.features, self.texts)[1:, list(classes)]
        matrix = affinity(encoding.attentions)
        spread = [refine(cam, matrix, encoding.grid) for cam in maps.T]
        return assemble(spread, size)

    @torch.no_grad()
    def encode(self, square: Tensor) -> Encoding:
        """All blocks, and the calibrated stream beside the last ones."""
        model = self.vision.vision_model
        patch = self.vision.config.patch_size
        encoding = Encoding((square.shape[1] // patch, square.shape[2] // patch))
        cells = model.embeddings.patch_embedding(square[None]).flatten(2).transpose(1, 2)
        table = model.embeddings.position_embedding.weight
        before = int((len(table) - 1) ** 0.5)
        positions = table[1:].T.reshape(1, -1, before, before)
        positions = F.interpolate(positions, size=encoding.grid, mode="bilinear", align_corners=False)
        table = torch.cat([table[:1], positions.flatten(2)[0].T])
        hidden = torch.cat([model.embeddings.class_embedding[None, None], cells], dim=1) + table
        hidden = model.pre_layrnorm(hidden)[0]
        first = len(model.encoder.layers) - CALIBRATED
        for index, layer in enumerate(model.encoder.layers):
            if index == first:
                encoding.stream = hidden
            hidden = block(layer, hidden, encoding, calibrated=index >= first)
        encoding.stream = torch.cat([hidden[:1], encoding.stream[1:]])
        projected = self.vision.visual_projection(model.post_layernorm(encoding.stream))
        encoding.features = projected / projected.norm(dim=0, keepdim=True)
        return encoding


def block(layer: Any, hidden: Tensor, encoding: Encoding, *, calibrated: bool) -> Tensor:
    """Tokens (N, D) after a block of CLIP, whose maps are added to the encoding."""
    module, tokens = layer.self_attn, layer.layer_norm1(hidden)
    heads, length = module.num_heads, len(tokens)
    query, key, value = (
        projection(tokens).view(length, heads, -1).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    scale = query.shape[-1] ** -0.5
    attention = torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1)
    encoding.attentions.append(attention)
    if calibrated:
        maps = [torch.softmax(part @ part.transpose(1, 2) * scale, dim=-1) for part in (query, key, value)]
        encoding.likenesses.append(torch.stack(maps))
        likeness = encoding.likenesses[-1].mean(dim=0).sum(dim=0)  # one map for the values of all heads
        alike = module.out_proj((likeness @ value).transpose(0, 1).flatten(1))
        encoding.stream = encoding.stream + alike
    hidden = hidden + module.out_proj((attention @ value).transpose(0, 1).flatten(1))
    output: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
    return output


def enriched(texts: Tensor, bank: Tensor) -> Tensor:
    """Unit rows (T, P) of class texts with what a bank of attributes (P, b) knows of them."""
    likeness = texts @ bank
    dropped = int((1 - 0.9) * bank.shape[1])
    for row in likeness:
        row[row.argsort()[:dropped]] = -torch.inf
    return F.normalize(torch.softmax(likeness, dim=1) @ bank.T + texts, dim=1)


@torch.no_grad()
def cams(features: Tensor, texts: Tensor) -> Tensor:
    """Maps (N, T) in 0..1 out of features (N, P) and texts (T, P), class token first."""
    products = features[:, None] * texts[None]
    probabilities = torch.softmax(2 * features[0] @ texts.T, dim=0)
    products = products * (probabilities / probabilities.mean())[:, None]
    products = products - products.mean(dim=1, keepdim=True)
    maps = products.sum(dim=2)
    low, high = maps.amin(dim=0), maps.amax(dim=0)
    return (maps - low) / (high - low)


@torch.no_grad()
def affinity(attentions: Sequence[Tensor]) -> Tensor:
    """How patches pass on to each other (N - 1, N - 1), out of each block's attention (H, N, N)."""
    matrix = torch.stack(means_and_sums(attentions))[-LAYERS:].mean(dim=0)[1:, 1:]
    for _ in range(3):
        matrix = matrix / matrix.sum(dim=0, keepdim=True)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    matrix = (matrix + matrix.T) / 2
    return matrix @ matrix


def means_and_sums(attentions: Sequence[Tensor]) -> list[Tensor]:
    """Each block's attention (N, N): the heads' mean, in calibrated blocks their sum, as published."""
    plain, calibrated = attentions[:-CALIBRATED], attentions[-CALIBRATED:]
    return [maps.mean(dim=0) for maps in plain] + [maps.sum(dim=0) for maps in calibrated]


def refine(cam: Tensor, matrix: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """A map (h * w) spread along the affinity, (h, w)."""
    mask = torch.zeros(grid)
    for left, top, right, bottom in boxes(cam.view(grid).cpu().numpy()):
        mask[top:bottom, left:right] = 1
    return ((matrix * mask.view(1, -1).to(cam.device)) @ cam).view(grid).cpu().numpy()


def boxes(cam: NDArray[np.float32]) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of the parts of a map (h, w) above the threshold, short of its last row and column."""
    steps = (cam * 255).astype(np.uint8)
    foreground = (steps > int(THRESHOLD * steps.max())).astype(np.uint8)
    contours, _ = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour in contours:
        left, top, width, height = cv2.boundingRect(contour)
        right, bottom = min(left + width, cam.shape[1] - 1), min(top + height, cam.shape[0] - 1)
        found.append((left, top, right, bottom))
    return found


def assemble(maps: Sequence[NDArray[np.float32]], size: tuple[int, int]) -> Tensor:
    """Scores (1 + K, H, W) of the background and of classes, out of maps (h, w) of any range."""
    scores = []
    for cam in maps:
        shifted = cam - cam.min()
        scores.append(cv2.resize(shifted / (1e-7 + shifted.max()), (size[1], size[0])))
    classes = torch.from_numpy(np.stack(scores))
    return torch.cat([1 - classes.amax(dim=0, keepdim=True), classes])


def labels(scores: Tensor, classes: Sequence[int]) -> NDArray[np.uint8]:
    """Label (H, W), 0 for the background, out of scores (1 + K, H, W)."""
    values = np.array([0, *(index + 1 for index in classes)], np.uint8)
    found: NDArray[np.uint8] = values[scores.argmax(dim=0).cpu().numpy()]
    return found


@torch.no_grad()
def refined(square: Tensor, scores: Tensor) -> Tensor:
    """Scores (L, H, W) after PAR with the image (3, h, w), which is brought to their size."""
    size = scores.shape[1:]
    scores = scores.to(square.device)
    image = F.interpolate(square[None], size=size, mode="bilinear", align_corners=True)
    return par(image, scores[None])[0]


def par(images: Tensor, scores: Tensor) -> Tensor:
    """PAR by the book: images (B, 3, H, W) and scores (B, L, H, W), float32, to refined scores."""
    around = neighbours(images)
    deviation = around.std(dim=2, keepdim=True)
    colour = -(((around - images[:, :, None]).abs() / (deviation + 1e-8) / WIDTH) ** 2)
    weights = torch.softmax(colour.mean(dim=1, keepdim=True), dim=2)
    distances = torch.tensor([by * way for by in DILATIONS for way in (1, math.sqrt(2))]).repeat_interleave(4)
    distances = distances.view(-1, 8)[:, [4, 0, 5, 1, 2, 6, 3, 7]].reshape(1, 1, -1, 1, 1)
    nearness = torch.softmax(-((distances / (distances.std() + 1e-8) / WIDTH) ** 2), dim=2)
    weights = weights + 0.01 * nearness.to(weights.device)
    for _ in range(ITERATIONS):
        scores = (neighbours(scores) * weights).sum(dim=2)
    return scores


def neighbours(values: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 48, H, W)."""
    height, width = values.shape[2:]
    found = []
    for by in DILATIONS:
        padded = F.pad(values, (by,) * 4, mode="replicate")
        for down in (0, by, 2 * by):
            for right in (0, by, 2 * by):
                if (down, right) != (by, by):
                    found.append(padded[:, :, down : down + height, right : right + width])
    return torch.stack(found, dim=2)


def stages(method: PlainExcel, rgb: NDArray[np.uint8], classes: Sequence[int]) -> dict[str, Tensor]:
    """What each stage makes of an image (H, W, 3) and its ``classes``, under the names of the published numbers."""
    square, size = method.square(rgb), (rgb.shape[0], rgb.shape[1])
    encoding = method.encode(square)
    maps, matrix = cams(encoding.features, method.texts)[1:], affinity(encoding.attentions)
    chosen = [cam.view(encoding.grid) for cam in maps[:, list(classes)].T]
    spread = [refine(cam.flatten(), matrix, encoding.grid) for cam in chosen]
    scores = assemble(spread, size)
    after = refined(square, scores)
    likenesses = torch.stack(encoding.likenesses)
    found_boxes = [(index, *box) for index, cam in enumerate(chosen) for box in boxes(cam.numpy())]
    return {
        "input": square,
        "attention_rows": torch.stack(means_and_sums(encoding.attentions)),
        "qq_rows": likenesses[:, 0],
        "kk_rows": likenesses[:, 1],
        "vv_rows": likenesses[:, 2],
        "calibrated_rows": likenesses.mean(dim=1).sum(dim=1),
        "patch_features": encoding.features,
        "cam_raw": maps[:, :20],
        "boxes": torch.tensor(sorted(found_boxes)),
        "cam_refined": torch.from_numpy(np.stack(spread)),
        "scores": scores,
        "par": after,
        "mask": torch.from_numpy(labels(after, classes)),
    }


def check(
    folder: Path = GOLDEN / "excel", name: str = "motorcycle", clip: Path = GOLDEN / "vision"
) -> dict[str, float]:
    """Stage to the largest difference to the published code's numbers, in units of their largest.

    Of the mask it is the share of pixels that differ.
    """
    from transformers import CLIPVisionModelWithProjection

    from wsss_pipeline.data.images import read_image

    vision: Any = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=torch.float32)
    vision.eval().requires_grad_(False)
    with np.load(folder / "text.npz") as file:
        own, bank, expected_texts = (
            torch.from_numpy(file[key]) for key in ("voc_text", "voc_bank", "voc_enriched")
        )
    texts = torch.cat([enriched(own[:20], bank), own[20:]])
    with np.load(folder / f"{name}_voc.npz") as file:
        expected = {key: torch.from_numpy(value) for key, value in file.items()}
    expected["boxes"] = torch.tensor(sorted(expected["boxes"].tolist()))
    method = PlainExcel(vision, texts, expected["input"].shape[1])
    found = stages(method, read_image(folder / "images" / f"{name}.png"), expected["label_ids"].tolist())
    rows, every = expected["rows"].long(), int(expected["stride"])
    differences = {"texts": float((texts - expected_texts).abs().max())}
    for stage, value in found.items():
        if stage.endswith("_rows"):
            value = value[..., rows[::4] if stage[:2] in ("qq", "kk", "vv") else rows, :]
        elif stage in ("scores", "par"):
            value = value[:, ::every, ::every]
        if stage == "mask":
            differences[stage] = float((value != expected[stage]).double().mean())
        elif stage in expected:
            assert value.shape == expected[stage].shape, stage
            difference = (value.double() - expected[stage].double()).abs().max()
            differences[stage] = float(difference / expected[stage].abs().max())
    return differences


if __name__ == "__main__":
    for stage, value in check().items():
        print(f"{stage:<16} {value:.1e}")
