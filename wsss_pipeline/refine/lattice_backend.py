"""Mean-field inference of the dense CRF on our own permutohedral lattice: torch, any device, no compiler."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine.lattice import PermutohedralLattice

# pydensecrf takes the pixels by fours and fills the last four up with points whose features are 0. These
# carry no values, but the lattice then has the vertices around them, which link dark pixels to each other:
# worth up to 0.03 in the posterior of a few pixels, so we add the same points.
POINTS_AT_A_TIME = 4


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
    """Features float32 (d, N) and weight of the kernels in use: position alone, position and colour."""
    height, width = image.shape[:2]
    # NumPy divides alike for every device, where a GPU would multiply by the reciprocal
    rows, columns = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    position = np.stack([columns, rows])
    colour = image.reshape(-1, 3).T.astype(np.float32)
    bilateral = [
        position / np.float32(parameters.bilateral_sxy),
        colour / np.float32(parameters.bilateral_srgb),
    ]
    kernels = [
        (position / np.float32(parameters.gaussian_sxy), parameters.gaussian_weight),
        (np.concatenate(bilateral), parameters.bilateral_weight),
    ]
    return [(features, weight) for features, weight in kernels if weight]
