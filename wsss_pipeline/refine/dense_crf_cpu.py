"""The dense CRF's inference compiled for one CPU core: the same as ``dense_crf_torch``, several times as fast.

A CPU is slow where torch needs whole arrays for every step; here a pixel goes through all of them at once. The
lattice's vertices are numbered in the order of their keys: those of neighbouring pixels lie near each other, and
going through the vertices, their neighbours in any direction come in order too. Where a point falls is computed as in
``dense_crf_torch``, to the last bit, and what is filtered as there but for the order of sums; see there for the
sources. Everything runs without Python's lock, so images can be worked on in threads.

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
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine.dense_crf_torch import POINTS_AT_A_TIME
from wsss_pipeline.runtime.output import MARK

_FIRST_TABLE = 1 << 16
_TOGETHER = 256  # points that are worked on side by side
MOST_COLUMNS = 4  # that are filtered at a time; for each number of columns there is machine code of its own
_ONE, _HALF = np.float32(1), np.float32(0.5)
_LEAST = np.float32(-87)  # whose exponential is the least that single precision holds in full
_PER_LN2 = np.float32(1 / math.log(2))
_LN2 = np.float32(355 / 512)  # so short that its multiples are exact; the rest of ln 2 is
_LN2_REST = np.float32(math.log(2) - 355 / 512)
_C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(3, 8))
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
    scores = -unary.reshape(labels, -1)
    # three columns take longer than four, of which one stays 0
    columns = labels - 1 + (labels % MOST_COLUMNS == 0)
    posterior: NDArray[np.float32] = np.empty_like(scores)
    values = np.zeros((scores.shape[1], columns), np.float32)
    messages = np.zeros_like(values)
    _softmax(scores, messages, posterior, values)
    first = np.zeros((scores.shape[1], 1), np.float32)
    for kernel in kernels:  # what the first label is sent, were all others' probability 0
        kernel.add_filtered(np.ones_like(first), first)
    scores[0] += first[:, 0]
    for _ in range(parameters.iterations):
        messages.fill(0)
        for kernel in kernels:
            kernel.add_filtered(values, messages)
        _softmax(scores, messages, posterior, values)
    return posterior.reshape(labels, height, width)


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
    norm = 1 / np.sqrt(total + np.float32(1e-20))
    return replace(lattice, weights=lattice.weights * norm, factor=np.float32(lattice.factor * weight))


@dataclass(frozen=True)
class CpuLattice:
    """Filters values on N points; built by ``build_lattice``.

    Attributes:
        vertices: uint32 (N, d+1), the vertices around each point, in 0..M-1.
        weights: float32 (N, d+1), barycentric weights times what values and results are to be multiplied by.
        factor: number that all results are multiplied by.
        links: uint32 (K, 2), per direction the pairs of vertices that lie one step apart; of all possible ones about
            half exist.
        ends: int64 (d+1,), where each direction's pairs end.
        count: M.
    """

    vertices: NDArray[np.uint32]
    weights: NDArray[np.float32]
    factor: np.float32
    links: NDArray[np.uint32]
    ends: NDArray[np.int64]
    count: int

    def add_filtered(self, values: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Adds the filtered values, float32 (N, C), to ``result``, float32 (N, C)."""
        columns = values.shape[1]
        for start in range(0, columns, MOST_COLUMNS):
            run = _FILTERS[min(MOST_COLUMNS, columns - start)]
            run(
                self.vertices,
                self.weights,
                self.factor,
                self.links,
                self.ends,
                self.count,
                values,
                result,
                start,
            )


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
    simplices, number = _compiled_for(dimensions)
    rounded, order, weights = simplices(features, scales)
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
    met, keys, _ = number(rounded, order, origin, places, points % pad_to != 0)
    bits = len(keys).bit_length()
    if math.prod(radix) < 2 ** (63 - bits):
        # NumPy sorts values several times as fast as it finds their order
        ascending = np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)
    else:
        ascending = np.argsort(keys)
    vertices = np.empty(len(keys), np.uint32)
    vertices[ascending] = np.arange(len(keys), dtype=np.uint32)
    attenuation = np.float32(1 / (1 + 2.0**-dimensions))
    links, ends = _links(keys[ascending], places)
    return CpuLattice(vertices[met], weights, attenuation, links, ends, len(keys))


