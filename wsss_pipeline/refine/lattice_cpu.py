"""The permutohedral lattice compiled for one CPU core: the same filter as ``lattice``, several times as fast.

A CPU is slow where torch needs whole arrays for every step; here a pixel goes through all of them at once. The
vertices are numbered in the order of their keys: those of neighbouring pixels lie near each other, and going
through the vertices, their neighbours in any direction come in order too. Arithmetic, rounding and order of
summation are those of ``lattice``; see there for the source. Everything runs without Python's lock, so images
can be worked on in threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine.compiled import compiled

_FIRST_TABLE = 1 << 14
MOST_COLUMNS = 4  # that are filtered at a time; for each number of columns there is machine code of its own
_ONE = np.float32(1)


@dataclass(frozen=True)
class CpuLattice:
    """Filters values on N points; built by ``build_lattice``.

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
            run = _filter(min(MOST_COLUMNS, columns - start))
            part = slice(start, start + MOST_COLUMNS)
            run(self.vertices, self.splat, self.slice, self.neighbours, values[:, part], result[:, part])

    def weighted(self, before: NDArray[np.float32], after: NDArray[np.float32]) -> CpuLattice:
        """The same filter with values and results multiplied by factors (N,) of each point."""
        return replace(self, splat=self.splat * before[:, None], slice=self.slice * after[:, None])


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
            "the dense CRF's kernels are too narrow for the lattice on this picture; raise "
            "'crf.bilateral_sxy', 'crf.bilateral_srgb' or 'crf.gaussian_sxy'"
        )
    places = np.array([math.prod(radix[:i]) for i in range(dimensions)] + [0], np.int64)
    origin = np.array(low, np.int64) - 2 * dimensions  # so that no coordinate, and no key, is negative
    met, keys = _number(rounded, order, origin, places, points % pad_to != 0)
    ascending = _argsort(keys, math.prod(radix))
    vertices = np.empty(len(keys), np.uint32)
    vertices[ascending] = np.arange(len(keys), dtype=np.uint32)
    attenuation = np.float32(1 / (1 + 2.0**-dimensions))
    return CpuLattice(vertices[met], weights, weights * attenuation, _neighbours(keys[ascending], places))


def _argsort(keys: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """Order of distinct keys below ``end``; NumPy sorts values several times as fast as it finds their order."""
    bits = len(keys).bit_length()
    if end >= 2 ** (63 - bits):
        return np.argsort(keys)
    return np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)


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


@cache
def _filter(columns: int) -> Any:
    return _make_filter(columns)
