"""The dense CRF's inference compiled for one CPU core: the same as ``dense_crf_torch``, several times as fast.

A CPU is slow where torch needs whole arrays for every step; here a pixel goes through all of them at once. The
lattice's vertices are numbered in the order of their keys: those of neighbouring pixels lie near each other, and
going through the vertices, their neighbours in any direction come in order too. Arithmetic, rounding and order of
summation are those of ``dense_crf_torch``; see there for the sources. Everything runs without Python's lock, so
images can be worked on in threads.

The labels' probabilities sum to 1 at each pixel and the filters are linear, so of L labels L-1 are filtered and
the first one's message is what is left: half the work where there is one class and background.
"""

from __future__ import annotations

import math
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine.dense_crf_torch import POINTS_AT_A_TIME
from wsss_pipeline.runtime.output import MARK

_FIRST_TABLE = 1 << 14
MOST_COLUMNS = 4  # that are filtered at a time; for each number of columns there is machine code of its own
_ONE = np.float32(1)
_NUMBA: Any = numba.config
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles at the first call, and keeps the machine code on disk, see ``folder_for_code``."""
    before, folder = _NUMBA.CACHE_DIR, folder_for_code()
    if folder is None:
        return njit(nogil=True)(function)
    _NUMBA.CACHE_DIR = folder  # which numba looks at now, not when it compiles
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # it can't be written after all
        return njit(nogil=True)(function)
    finally:
        _NUMBA.CACHE_DIR = before


def folder_for_code() -> str | None:
    """Where machine code is kept: what is in that folder is run.

    That of ``NUMBA_CACHE_DIR``; without it, empty for numba's own choice where the package's folder can be written;
    else a folder that this user alone can write, in the user's cache or, where there is none, among the temporary
    files. None where there isn't any.
    """
    package = Path(__file__).parent
    kept = package / "__pycache__"
    if _NUMBA.CACHE_DIR or os.access(kept if kept.exists() else package, os.W_OK):
        return str(_NUMBA.CACHE_DIR)
    if not hasattr(os, "getuid"):
        return ""  # Windows gives each user folders of their own
    cache = os.environ.get("XDG_CACHE_HOME", "")
    users = Path(cache if Path(cache).is_absolute() else "~/.cache", MARK)
    for path in (users, Path(tempfile.gettempdir(), f"{MARK}-{os.getuid()}")):
        with suppress(OSError, RuntimeError):  # a user may have no home
            folder = path.expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(folder):
                return str(folder)
    return None


def _is_private(folder: Path) -> bool:
    """Whether only this user can put something into a folder, or another folder in its place."""
    own, above = folder.lstat(), folder.parent.stat()
    is_own = stat.S_ISDIR(own.st_mode) and own.st_uid == os.getuid() and not own.st_mode & _OTHERS_WRITE
    is_kept = above.st_mode & stat.S_ISVTX or not above.st_mode & _OTHERS_WRITE
    return bool(is_own and is_kept and os.access(folder, os.W_OK))


def infer(image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig) -> NDArray[np.float32]:
    """Posterior of each label at each pixel.

    Args:
        image: uint8 (H, W, 3) as the bilateral kernel is to see it.
        unary: float32 (L, H, W), finite energies -log p.
        parameters: values of the kernels, and the number of iterations.

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
    after = norm * np.float32(weight)
    return replace(lattice, splat=lattice.splat * norm[:, None], slice=lattice.slice * after[:, None])


