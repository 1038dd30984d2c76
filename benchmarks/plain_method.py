"""Stage one written plainly, step by step as the published code does it: what our speed is measured against.

One image at a time in float32; the attention of all layers kept; for each class a forward and backward pass of
the last block, the affinity of the whole attention matrix, Sinkhorn rounds and square included; pydensecrf at
the end. ``check`` compares it with the outputs of the published code under tests/golden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydensecrf import densecrf
from torch import Tensor

LAYERS, THRESHOLD = 8, 0.4
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


class PlainMethod:
    """Masks by the book.

    Args:
        vision: ``transformers.CLIPVisionModelWithProjection``, frozen, float32.
        foreground: unit rows (C, P) of the classes; background: those of the background words (G, P).
    """

    rounded_positions = True

    def __init__(self, vision: Any, foreground: Tensor, background: Tensor, logit_scale: float) -> None:
        self.vision = vision
        self.foreground, self.background = foreground, background
        self.logit_scale = logit_scale

    def mask(self, rgb: NDArray[np.uint8], clip_input: Tensor, classes: Sequence[int]) -> NDArray[np.uint8]:
        """Label (H, W) of an image (H, W, 3); ``clip_input`` (1, 3, h, w); ``classes`` are rows from 0."""
        cams = self.refined_cams(clip_input, classes)
        size = (rgb.shape[1], rgb.shape[0])
        scores = np.stack([cv2.resize(rescaled(cam), size) for cam in cams]).astype(np.float16)
        scores = np.concatenate([1 - scores.max(axis=0, keepdims=True), scores])
        values = np.array([0, *(index + 1 for index in classes)], np.uint8)
        return values[plain_crf(rgb, scores).argmax(axis=0)]

    def refined_cams(self, clip_input: Tensor, classes: Sequence[int]) -> list[NDArray[np.float32]]:
        """One map (h, w) for each class."""
        hidden, attentions, grid = self.trunk(clip_input)
        texts = torch.cat([self.foreground[list(classes)], self.background])
        refined = []
        for target in range(len(classes)):
            raw, last = self.raw_cam(hidden, texts, target, grid)
            cam = torch.from_numpy(rescaled(F.relu(torch.from_numpy(rescaled(F.relu(raw).numpy()))).numpy()))
            refined.append(affinity(cam, [*attentions, last], grid))
        return refined

    @torch.no_grad()
    def trunk(self, images: Tensor) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        model = self.vision.vision_model
        patch = self.vision.config.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        cells = model.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        table = model.embeddings.position_embedding.weight
        side = int((len(table) - 1) ** 0.5)
        square = table[1:].T.reshape(1, -1, side, side)
        resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False).flatten(2)[0].T
        table = torch.cat([table[:1], resized])
        table = table.half().float() if self.rounded_positions else table
        hidden = torch.cat([model.embeddings.class_embedding[None, None], cells], dim=1) + table
        hidden = model.pre_layrnorm(hidden)[0]
        attentions = []
        for layer in model.encoder.layers[:-1]:
            mixed, attention = attend(layer.self_attn, layer.layer_norm1(hidden))
            attentions.append(attention)
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden, attentions, grid

    def raw_cam(
        self, hidden: Tensor, texts: Tensor, target: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Softmax-GradCAM (h, w) of a row of the texts, and the last block's attention (N, N)."""
        model = self.vision.vision_model
        layer = model.encoder.layers[-1]
        tokens = layer.layer_norm1(hidden).detach().requires_grad_()
        mixed, attention = attend(layer.self_attn, tokens)
        output = hidden + mixed
        output = output + layer.mlp(layer.layer_norm2(output))
        patches = self.vision.visual_projection(model.post_layernorm(output)[1:])
        embedding = F.normalize(patches.mean(dim=0), dim=0)
        self.probabilities(texts, embedding)[target].backward()
        assert tokens.grad is not None
        weights = tokens.grad[1:].mean(dim=0)
        return (tokens.detach()[1:] @ weights).view(grid).cpu(), attention.detach()

    def probabilities(self, texts: Tensor, embedding: Tensor) -> Tensor:
        """Of the texts' rows (T), out of an image's unit vector (P)."""
        return torch.softmax(self.logit_scale * texts @ embedding, dim=0)


