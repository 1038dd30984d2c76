"""Dense CRF inference in torch on a permutohedral lattice: any device, no compiler.

Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials"
(NIPS 2011); Adams et al., "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics
2010). Equal to pydensecrf with its defaults (diagonal kernels, symmetric normalisation, Potts).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError


class PermutohedralLattice:
    """Gaussian filtering of N points with d features; built once, applied to any values.

    Args:
        features: float64 (N, d), each already divided by its kernel's standard deviation.

    Raises:
        ConfigError: the features spread over more cells than 64 bits can number.
    """

    def __init__(self, features: Tensor) -> None:
        count, dimensions = features.shape
        corners, weights = _simplices(features)
        keys, strides = _pack(corners)
        vertices, ids = torch.unique(keys.view(-1), return_inverse=True)
        self._ids = ids.view(count, dimensions + 1)
        self._weights = weights
        # the same pairs of point and vertex, sorted by vertex: what a vertex gathers stands together
        order = torch.argsort(ids, stable=True)
        self._points = torch.div(order, dimensions + 1, rounding_mode="floor")
        self._point_weights = weights.reshape(-1)[order]
        sizes = torch.bincount(ids, minlength=len(vertices))
        self._offsets = torch.cumsum(sizes, dim=0) - sizes
        self._neighbours = [_neighbours(vertices, strides, axis) for axis in range(dimensions + 1)]
        self._gain = 1 / (1 + 2.0**-dimensions)

    def filter(self, values: Tensor) -> Tensor:
        """Values (N, L) blurred with the Gaussian of the features, not normalised; float32 (N, L)."""
        on_vertices = F.embedding_bag(
            self._points, values, self._offsets, mode="sum", per_sample_weights=self._point_weights
        )
        padded = F.pad(on_vertices, (0, 0, 0, 1))  # the last row stands for absent neighbours
        for before, after in self._neighbours:
            blurred = padded[:-1] + (padded[before] + padded[after]) / 2
            padded = F.pad(blurred, (0, 0, 0, 1))
        return self._gain * F.embedding_bag(self._ids, padded, mode="sum", per_sample_weights=self._weights)


def lattice_crf(image: Tensor, unary: Tensor, parameters: CrfConfig) -> Tensor:
    """Mean-field posterior of a fully connected CRF with a spatial and a bilateral kernel.

    Args:
        image: uint8 (H, W, 3).
        unary: float32 (L, H, W), negative log probabilities, on the same device.
        parameters: kernels and iterations.

    Returns:
        float32 (L, H, W), summing to 1 over the labels.
    """
    labels, height, width = unary.shape
    potential = -unary.reshape(labels, -1).T.contiguous()
    kernels = [
        (parameters.gaussian_weight, _spatial_features(height, width, parameters.gaussian_sxy, unary.device)),
        (
            parameters.bilateral_weight,
            torch.cat(
                [
                    _spatial_features(height, width, parameters.bilateral_sxy, unary.device),
                    image.reshape(-1, 3).double() / parameters.bilateral_srgb,
                ],
                dim=1,
            ),
        ),
    ]
    filters = [(weight, *_normalised(features)) for weight, features in kernels if weight]
    posterior = torch.softmax(potential, dim=1)
    for _ in range(parameters.iterations):
        message = potential.clone()
        for weight, lattice, norm in filters:
            message += weight * norm * lattice.filter(norm * posterior)
        posterior = torch.softmax(message, dim=1)
    return posterior.T.reshape(labels, height, width)


def _normalised(features: Tensor) -> tuple[PermutohedralLattice, Tensor]:
    """The lattice, and (N, 1) the square root of one over what it makes of ones."""
    lattice = PermutohedralLattice(features)
    ones = torch.ones(len(features), 1, device=features.device)
    return lattice, 1 / torch.sqrt(lattice.filter(ones) + 1e-20)


def _spatial_features(height: int, width: int, deviation: float, device: torch.device) -> Tensor:
    """float64 (H*W, 2): x and y of each pixel, row by row, in standard deviations."""
    rows = torch.arange(height, dtype=torch.float64, device=device)
    columns = torch.arange(width, dtype=torch.float64, device=device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1)], dim=1) / deviation


def _simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point: keys of its corners int64 (N, d+1, d), barycentric weights (N, d+1)."""
    count, d = features.shape
    elevated = _elevate(features)
    rounded = torch.round(elevated / (d + 1))
    excess = rounded.sum(dim=1, keepdim=True).long()
    rounded = rounded.long() * (d + 1)
    # rank of each difference, largest first; of equal ones the later counts as smaller
    difference = elevated - rounded
    smaller = difference[:, :, None] < difference[:, None, :]
    equal = difference[:, :, None] == difference[:, None, :]
    earlier = torch.ones(d + 1, d + 1, dtype=torch.bool, device=features.device).tril(-1)
    rank = (smaller | (equal & earlier)).sum(dim=2) + excess
    wrap = (rank < 0).long() - (rank > d).long()
    rank, rounded = rank + wrap * (d + 1), rounded + wrap * (d + 1)
    share = (elevated - rounded) / (d + 1)
    weights = elevated.new_zeros(count, d + 2)
    weights.scatter_add_(1, d - rank, share)
    weights.scatter_add_(1, d - rank + 1, -share)
    weights[:, 0] += 1 + weights[:, d + 1]
    # corner k adds k to the coordinates of rank up to d-k, and k-(d+1) to the others
    corner = torch.arange(d + 1, device=features.device)[None, :, None]
    lifted = rank[:, None, :d] > d - corner
    keys = rounded[:, None, :d] + corner - (d + 1) * lifted.long()
    return keys, weights[:, : d + 1].float()


