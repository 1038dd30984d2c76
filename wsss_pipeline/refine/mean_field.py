"""Mean-field inference of the dense CRF on our own permutohedral lattice: torch, for GPUs, images together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine.lattice import POINTS_AT_A_TIME, PermutohedralLattice


def infer_batch(images: Sequence[Tensor], unaries: Sequence[Tensor], parameters: CrfConfig) -> list[Tensor]:
    """Posteriors of several images of any sizes, which go through one lattice a kernel.

    Each iteration is Q = softmax(-U + sum_k w_k N_k F_k (N_k Q)) with F_k the Gaussian filter of kernel k
    and N_k = (F_k 1)^(-1/2), the symmetric normalisation (NIPS 2011, algorithm 1, Potts model). Building a
    lattice waits for the device twice; the iterations never do.

    Args:
        images: uint8 (H, W, 3) on the device, as the bilateral kernel is to see them.
        unaries: per image float32 (L, H, W) on the device, L >= 1.
        parameters: of the kernels, and the number of iterations.

    Returns:
        Per image float32 (L, H, W) on the device, summing to 1 over L.
    """
    sizes = [unary.shape[1] * unary.shape[2] for unary in unaries]
    padded = [-(-size // POINTS_AT_A_TIME) * POINTS_AT_A_TIME for size in sizes]
    device, labels = unaries[0].device, max(len(unary) for unary in unaries)
    # of all images' points: energies (N, L), whether it is a pixel (N, 1), number of the image (N,)
    energies, is_pixel, numbers = [], [], []
    for number, (unary, size, points) in enumerate(zip(unaries, sizes, padded, strict=True)):
        energy = torch.zeros((points, labels), device=device)
        energy[:size, : len(unary)] = unary.flatten(1).T
        energy[:size, len(unary) :] = torch.inf  # a label that this image lacks
        energies.append(energy)
        is_pixel.append((torch.arange(points, device=device) < size).float())
        numbers.append(torch.full((points,), number, device=device))
    energy, pixels, owners = torch.cat(energies), torch.cat(is_pixel)[:, None], torch.cat(numbers)

    kernels = []
    for bilateral, weight in ((False, parameters.gaussian_weight), (True, parameters.bilateral_weight)):
        if weight:
            parts = [
                F.pad(_features(image, parameters, bilateral), (0, points - size))
                for image, size, points in zip(images, sizes, padded, strict=True)
            ]
            lattice = PermutohedralLattice(torch.cat(parts, dim=1), owners)
            norm = pixels * (lattice.filter(pixels) + 1e-20).rsqrt()  # (N, 1)
            kernels.append((lattice, norm, weight * norm))
    posterior = _softmax(-energy)
    for _ in range(parameters.iterations):
        logits = -energy
        for lattice, norm, weighted_norm in kernels:
            logits += weighted_norm * lattice.filter(norm * posterior)
        posterior = _softmax(logits)
    starts = np.cumsum([0, *padded]).tolist()
    return [
        posterior[start : start + size, : len(unary)].T.reshape(unary.shape)
        for unary, start, size in zip(unaries, starts, sizes, strict=False)
    ]


def _features(image: Tensor, parameters: CrfConfig, bilateral: bool) -> Tensor:
    """float32 (2, H*W): column and row of each pixel, or (5, H*W) with its colour, in units of their deviations."""
    height, width = image.shape[:2]
    columns = torch.arange(width, device=image.device).repeat(height)
    rows = torch.arange(height, device=image.device).repeat_interleave(width)
    deviation = parameters.bilateral_sxy if bilateral else parameters.gaussian_sxy
    position = _divided(torch.stack([columns, rows]), deviation)
    if not bilateral:
        return position
    return torch.cat([position, _divided(image.reshape(-1, 3).T, parameters.bilateral_srgb)])


def _divided(values: Tensor, deviation: float) -> Tensor:
    """By a tensor: by a number, a GPU would multiply with the reciprocal, and a point might fall elsewhere."""
    return values.float() / torch.full((), deviation, device=values.device)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the labels of (N, L); along few, adjacent values the CPU is 5 times slower than across."""
    return logits.T.contiguous().softmax(dim=0).T.contiguous()