@lru_cache
def _compiled_for(dimensions: int) -> tuple[Any, Any]:
    """Both steps of building for a fixed number of dimensions: known to the compiler, they are twice as fast."""
    size = dimensions + 1
    inverse = np.float32(1 / size)

    @compiled
    def simplices(features, scales):  # type: ignore[no-untyped-def]
        """Per point its simplex's vertex of remainder 0, int32 (N, d), the order of the others, and the weights."""
        points = features.shape[1]
        rounded = np.empty((points, dimensions), np.int32)
        order = np.empty((points, size), np.int8)
        weights = np.empty((points, size), np.float32)
        # some points at a time, side by side: what the compiler makes vector instructions of
        total = np.empty(_TOGETHER, np.float32)
        embedded = np.empty((size, _TOGETHER), np.float32)
        whole = np.empty((size, _TOGETHER), np.float32)
        difference = np.empty((size, _TOGETHER), np.float32)
        scaled = np.empty((size, _TOGETHER), np.float32)
        turns = np.empty(_TOGETHER, np.int32)
        rank = np.empty((size, _TOGETHER), np.int32)
        for start in range(0, points, _TOGETHER):
            together = min(_TOGETHER, points - start)
            total[:] = 0
            turns[:] = 0
            rank[:] = 0
            for j in range(dimensions, 0, -1):
                for x in range(together):
                    coordinate = features[j - 1, start + x] * scales[j - 1]
                    embedded[j, x] = total[x] - np.float32(j) * coordinate
                    total[x] += coordinate
            embedded[0] = total
            for i in range(size):
                for x in range(together):
                    quotient = np.rint(embedded[i, x] * inverse)
                    turns[x] += np.int32(quotient)
                    whole[i, x] = quotient * np.float32(size)
                    difference[i, x] = embedded[i, x] - whole[i, x]
            # rank 0 for the largest difference; of two equal ones the later ranks higher
            for i in range(size):
                for j in range(i + 1, size):
                    for x in range(together):
                        is_less = np.int32(difference[i, x] < difference[j, x])
                        rank[i, x] += is_less
                        rank[j, x] += np.int32(1) - is_less
            # rounded on their own, the coordinates needn't sum to 0: back into the plane, farthest ones first
            for i in range(size):
                for x in range(together):
                    turned = rank[i, x] + turns[x]
                    over = np.int32(turned > dimensions) - np.int32(turned < 0)
                    rank[i, x] = np.int32(dimensions) - turned + over * np.int32(size)
                    whole[i, x] -= np.float32(over * np.int32(size))
                    difference[i, x] = (embedded[i, x] - whole[i, x]) * inverse
            for x in range(together):
                for i in range(size):
                    place = rank[i, x]
                    order[start + x, i] = place
                    scaled[place, x] = difference[i, x]
                for i in range(dimensions):
                    rounded[start + x, i] = np.int32(whole[i, x])
                weights[start + x, 0] = _ONE + scaled[0, x] - scaled[dimensions, x]
                for i in range(1, size):
                    weights[start + x, i] = scaled[i, x] - scaled[i - 1, x]
        return rounded, order, weights

    @compiled
    def number(rounded, order, origin, places, with_origin):  # type: ignore[no-untyped-def]
        """Vertices int32 (N, d+1) numbered in the order they are met, and their keys (M,); the third is nothing."""
        points = rounded.shape[0]
        onward = places.sum()
        falls = np.empty(size, np.int64)
        vertices = np.empty((points + with_origin, size), np.int32)
        # a hash table of numbers, -1 where a slot is free, and keys
        table = np.full((_FIRST_TABLE, 2), -1, np.int64)
        keys = np.empty(_FIRST_TABLE, np.int64)
        wanted = np.empty((_TOGETHER, size), np.int64)
        seen = np.int64(0)
        count = 0
        for start in range(0, points + with_origin, _TOGETHER):
            together = min(_TOGETHER, points + with_origin - start)
            if 2 * (count + together * size) >= len(table):
                table = np.full((4 * len(table), 2), -1, np.int64)
                larger = np.empty(len(table), np.int64)
                larger[:count] = keys[:count]
                keys = larger
                for known in range(count):
                    slot = _slot(table, keys[known])
                    table[slot, 0], table[slot, 1] = known, keys[known]
            for x in range(together):
                point = start + x
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
                    wanted[x, k] = key
                    # looked at before they are asked for: memory finds many at a time where nothing depends on
                    # them; and returned, or the compiler would leave it out
                    seen ^= table[_hashed(key) & (len(table) - 1), 1]
                    key += onward - falls[k]
            for x in range(together):
                for k in range(size):
                    key = wanted[x, k]
                    slot = _slot(table, key)
                    if table[slot, 0] < 0:
                        table[slot, 0], table[slot, 1] = count, key
                        keys[count] = key
                        count += 1
                    vertices[start + x, k] = table[slot, 0]
        return vertices[:points], keys[:count].copy(), seen

    return simplices, number