def _elevate(features: Tensor) -> Tensor:
    """Points (N, d) in the plane of d+1 coordinates that sum to 0, scaled for a unit Gaussian; float64 (N, d+1).

    In float32 a point near a border between simplices can land in the wrong one. Its weights hardly change
    by that, but vertices appear or vanish, and with them blurred values: posteriors move by up to 6e-3.
    """
    d = features.shape[1]
    index = torch.arange(d, dtype=torch.float64, device=features.device)
    scaled = features * ((2 / 3) ** 0.5 * (d + 1) / torch.sqrt((index + 1) * (index + 2)))
    tails = F.pad(scaled.flip(1).cumsum(dim=1).flip(1), (0, 1))  # sum over k >= j, for j = 0..d
    pulled = F.pad(scaled * (index + 1), (1, 0))  # j times the coordinate before, for j = 1..d
    return tails - pulled


def _pack(keys: Tensor) -> tuple[Tensor, list[int]]:
    """Each key of (..., d) as one int64, and the stride of each coordinate in it.

    A margin keeps neighbours, a few steps away in each coordinate, from running into the next coordinate.
    """
    d = keys.shape[-1]
    flat = keys.reshape(-1, d)
    lowest, highest = flat.amin(dim=0) - (d + 1), flat.amax(dim=0) + (d + 1)
    strides, stride = [0] * d, 1
    for axis, extent in reversed(list(enumerate((highest - lowest + 1).tolist()))):
        strides[axis] = stride
        stride *= extent
    if stride >= 2**62:
        raise ConfigError(
            "the CRF's kernels are too narrow for the lattice; raise crf.bilateral_sxy, crf.bilateral_srgb "
            "or crf.gaussian_sxy, or use --crf pydensecrf"
        )
    return ((keys - lowest) * keys.new_tensor(strides)).sum(dim=-1), strides


def _neighbours(vertices: Tensor, strides: list[int], axis: int) -> tuple[Tensor, Tensor]:
    """For each vertex the rows of its two neighbours along one direction; V, one past the end, where absent."""
    d, count = len(strides), len(vertices)
    step = ((d + 1) * strides[axis] if axis < d else 0) - sum(strides)
    wanted = vertices + step
    place = torch.searchsorted(vertices, wanted).clamp_(max=count - 1)
    before = torch.where(vertices[place] == wanted, place, count)
    after = torch.full((count + 1,), count, dtype=torch.long, device=vertices.device)
    # who has v as the one neighbour is the other neighbour of v
    after[before] = torch.arange(count, device=vertices.device)
    return before, after[:count]
