"""Mean-field inference of the dense CRF on our own permutohedral lattice: torch, for GPUs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine.kernel_features import POINTS_AT_A_TIME, bilateral_features, position_features
from wsss_pipeline.refine.lattice import PermutohedralLattice


@torch.no_grad()
def infer(
    image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig, device: str
) -> NDArray[np.float32]:
    """Posterior (L, H, W); arguments as those of ``dense_crf``, already checked.

    Each iteration is Q = softmax(-U + sum_k w_k N_k F_k (N_k Q)) with F_k the Gaussian filter of kernel k
    and N_k = (F_k 1)^(-1/2), the symmetric normalisation (NIPS 2011, algorithm 1, Potts model).
    """
    labels, height, width = unary.shape
    pixels = height * width
    points = -(-pixels // POINTS_AT_A_TIME) * POINTS_AT_A_TIME
    energy = torch.zeros((points, labels), device=device)
    energy[:pixels] = torch.from_numpy(np.ascontiguousarray(unary.reshape(labels, -1).T)).to(device)
    is_pixel = (torch.arange(points, device=device) < pixels).float()[:, None]
    kernels = []
    for features, weight in _kernels(image, parameters):
        padded = np.pad(features, [(0, 0), (0, points - pixels)])
        lattice = PermutohedralLattice(torch.from_numpy(padded).to(device))
        norm = is_pixel * (lattice.filter(is_pixel) + 1e-20).rsqrt()  # (N, 1)
        kernels.append((lattice, norm, weight * norm))
    posterior = _softmax(-energy)
    for _ in range(parameters.iterations):
        logits = -energy
        for lattice, norm, weighted_norm in kernels:
            logits += weighted_norm * lattice.filter(norm * posterior)
        posterior = _softmax(logits)
    return posterior[:pixels].T.contiguous().cpu().numpy().reshape(labels, height, width)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the labels of (N, L); along few, adjacent values the CPU is 5 times slower than across."""
    return logits.T.contiguous().softmax(dim=0).T.contiguous()


def _kernels(image: NDArray[np.uint8], parameters: CrfConfig) -> list[tuple[NDArray[np.float32], float]]:
    """Features float32 (d, N) and weight of the kernels in use."""
    height, width = image.shape[:2]
    kernels = [
        (position_features(height, width, parameters.gaussian_sxy), parameters.gaussian_weight),
        (bilateral_features(image, parameters), parameters.bilateral_weight),
    ]
    return [(features, weight) for features, weight in kernels if weight]