def attend(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Output (N, D) of a self-attention and its probabilities (N, N), mean over the heads."""
    heads, length = module.num_heads, len(tokens)
    query, key, value = (
        projection(tokens).view(length, heads, -1).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    probabilities = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
    mixed = (probabilities @ value).transpose(0, 1).flatten(1)
    return module.out_proj(mixed), probabilities.mean(dim=0)


@torch.no_grad()
def affinity(
    cam: Tensor,
    attentions: Sequence[Tensor],
    grid: tuple[int, int],
    mask: Tensor | None = None,
    rounds: int = 3,
) -> NDArray[np.float32]:
    """A CAM (h, w) spread along the mean of the last layers' attention, from within a mask (h, w)."""
    matrix = torch.stack(list(attentions))[-LAYERS:].mean(dim=0)[1:, 1:]
    for _ in range(rounds):
        matrix = matrix / matrix.sum(dim=0, keepdim=True)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    matrix = (matrix + matrix.T) / 2
    matrix = matrix @ matrix
    mask = box_mask(cam.numpy()) if mask is None else mask
    spread = (matrix * mask.reshape(1, -1).to(matrix.device)) @ cam.reshape(-1, 1).to(matrix.device)
    return spread.view(grid).cpu().numpy()


def box_mask(cam: NDArray[np.float32], threshold: float = THRESHOLD) -> Tensor:
    """1 within the boxes around the parts of a CAM above the threshold, short of the last row and column."""
    steps = (cam * 255).astype(np.uint8)
    foreground = (steps > int(threshold * steps.max())).astype(np.uint8)
    contours, _ = cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask = torch.zeros(cam.shape)
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        mask[y : min(y + height, cam.shape[0] - 1), x : min(x + width, cam.shape[1] - 1)] = 1
    return mask


def rescaled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Minimum 0, divided by the maximum plus 1e-7."""
    shifted = values - values.min()
    scaled: NDArray[np.float32] = shifted / (1e-7 + shifted.max())
    return scaled


def plain_crf(rgb: NDArray[np.uint8], scores: NDArray[np.float16]) -> NDArray[np.float32]:
    """Posterior (L, H, W) of the dense CRF."""
    unary = -np.log(np.clip(scores, np.float16(1e-5), np.float16(1))).astype(np.float32)
    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1)))
    crf.addPairwiseGaussian(sxy=1, compat=3)
    crf.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(rgb[..., ::-1]), compat=4)
    return np.array(crf.inference(10)).reshape(labels, height, width)


def check() -> float:
    """Largest difference of the refined CAMs to the published code's, in units of the largest value."""
    import json

    from transformers import CLIPVisionModelWithProjection

    from wsss_pipeline.data.images import read_image
    from wsss_pipeline.data.transforms import prepare_image

    vision = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    vision.eval().requires_grad_(False)
    text = np.load(GOLDEN / "expected" / "text.npz")
    rows, words = torch.from_numpy(text["fg"]), torch.from_numpy(text["bg"])
    method = PlainMethod(vision, rows, words, float(np.exp(4.60546875)))
    largest = 0.0
    for name in json.loads((GOLDEN / "labels.json").read_text()):
        expected = np.load(GOLDEN / "expected" / f"{name}.npz")
        image = read_image(GOLDEN / "images" / f"{name}.png")
        clip_input = prepare_image(image, vision.config.patch_size, 1 << 20).pixels[None]
        found = np.stack(method.refined_cams(clip_input, expected["label_ids"].tolist()))
        reference = expected["refined_low"]
        largest = max(largest, float(np.abs(found - reference).max() / (reference.max() or 1)))
    return largest


if __name__ == "__main__":
    print(f"refined CAMs differ from the published code's by at most {check():.1e} of their largest value")
