"""Mean-field inference of the dense CRF on one CPU core, compiled; see ``lattice_cpu``.

The labels' probabilities sum to 1 at each pixel and the filters are linear, so of L labels L-1 are filtered and
the first one's message is what is left: half the work where there is one class and background.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine.compiled import compiled
from wsss_pipeline.refine.lattice import POINTS_AT_A_TIME
from wsss_pipeline.refine.lattice_cpu import CpuLattice, build_lattice


def infer(image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig) -> NDArray[np.float32]:
    """Posterior of each label at each pixel.

    Args:
        image: uint8 (H, W, 3) as the bilateral kernel is to see it.
        unary: float32 (L, H, W), finite energies -log p.
        parameters: of the kernels, and the number of iterations.

    Returns:
        float32 (L, H, W), summing to 1 over L.

    Each iteration is Q = softmax(-U + sum_k w_k N_k F_k (N_k Q)) with F_k the Gaussian filter of kernel k
    and N_k = (F_k 1)^(-1/2), the symmetric normalisation (NIPS 2011, algorithm 1, Potts model).
    """
    labels, height, width = unary.shape
    if labels == 1:
        return np.ones_like(unary)
    kernels = []
    if parameters.gaussian_weight:
        kernels.append(_position_kernel(height, width, parameters.gaussian_sxy, parameters.gaussian_weight))
    if parameters.bilateral_weight:
        position = _position_features(height, width, parameters.bilateral_sxy)
        colour = image.reshape(-1, 3).T.astype(np.float32) / np.float32(parameters.bilateral_srgb)
        kernels.append(_kernel(np.concatenate([position, colour]), parameters.bilateral_weight))
    scores = np.ascontiguousarray(-unary.reshape(labels, -1).T)
    posterior: NDArray[np.float32] = np.empty_like(scores)
    messages: NDArray[np.float32] = np.zeros((len(scores), labels - 1), np.float32)
    _softmax(scores, messages, posterior)
    for kernel in kernels:  # what the first label is sent, were all others' probability 0
        kernel.add_filtered(np.ones((len(scores), 1), np.float32), scores[:, :1])
    for _ in range(parameters.iterations):
        messages.fill(0)
        for kernel in kernels:
            kernel.add_filtered(posterior[:, 1:], messages)
        _softmax(scores, messages, posterior)
    return np.ascontiguousarray(posterior.T).reshape(labels, height, width)


@lru_cache(maxsize=4)
def _position_kernel(height: int, width: int, deviation: float, weight: float) -> CpuLattice:
    """The kernel that depends on the image's size alone."""
    return _kernel(_position_features(height, width, deviation), weight)


def _position_features(height: int, width: int, deviation: float) -> NDArray[np.float32]:
    """float32 (2, H*W): column and row of each pixel in units of ``deviation``."""
    # NumPy divides alike for every device, where a GPU would multiply by the reciprocal
    rows, columns = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    return np.stack([columns, rows]) / np.float32(deviation)


def _kernel(features: NDArray[np.float32], weight: float) -> CpuLattice:
    """``w N F N``, a filter with its symmetric normalisation and weight."""
    lattice = build_lattice(features, POINTS_AT_A_TIME)
    total = np.zeros((features.shape[1], 1), np.float32)
    lattice.add_filtered(np.ones_like(total), total)
    norm = (1 / np.sqrt(total + np.float32(1e-20)))[:, 0]
    return lattice.weighted(norm, norm * np.float32(weight))


@compiled
def _softmax(scores, messages, result):  # type: ignore[no-untyped-def]  # compiled
    """Softmax over the labels of scores (N, L) plus messages (N, L-1), of which the first label's is the rest."""
    points, labels = scores.shape
    for point in range(points):
        largest = scores[point, 0]
        for label in range(1, labels):
            largest -= messages[point, label - 1]
        result[point, 0] = largest
        for label in range(1, labels):
            logit = scores[point, label] + messages[point, label - 1]
            result[point, label] = logit
            largest = max(largest, logit)
        total = np.float32(0)
        for label in range(labels):
            value = np.exp(result[point, label] - largest)
            result[point, label] = value
            total += value
        for label in range(labels):
            result[point, label] /= total
