"""The dense CRF's inference in plain torch, for GPUs: mean field on a permutohedral lattice, images together.

Sources: Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010; arithmetic and rounding as in the C++ code that comes with Kraehenbuehl and Koltun,
"Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011.

Letters: d features, N points, L values to be filtered per point, M vertices of the lattice that a point
touches. Every step of the filter is a sparse matrix times values, for which torch has a fused kernel on
CPU and CUDA under the name ``embedding_bag``; it needs no atomic additions, so results don't vary from
run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError

# pydensecrf takes the pixels by fours and fills the last four up with points whose features are 0. These
# carry no values, but the lattice then has the vertices around them, which link dark pixels to each other:
# worth up to 0.03 in the posterior of a few pixels, so we add the same points.
POINTS_AT_A_TIME = 4


def infer_batch(images: Sequence[Tensor], unaries: Sequence[Tensor], parameters: CrfConfig) -> list[Tensor]:
    """Posteriors of several images of any sizes, which go through one lattice a kernel.

    Each iteration is Q = softmax(-U + sum_k w_k N_k F_k (N_k Q)) with F_k the Gaussian filter of kernel k
    and N_k = (F_k 1)^(-1/2), the symmetric normalisation (NIPS 2011, algorithm 1, Potts model). Building a
    lattice waits for the device twice; the iterations never do.

    Args:
        images: uint8 (H, W, 3) on the device, as the bilateral kernel is to see them.
        unaries: per image float32 (L, H, W) on the device, L >= 1.
        parameters: values of the kernels, and the number of iterations.

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


@dataclass(frozen=True)
class _WeightedSums:
    """A sparse matrix (rows, columns) by rows, of which some may be empty.

    Attributes:
        starts: int32 (rows,), where a row's entries start.
        columns: int32 (entries,).
        weights: float32 (entries,).
    """

    starts: Tensor
    columns: Tensor
    weights: Tensor

    def of(self, values: Tensor) -> Tensor:
        """The product with ``values``, float32 (columns, L), as float32 (rows, L)."""
        return F.embedding_bag(self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights)


class PermutohedralLattice:
    """Filters values that sit on N points with the Gaussian exp(-|f_i - f_j|^2 / 2) of their features.

    The lattice depends on the points alone: build it once, filter as often as needed, any number of values
    at a time. Building waits for the device (number of vertices, range of the keys), filtering never does.
    Indices are int32, good for some 350 million points of 5 features.

    Args:
        features: float32 (d, N), d >= 1 and N >= 1, in units of the standard deviation; their order
            matters a little, since the lattice isn't symmetric.
        images: int64 (N,), from 0: points of different images share no vertex, so that several images
            go through one lattice. All points belong to one where None.

    Raises:
        ConfigError: the features spread so far, that is the standard deviations are so small, that a
            vertex no longer fits into 63 bits.
    """

    def __init__(self, features: Tensor, images: Tensor | None = None) -> None:
        dimensions, points = features.shape
        rounded, order, weights = _simplices(features)
        keys, steps = _keys(rounded, order, images)
        # stable: the points of a vertex stay in order, so the sums don't depend on the sort
        ordered, entries = keys.flatten().sort(stable=True)
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
        starts = is_first.nonzero()[:, 0]
        numbers = is_first.cumsum(0, dtype=torch.int32) - 1
        vertices = torch.empty_like(numbers).scatter_(0, entries, numbers)

        # One vertex more, M, without points, stands for every absent neighbour: its value is always 0.
        self._splat = _WeightedSums(
            starts=torch.cat([starts, starts.new_tensor([len(ordered)])]).int(),
            columns=_counted(points, 1, features.device).repeat(dimensions + 1)[entries],
            weights=weights.flatten()[entries],
        )
        blur_starts = _counted(len(starts) + 1, 3, features.device)
        blur_weights = features.new_tensor([1.0, 0.5, 0.5]).repeat(len(starts) + 1)
        self._blurs = [
            _WeightedSums(blur_starts, _neighbours(ordered[starts], step).flatten(), blur_weights)
            for step in steps
        ]
        attenuation = 1 / (1 + 2.0**-dimensions)
        self._slice = _WeightedSums(
            starts=_counted(points, dimensions + 1, features.device),
            columns=vertices.view(-1, points).T.flatten(),
            weights=weights.T.flatten() * attenuation,
        )

    def filter(self, values: Tensor) -> Tensor:
        """The filtered values, not normalised.

        Args:
            values: float32 (N, L) on the device of the features.

        Returns:
            float32 (N, L).
        """
        lattice = self._splat.of(values)
        for blur in self._blurs:
            lattice = blur.of(lattice)
        return self._slice.of(lattice)


