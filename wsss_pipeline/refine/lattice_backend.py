"""Mean-field inference of the dense CRF on our own permutohedral lattice: torch, for GPUs, pictures together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine.kernel_features import POINTS_AT_A_TIME
from wsss_pipeline.refine.lattice import PermutohedralLattice


def infer(
    image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig, device: str
) -> NDArray[np.float32]:
    """Posterior (L, H, W); arguments as those of ``dense_crf``, already checked."""
    energy = torch.from_numpy(np.ascontiguousarray(unary)).to(device)
    (posterior,) = infer_batch([torch.from_numpy(image).to(device)], [energy], parameters)
    return posterior.cpu().numpy()


@torch.no_grad()
def infer_batch(images: Sequence[Tensor], unaries: Sequence[Tensor], parameters: CrfConfig) -> list[Tensor]:
    """Posteriors of several pictures of any sizes, which go through one lattice a kernel.

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
    energy, is_pixel, pictures = _points(unaries, sizes)
    kernels = []
    for features, weight in _kernels(images, parameters):
        lattice = PermutohedralLattice(features, pictures)
        norm = is_pixel * (lattice.filter(is_pixel) + 1e-20).rsqrt()  # (N, 1)
        kernels.append((lattice, norm, weight * norm))
    posterior = _softmax(-energy)
    for _ in range(parameters.iterations):
        logits = -energy
        for lattice, norm, weighted_norm in kernels:
            logits += weighted_norm * lattice.filter(norm * posterior)
        posterior = _softmax(logits)
    starts = np.cumsum([0, *map(_padded, sizes)]).tolist()
    return [
        posterior[start : start + size, : len(unary)].T.reshape(unary.shape)
        for unary, start, size in zip(unaries, starts, sizes, strict=False)
    ]


def _points(unaries: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pictures' points: energies (N, L), 1 for a pixel (N, 1), number of the picture (N,).

    A label that a picture lacks has infinite energy there.
    """
    device, labels = unaries[0].device, max(len(unary) for unary in unaries)
    energies, is_pixel, pictures = [], [], []
    for number, (unary, size) in enumerate(zip(unaries, sizes, strict=True)):
        points = _padded(size)
        energy = torch.zeros((points, labels), device=device)
        energy[:size, : len(unary)] = unary.flatten(1).T
        energy[:size, len(unary) :] = torch.inf
        energies.append(energy)
        is_pixel.append((torch.arange(points, device=device) < size).float())
        pictures.append(torch.full((points,), number, device=device))
    return torch.cat(energies), torch.cat(is_pixel)[:, None], torch.cat(pictures)


def _padded(size: int) -> int:
    return -(-size // POINTS_AT_A_TIME) * POINTS_AT_A_TIME


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the labels of (N, L); along few, adjacent values the CPU is 5 times slower than across."""
    return logits.T.contiguous().softmax(dim=0).T.contiguous()


def _kernels(images: Sequence[Tensor], parameters: CrfConfig) -> list[tuple[Tensor, float]]:
    """Features float32 (d, N) of all pictures' points, and weight, of the kernels in use."""
    kernels = []
    if parameters.gaussian_weight:
        positions = [_pad(_positions(image, parameters.gaussian_sxy)) for image in images]
        kernels.append((torch.cat(positions, dim=1), parameters.gaussian_weight))
    if parameters.bilateral_weight:
        features = [_pad(_bilateral(image, parameters)) for image in images]
        kernels.append((torch.cat(features, dim=1), parameters.bilateral_weight))
    return kernels


def _pad(features: Tensor) -> Tensor:
    points = features.shape[1]
    return torch.nn.functional.pad(features, (0, _padded(points) - points))


def _positions(image: Tensor, deviation: float) -> Tensor:
    """float32 (2, H*W): column and row of each pixel in units of ``deviation``."""
    height, width = image.shape[:2]
    columns = torch.arange(width, device=image.device).repeat(height)
    rows = torch.arange(height, device=image.device).repeat_interleave(width)
    return _divided(torch.stack([columns, rows]), deviation)


def _bilateral(image: Tensor, parameters: CrfConfig) -> Tensor:
    """float32 (5, H*W): position and colour, each in units of its deviation."""
    colours = _divided(image.reshape(-1, 3).T, parameters.bilateral_srgb)
    return torch.cat([_positions(image, parameters.bilateral_sxy), colours])


def _divided(values: Tensor, deviation: float) -> Tensor:
    """By a tensor: by a number, a GPU would multiply with the reciprocal, and a point might fall elsewhere."""
    return values.float() / torch.full((), deviation, device=values.device)