@compiled
def _hashed(key):  # type: ignore[no-untyped-def]
    return (key * np.int64(-7046029254386353131)) >> np.int64(20)


@compiled
def _slot(table, key):  # type: ignore[no-untyped-def]
    """Where a key is in the hash table (T, 2), or where it would be put."""
    mask = len(table) - 1
    slot = _hashed(key) & mask
    while table[slot, 0] >= 0 and table[slot, 1] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def _links(keys, places):  # type: ignore[no-untyped-def]
    """Pairs (K, 2) of ascending keys one step apart, and where each direction's end: each vertex's neighbour lies
    behind that of the one before."""
    count, size = len(keys), len(places)
    onward = places.sum()
    links = np.empty((size * count, 2), np.uint32)
    ends = np.empty(size, np.int64)
    found = 0
    for direction in range(size):
        step = size * places[direction] - onward
        other = 0
        for vertex in range(count):
            wanted = keys[vertex] + step
            while other < count and keys[other] < wanted:
                other += 1
            if other < count and keys[other] == wanted:
                links[found, 0], links[found, 1] = vertex, other
                found += 1
        ends[direction] = found
    return links[:found].copy(), ends


def _vectors(_context: Any, target: Any, at: Any, weight: Any, source: Any, start: Any, columns: Any) -> Any:
    """Types and machine code of ``_add_scaled``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), columns.literal_value)

        def place(position: int) -> Any:
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            return builder.bitcast(builder.gep(array.data, [arguments[position + 1]]), vector.as_pointer())

        factors = ir.Constant(vector, ir.Undefined)
        for column in range(columns.literal_value):
            factors = builder.insert_element(factors, arguments[2], ir.Constant(ir.IntType(32), column))
        scaled = builder.fmul(factors, builder.load(place(3), align=4))
        builder.store(builder.fadd(builder.load(place(0), align=4), scaled), place(0), align=4)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.float32, source, types.intp, columns), generate


# target[at : at + columns] += weight * source[start : start + columns] of arrays float32 (n,), without a look at
# their ends; ``columns`` is known to the compiler. Of a loop this short numba makes no vector instructions.
_add_scaled: Any = intrinsic(prefer_literal=True)(_vectors)


def _make_filter(columns: int) -> Any:
    """The filter for a fixed number of columns."""

    @compiled
    def run(vertices, weights, factor, links, ends, count, values, result, first):  # type: ignore[no-untyped-def]
        (points, size), width = vertices.shape, values.shape[1]
        values, result = values.reshape(-1), result.reshape(-1)
        lattice = np.zeros(count * columns, np.float32)
        for point in range(points):
            for i in range(size):
                vertex, weight = np.int64(vertices[point, i]), weights[point, i]
                _add_scaled(lattice, vertex * columns, weight, values, point * width + first, columns)
        half = np.float32(0.5)
        start = 0
        for end in ends:
            blurred = lattice.copy()
            for link in range(start, end):
                vertex, other = np.int64(links[link, 0]) * columns, np.int64(links[link, 1]) * columns
                _add_scaled(blurred, vertex, half, lattice, other, columns)
                _add_scaled(blurred, other, half, lattice, vertex, columns)
            lattice = blurred
            start = end
        for point in range(points):
            for i in range(size):
                vertex, weight = np.int64(vertices[point, i]), weights[point, i] * factor
                _add_scaled(result, point * width + first, weight, lattice, vertex * columns, columns)

    return run


_FILTERS = {
    columns: _make_filter(columns) for columns in range(1, MOST_COLUMNS + 1)
}  # compiled when first called


@compiled
def _softmax(scores, messages, result, values):  # type: ignore[no-untyped-def]  # compiled
    """Softmax (L, N) over the labels of scores (L, N) plus messages (N, C), of which the first label's is the rest.

    The other labels' probabilities are put into ``values`` (N, C), too. C may be more than L-1.
    """
    (labels, points), width = scores.shape, values.shape[1]
    # of one dimension, so that places are never looked at for counting from the end
    messages, values = messages.reshape(-1), values.reshape(-1)
    largest = np.empty(_TOGETHER, np.float32)
    total = np.empty(_TOGETHER, np.float32)
    powers = np.empty(_TOGETHER, np.int32)
    for start in range(0, points, _TOGETHER):
        stop = min(start + _TOGETHER, points)
        together = stop - start
        first = result[0, start:stop]
        first[:] = scores[0, start:stop]
        largest[:] = -np.inf
        total[:] = 0
        for label in range(1, labels):
            own, sent, logits = (
                scores[label, start:stop],
                result[label, start:stop],
                result[label, start:stop],
            )
            for x in range(together):
                sent[x] = messages[(start + x) * width + label - 1]
            for x in range(together):
                first[x] -= sent[x]
                logits[x] = own[x] + sent[x]
                largest[x] = max(largest[x], logits[x])
        for x in range(together):
            largest[x] = max(largest[x], first[x])
        for label in range(labels):
            logits = result[label, start:stop]
            for x in range(together):
                logits[x] -= largest[x]
            exponential(logits, powers)
            for x in range(together):
                total[x] += logits[x]
        for x in range(together):
            total[x] = _ONE / total[x]
        for label in range(labels):
            share = result[label, start:stop]
            for x in range(together):
                share[x] *= total[x]
            if label:
                for x in range(together):
                    values[(start + x) * width + label - 1] = share[x]


@compiled
def exponential(values, powers):  # type: ignore[no-untyped-def]  # compiled
    """Exponentials of a row (W,) of numbers up to 0, in their place; an int32 row (W,) to work in.

    Within 2e-7 of the value. The C library's is called for one number at a time; this becomes vector instructions.
    """
    columns = len(values)
    factors = powers.view(np.float32)
    for x in range(columns):
        value = values[x]
        value = _LEAST if value < _LEAST else value  # what is no number stays so
        # x = n ln 2 + r with r in -0.35..0.35, then the series of e^r, and 2^n made of its bits
        whole = np.floor(value * _PER_LN2 + _HALF)
        r = value - whole * _LN2 - whole * _LN2_REST
        rest = _HALF + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))
        values[x] = _ONE + (r + r * r * rest)
        powers[x] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for x in range(columns):
        values[x] *= factors[x]