def _counted(count: int, step: int, device: torch.device) -> Tensor:
    """int32 (count,): 0, step, 2 step, ..."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex with d+1 vertices in which each point lies.

    Returns:
        Its vertex of remainder 0, int64 (d+1, N). Place of coordinate i of a point when the d+1 differences to it
        are put in ascending order, int64 (d+1, N). Barycentric weights of the vertices with remainder 0..d,
        float32 (d+1, N), summing to 1.
    """
    dimensions, points = features.shape
    size = dimensions + 1
    # in the plane of d+1 coordinates with sum 0, scaled for the blur's own variance; rounded to float32 where the
    # C++ code does: a point near a border may else fall into the next simplex
    deviation = float(np.float32(math.sqrt(2 / 3) * size))
    embedded = features.new_empty((size, points))
    total = features.new_zeros(points)
    for j in range(dimensions, 0, -1):
        coordinate = features[j - 1] * float(np.float32(1 / math.sqrt(j * (j + 1)) * deviation))
        embedded[j] = total - j * coordinate
        total = total + coordinate
    embedded[0] = total
    quotient = torch.round(embedded * (1 / size))
    rounded = quotient * size
    difference = embedded - rounded

    # Rank 0 for the largest difference; of two equal ones the later ranks higher.
    rank = torch.zeros((size, points), dtype=torch.int64, device=features.device)
    for i in range(dimensions):
        for j in range(i + 1, size):
            is_less = difference[i] < difference[j]
            rank[i] += is_less
            rank[j] += ~is_less
    # Rounded on their own, the coordinates needn't sum to 0: back into the plane, farthest ones first.
    rank += quotient.sum(0).long()
    wrap = size * ((rank < 0).long() - (rank > dimensions).long())
    rank += wrap
    rounded += wrap

    order = dimensions - rank
    scaled = torch.empty_like(embedded).scatter_(0, order, (embedded - rounded) * (1 / size))
    weights = torch.empty_like(scaled)
    torch.sub(scaled[1:], scaled[:-1], out=weights[1:])
    torch.sub(1 + scaled[0], scaled[-1], out=weights[0])
    return rounded.long(), order, weights


def _keys(rounded: Tensor, order: Tensor, images: Tensor | None) -> tuple[Tensor, list[int]]:
    """The vertices around each point as one int64 each, (d+1, N), and the step to the next in each direction.

    Digit i of the mixed-radix number is coordinate i, i < d, since all d+1 sum to 0; then comes the image.
    """
    size = len(rounded)
    dimensions = size - 1
    rounded = rounded[:dimensions]
    numbers = rounded.new_zeros(1) if images is None else images
    bounds = [*rounded.aminmax(dim=1), numbers.max()[None]]
    *ends, last = torch.cat(bounds).tolist()  # at once: each list waits for the device
    low, high = ends[:dimensions], ends[dimensions:]
    # A vertex lies up to d away from ``rounded``, a neighbour of it another d.
    radix = [top - bottom + 1 + 4 * dimensions for bottom, top in zip(low, high, strict=True)]
    if math.prod(radix) * (last + 1) >= 2**63:
        raise ConfigError(
            "the dense CRF's kernels are too narrow for the lattice on this image; raise "
            "'crf.bilateral_sxy', 'crf.bilateral_srgb' or 'crf.gaussian_sxy'"
        )
    place = [math.prod(radix[:i]) for i in range(dimensions)] + [0]
    places = torch.tensor(place, device=rounded.device)

    # From vertex k to k+1 every coordinate grows by 1, but the one whose turn it is falls by d.
    falls = torch.empty_like(order)
    falls.scatter_(0, order, size * places[:, None].expand_as(falls))
    vertices = torch.empty_like(falls)
    vertices[0] = ((rounded - rounded.new_tensor(low)[:, None]) * places[:dimensions, None]).sum(0)
    if images is not None:
        vertices[0] += images * math.prod(radix)
    for k in range(dimensions):
        torch.sub(vertices[k] + sum(place), falls[k], out=vertices[k + 1])
    return vertices, [size * own - sum(place) for own in place]


def _neighbours(keys: Tensor, step: int) -> Tensor:
    """Indices int32 (M+1, 3): each vertex, its neighbour one step on, and one step back; M where absent.

    Args:
        keys: int64 (M,), ascending.
        step: difference of the keys of two neighbours in one direction.
    """
    count = len(keys)
    wanted = keys + step
    position = torch.searchsorted(keys, wanted).clamp_(max=count - 1)
    own = torch.arange(count + 1, device=keys.device)
    onward = torch.full_like(own, count)
    onward[:count] = torch.where(keys[position] == wanted, position, count)
    back = torch.full_like(own, count).scatter_(0, onward, own)
    back[count] = count
    return torch.stack([own, onward, back], dim=1).int()
