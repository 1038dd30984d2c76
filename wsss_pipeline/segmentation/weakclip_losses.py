"""Losses of WeakCLIP (Zhu et al., IJCV 2024), as its published code has them: seeding, CRF boundary, score map.

Seeding and boundary loss are those of SEC (Kolesnikov and Lampert, "Seed, Expand and Constrain", ECCV 2016) with
other constants; they look at a coarse grid of probabilities, see :func:`grid_probabilities`. As in ``losses``, each
of several processes gets its part of the loss of the whole batch: each loss is a sum over this process's pictures,
divided by the number of all processes' pictures.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.data.masks import ignore_value
from wsss_pipeline.refine.dense_crf_cpu import infer
from wsss_pipeline.refine.dense_crf_torch import infer_batch
from wsss_pipeline.runtime.device import images_at_a_time

TEMPERATURE = 0.07  # of the score map
LEAST_COUNT = 1e-4
LEAST_PROBABILITY = 1e-4  # of the CRF's input and of its posterior
LARGEST_RATIO = 20.0  # of the posterior to the network's probability, and of that to the posterior
BOUNDARY_CRF = CrfConfig(
    gaussian_sxy=3.0, gaussian_weight=3.0, bilateral_sxy=80.0, bilateral_srgb=13.0, bilateral_weight=10.0
)


@dataclass(frozen=True)
class Pictures:
    """What the crops of a batch are, for losses that look at more than their target.

    Attributes:
        pixels: float32 (B, 3, H, W), normalised.
        mean: RGB, for values in [0, 1], with which they are.
        std: the same.
        present: bool (B, 1+C), classes of the whole image by its image-level labels; all False where none are known.
        counted: bool (B,), False for a copy in the place of a picture that can't be used.
    """

    pixels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    present: Tensor
    counted: Tensor


def grid_probabilities(logits: Tensor, side: int) -> Tensor:
    """Probabilities on a grid, float32 (B, 1+C, side, side), none of them 0.

    Args:
        logits: float (B, 1+C, h, w).
        side: rows, and columns, of the grid; published: 64.
    """
    coarse = F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)
    floored = coarse.softmax(dim=1) + 1e-7
    return floored / floored.sum(dim=1, keepdim=True)


def seeding_loss(probability: Tensor, target: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """Cross entropy in which background and foreground of each picture count the same, mean over pictures.

    Per picture the weighted mean of -log p of the label over the pixels labelled background, plus that over those
    labelled otherwise. One of the two that the picture hasn't got adds 0; so does a picture without labels.

    Args:
        probability: float32 (B, 1+C, g, g).
        target: int64 (B, H, W), 0..C, 255 where there is no label. A grid's pixel (i, j) has the label of pixel
            (floor(i H / g), floor(j W / g)).
        weights: float (B, H, W), at least 0.
        pictures: number of pictures that the mean is over, at least 1.
    """
    (side, _), (height, width) = probability.shape[-2:], target.shape[-2:]
    place = torch.arange(side, device=target.device)
    at = (slice(None), place[:, None] * height // side, place * width // side)
    labels, shares = target[at], weights[at]
    is_labelled = labels != ignore_value(probability.shape[1])
    own = labels.masked_fill(~is_labelled, 0)[:, None]
    entropy = -probability.gather(1, own)[:, 0].log()
    loss = probability.new_zeros(())
    for part in (labels == 0, (labels != 0) & is_labelled):
        share = shares * part
        loss = loss + ((share * entropy).sum((1, 2)) / share.sum((1, 2)).clamp(min=LEAST_COUNT)).sum()
    return loss / pictures


def boundary_loss(probability: Tensor, posterior: Tensor, counted: Tensor, pictures: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the probabilities from the CRF's posterior, mean over pictures and pixels.

    Their ratio is cut off at 1/20 and 20; beyond there is no gradient.

    Args:
        probability: float32 (B, 1+C, g, g), none of them 0.
        posterior: float32 (B, 1+C, g, g), see :func:`crf_posterior`.
        counted: bool (B,), those of the pictures that take part.
        pictures: number of those that the mean is over, at least 1.
    """
    ratio = (posterior / probability).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    divergence = (posterior * ratio.log()).sum(dim=1).mean(dim=(1, 2))
    return (divergence * counted).sum() / pictures