@dataclass(frozen=True)
class CpuLattice:
    """Filters values on N points; built by ``build_lattice``.

    Attributes:
        vertices: uint32 (N, d+1), the vertices around each point, in 0..M-1.
        splat: float32 (N, d+1), barycentric weights times what the values are to be multiplied by.
        slice: float32 (N, d+1), the same times the filter's own factor and what its results are to be multiplied by.
        neighbours: uint32 (d+1, M, 2), one step on and one back in each direction; M where there is none.
    """

    vertices: NDArray[np.uint32]
    splat: NDArray[np.float32]
    slice: NDArray[np.float32]
    neighbours: NDArray[np.uint32]

    def add_filtered(self, values: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Adds the filtered values, float32 (N, C), to ``result``, float32 (N, C)."""
        columns = values.shape[1]
        for start in range(0, columns, MOST_COLUMNS):
            run = _FILTERS[min(MOST_COLUMNS, columns - start)]
            part = slice(start, start + MOST_COLUMNS)
            run(self.vertices, self.splat, self.slice, self.neighbours, values[:, part], result[:, part])


def build_lattice(features: NDArray[np.float32], pad_to: int = 1) -> CpuLattice:
    """The lattice of N points.

    Args:
        features: float32 (d, N), in units of the standard deviation.
        pad_to: points at the origin are added, which carry no values, until N is a multiple of this.

    Raises:
        ConfigError: the features spread so far that a vertex no longer fits into 63 bits.
    """
    dimensions, points = features.shape
    deviation = float(np.float32(math.sqrt(2 / 3) * (dimensions + 1)))
    scales = np.array([1 / math.sqrt(j * (j + 1)) * deviation for j in range(1, dimensions + 1)], np.float32)
    rounded, order, weights = _simplices(np.ascontiguousarray(features.T), scales)
    low, high = rounded.min(axis=0).tolist(), rounded.max(axis=0).tolist()
    if points % pad_to:  # the origin is a vertex too
        low, high = [min(value, 0) for value in low], [max(value, 0) for value in high]
    # a vertex lies up to d away from ``rounded``, a neighbour of it another d
    radix = [top - bottom + 1 + 4 * dimensions for bottom, top in zip(low, high, strict=True)]
    if math.prod(radix) >= 2**63:
        raise ConfigError(
            "the dense CRF's kernels are too narrow for the lattice on this image; raise "
            "'crf.bilateral_sxy', 'crf.bilateral_srgb' or 'crf.gaussian_sxy'"
        )
    places = np.array([math.prod(radix[:i]) for i in range(dimensions)] + [0], np.int64)
    origin = np.array(low, np.int64) - 2 * dimensions  # so that no coordinate, and no key, is negative
    met, keys = _number(rounded, order, origin, places, points % pad_to != 0)
    bits = len(keys).bit_length()
    if math.prod(radix) < 2 ** (63 - bits):
        # NumPy sorts values several times as fast as it finds their order
        ascending = np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)
    else:
        ascending = np.argsort(keys)
    vertices = np.empty(len(keys), np.uint32)
    vertices[ascending] = np.arange(len(keys), dtype=np.uint32)
    attenuation = np.float32(1 / (1 + 2.0**-dimensions))
    return CpuLattice(vertices[met], weights, weights * attenuation, _neighbours(keys[ascending], places))


@compiled
def _simplices(features, scales):  # type: ignore[no-untyped-def]  # compiled
    """Per point its simplex's vertex of remainder 0, int32 (N, d), the order of the others, and the weights."""
    points, dimensions = features.shape
    size = dimensions + 1
    rounded = np.empty((points, dimensions), np.int32)
    order = np.empty((points, size), np.int8)
    weights = np.empty((points, size), np.float32)
    embedded = np.empty(size, np.float32)
    whole = np.empty(size, np.float32)
    difference = np.empty(size, np.float32)
    rank = np.empty(size, np.int64)
    scaled = np.empty(size, np.float32)
    inverse = np.float32(1 / size)
    for point in range(points):
        total = np.float32(0)
        for j in range(dimensions, 0, -1):
            coordinate = features[point, j - 1] * scales[j - 1]
            embedded[j] = total - np.float32(j) * coordinate
            total = total + coordinate
        embedded[0] = total
        turns = np.float32(0)
        for i in range(size):
            quotient = np.rint(embedded[i] * inverse)
            turns += quotient
            whole[i] = quotient * np.float32(size)
            difference[i] = embedded[i] - whole[i]
            rank[i] = 0
        # rank 0 for the largest difference; of two equal ones the later ranks higher
        for i in range(size):
            for j in range(i + 1, size):
                if difference[i] < difference[j]:
                    rank[i] += 1
                else:
                    rank[j] += 1
        # rounded on their own, the coordinates needn't sum to 0: back into the plane, farthest ones first
        for i in range(size):
            rank[i] += np.int64(turns)
            if rank[i] < 0:
                rank[i] += size
                whole[i] += np.float32(size)
            elif rank[i] > dimensions:
                rank[i] -= size
                whole[i] -= np.float32(size)
            place = dimensions - rank[i]
            order[point, i] = place
            scaled[place] = (embedded[i] - whole[i]) * inverse
            if i < dimensions:
                rounded[point, i] = np.int32(whole[i])
        weights[point, 0] = _ONE + scaled[0] - scaled[dimensions]
        for i in range(1, size):
            weights[point, i] = scaled[i] - scaled[i - 1]
    return rounded, order, weights


@compiled
def _slot(table, keys, key):  # type: ignore[no-untyped-def]
    """Where a key is in the hash table, or where it would be put."""
    mask = len(table) - 1
    slot = ((key * np.int64(-7046029254386353131)) >> np.int64(20)) & mask
    while table[slot] >= 0 and keys[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _number(rounded, order, origin, places, with_origin):  # type: ignore[no-untyped-def]
    """Vertices int32 (N, d+1) numbered in the order they are met, and their keys (M,)."""
    points, dimensions = rounded.shape
    size = dimensions + 1
    onward = places.sum()
    falls = np.empty(size, np.int64)
    vertices = np.empty((points, size), np.int32)
    table = np.full(_FIRST_TABLE, -1, np.int32)
    keys = np.empty(_FIRST_TABLE, np.int64)
    count = 0
    for point in range(points + with_origin):
        key = np.int64(0)
        if point < points:
            for i in range(dimensions):
                key += (rounded[point, i] - origin[i]) * places[i]
                falls[order[point, i]] = size * places[i]
            falls[order[point, dimensions]] = 0
        else:
            for i in range(dimensions):
                key -= origin[i] * places[i]
                falls[dimensions - i] = size * places[i]
            falls[0] = 0
        for k in range(size):
            slot = _slot(table, keys, key)
            if table[slot] < 0:
                table[slot] = count
                keys[count] = key
                count += 1
                if 2 * count >= len(table):
                    table = np.full(4 * len(table), -1, np.int32)
                    larger = np.empty(2 * len(table), np.int64)
                    larger[:count] = keys[:count]
                    keys = larger
                    for known in range(count):
                        table[_slot(table, keys, keys[known])] = known
                    slot = _slot(table, keys, key)
            if point < points:
                vertices[point, k] = table[slot]
            key += onward - falls[k]
    return vertices, keys[:count].copy()


@compiled
def _neighbours(keys, places):  # type: ignore[no-untyped-def]
    """Neighbours (d+1, M, 2) of ascending keys: each vertex's neighbour lies behind that of the one before."""
    count, size = len(keys), len(places)
    onward = places.sum()
    found = np.full((size, count, 2), count, np.uint32)
    for direction in range(size):
        step = size * places[direction] - onward
        other = 0
        for vertex in range(count):
            wanted = keys[vertex] + step
            while other < count and keys[other] < wanted:
                other += 1
            if other < count and keys[other] == wanted:
                found[direction, vertex, 0] = other
                found[direction, other, 1] = vertex
    return found


def _make_filter(columns: int) -> Any:
    """The filter for a fixed number of columns: known to the compiler, it is several times as fast."""

    @compiled
    def run(vertices, splat, slice_, neighbours, values, result):  # type: ignore[no-untyped-def]
        points, size = vertices.shape
        count = neighbours.shape[1]
        # one vertex more stands for every absent neighbour: its values are always 0
        lattice = np.zeros((count + 1, columns), np.float32)
        blurred = np.zeros((count + 1, columns), np.float32)
        for point in range(points):
            for i in range(size):
                vertex, weight = vertices[point, i], splat[point, i]
                for column in range(columns):
                    lattice[vertex, column] += weight * values[point, column]
        half = np.float32(0.5)
        for direction in range(size):
            for vertex in range(count):
                onward, back = neighbours[direction, vertex, 0], neighbours[direction, vertex, 1]
                for column in range(columns):
                    around = half * lattice[onward, column] + half * lattice[back, column]
                    blurred[vertex, column] = lattice[vertex, column] + around
            lattice, blurred = blurred, lattice
        for point in range(points):
            for column in range(columns):
                total = np.float32(0)
                for i in range(size):
                    total += slice_[point, i] * lattice[vertices[point, i], column]
                result[point, column] += total

    return run


_FILTERS = {
    columns: _make_filter(columns) for columns in range(1, MOST_COLUMNS + 1)
}  # compiled when first called


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