def score_loss(score: Tensor, target: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """Cross entropy of the score map at the size of the target, divided by the number of all pixels.

    Pixels without a label add nothing, but are among those that it is divided by, as published.

    Args:
        score: float (B, 1+C, h, w), cosines.
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        weights: float (B, H, W), at least 0.
        pictures: number of pictures whose pixels it is divided by, at least 1.
    """
    size = target.shape[-2:]
    logits = F.interpolate(score.float() / TEMPERATURE, size, mode="bilinear", align_corners=False)
    ignore = ignore_value(logits.shape[1])
    entropy = F.cross_entropy(logits, target, ignore_index=ignore, reduction="none")
    return (entropy * weights).mean(dim=(1, 2)).sum() / pictures


def allowed(present: Tensor) -> Tensor:
    """Classes that may be in a picture, bool (B, 1+C): background and those present; all where none is known.

    Args:
        present: see ``Pictures``.
    """
    is_background = torch.arange(present.shape[1], device=present.device) == 0
    return present | is_background | ~present.any(dim=1, keepdim=True)


def without_absent(target: Tensor, present: Tensor) -> Tensor:
    """Labels, 255 in place of those of classes that their picture hasn't got by its image-level labels.

    Args:
        target: int64 (B, H, W), 0..C, 255 where there is no label.
        present: see ``Pictures``.
    """
    ignore = ignore_value(present.shape[1])
    labels = target.masked_fill(target == ignore, 0)
    is_allowed = allowed(present).gather(1, labels.flatten(1)).view_as(target)
    return target.masked_fill(~is_allowed, ignore)


@torch.no_grad()
def crf_pictures(pictures: Pictures, side: int) -> Tensor:
    """What the CRF of the boundary loss sees: uint8 (B, side, side, 3) RGB, beyond an image's edge the mean colour.

    Corners stay corners (``align_corners``), levels are cut off, not rounded.
    """
    # in double precision as published: a level that is whole would else be cut off to the one below, now and then
    size = (side, side)
    coarse = F.interpolate(pictures.pixels.double(), size, mode="bilinear", align_corners=True).float()
    mean, std = (
        torch.tensor([255 * value for value in row], device=coarse.device)[:, None, None]
        for row in (pictures.mean, pictures.std)
    )
    return (coarse * std + mean).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def crf_posterior(seen: Tensor, probability: Tensor, present: Tensor | None = None) -> Tensor:
    """The dense CRF's posterior, float32 (B, 1+C, g, g), at least some 1e-4 and summing to 1 over the classes.

    On a GPU all pictures go through one lattice; on a CPU each has a thread, as many at a time as there are cores.

    Args:
        seen: uint8 (B, g, g, 3) RGB, see :func:`crf_pictures`.
        probability: float32 (B, 1+C, g, g).
        present: bool (B, 1+C), see ``Pictures``; others than these and background get 0. None for all classes.
    """
    energy = -probability.clamp(min=LEAST_PROBABILITY).log()
    chosen = [torch.arange(energy.shape[1], device=energy.device)] * len(energy)
    if present is not None:
        chosen = [row.nonzero()[:, 0] for row in allowed(present)]
    unaries = [own[classes] for own, classes in zip(energy, chosen, strict=True)]
    if energy.device.type == "cpu":
        images = [image.numpy() for image in seen]
        arrays = [np.ascontiguousarray(unary.numpy()) for unary in unaries]
        with ThreadPoolExecutor(images_at_a_time()) as threads:
            found = threads.map(lambda image, unary: infer(image, unary, BOUNDARY_CRF), images, arrays)
            posteriors = [torch.from_numpy(array) for array in found]
    else:
        posteriors = infer_batch(list(seen), unaries, BOUNDARY_CRF)
    full = torch.zeros_like(energy)
    for own, classes, posterior in zip(full, chosen, posteriors, strict=True):
        own[classes] = posterior
    floored = full.clamp(min=LEAST_PROBABILITY)
    return floored / floored.sum(dim=1, keepdim=True)
