"""Pixel-adaptive refinement compiled for one CPU core: the same as the form in torch in ``par``, many times as fast.

Weights are made once an image and kept row by row, so that each iteration reads them from first to last. The images
lie in rows that are longer by the largest dilation at both ends: no pixel's neighbour needs a look at the border, and
a step along the row is one for all its pixels, which the compiler turns into vector instructions. Everything runs
without Python's lock, so images can be worked on in threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import ParConfig
from wsss_pipeline.refine.dense_crf_cpu import compiled, exponential

_TINY = np.float32(1e-8)
_ONE = np.float32(1)


def propagate_compiled(
    image: NDArray[np.float32],
    scores: NDArray[np.float32],
    steps: NDArray[np.int64],
    distance_weights: NDArray[np.float32],
    parameters: ParConfig,
) -> NDArray[np.float32]:
    """Refined scores of one image.

    Args:
        image: float32 (3, H, W).
        scores: float32 (L, H, W).
        steps: int64 (n, 2), rows down and columns right to each neighbour.
        distance_weights: float32 (n,), what is added to the neighbours' weights.
        parameters: width of the kernel, and the number of iterations.

    Returns:
        float32 (L, H, W).
    """
    reach = max(parameters.dilations)
    weights = _weights(_padded(image, reach), steps, distance_weights, np.float32(parameters.width))
    filtered = _propagate(_padded(scores, reach), weights, steps, parameters.iterations)
    return np.ascontiguousarray(filtered[:, :, reach : reach + image.shape[2]].transpose(1, 0, 2))


def _padded(maps: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """Maps (C, H, W) row by row, (H, C, reach + W + reach), each row's ends repeated; a copy."""
    ends = ((0, 0), (0, 0), (reach, reach))
    # for each order in memory there would be machine code of its own
    return np.ascontiguousarray(np.pad(maps.transpose(1, 0, 2), ends, mode="edge"))


@compiled
def _row(padded, row, step, channel, columns):  # type: ignore[no-untyped-def]  # compiled
    """What pixels of a row have as neighbours, one step on: a view of (H, C, reach + W + reach)."""
    height, _, length = padded.shape
    start = (length - columns) // 2 + step[1]
    return padded[min(max(row + step[0], 0), height - 1), channel, start : start + columns]


@compiled
def _weights(padded, steps, distance_weights, width):  # type: ignore[no-untyped-def]  # compiled
    """Weights (H, n, W) of the n neighbours of each pixel of an image (H, C, reach + W + reach)."""
    height, channels, length = padded.shape
    count = len(steps)
    columns = length - 2 * np.abs(steps).max()
    weights = np.zeros((height, count, columns), np.float32)
    mean = np.empty(columns, np.float32)
    factor = np.empty(columns, np.float32)
    centre = np.zeros(2, np.int64)
    for row in range(height):
        for channel in range(channels):
            own = _row(padded, row, centre, channel, columns)
            mean[:] = 0
            factor[:] = 0
            for k in range(count):
                other = _row(padded, row, steps[k], channel, columns)
                for x in range(columns):
                    mean[x] += other[x]
            for x in range(columns):
                mean[x] /= np.float32(count)
            for k in range(count):
                other = _row(padded, row, steps[k], channel, columns)
                for x in range(columns):
                    factor[x] += (other[x] - mean[x]) * (other[x] - mean[x])
            for x in range(columns):
                deviation = np.sqrt(factor[x] / np.float32(count - 1))
                factor[x] = _ONE / ((deviation + _TINY) * width)
            for k in range(count):
                other = _row(padded, row, steps[k], channel, columns)
                logits = weights[row, k]
                for x in range(columns):
                    scaled = (other[x] - own[x]) * factor[x]
                    logits[x] -= scaled * scaled
        _softmax(weights[row], distance_weights, np.float32(channels), mean, factor)
    return weights


@compiled
def _softmax(logits, added, divisor, largest, total):  # type: ignore[no-untyped-def]  # compiled
    """Softmax over the rows (n, W) of logits / divisor, plus a number a row; two rows (W,) to work in."""
    count, columns = logits.shape
    powers = np.empty(columns, np.int32)
    largest[:] = logits[0]
    total[:] = 0
    for k in range(1, count):
        for x in range(columns):
            largest[x] = max(largest[x], logits[k, x])
    for k in range(count):
        for x in range(columns):
            logits[k, x] = (logits[k, x] - largest[x]) / divisor
        exponential(logits[k], powers)
        for x in range(columns):
            total[x] += logits[k, x]
    for x in range(columns):
        total[x] = _ONE / total[x]
    for k in range(count):
        for x in range(columns):
            logits[k, x] = logits[k, x] * total[x] + added[k]


@compiled
def _propagate(values, weights, steps, iterations):  # type: ignore[no-untyped-def]  # compiled
    """Values (H, L, reach + W + reach), each ``iterations`` times the weighted sum of its neighbours'."""
    height, labels, length = values.shape
    count, columns = weights.shape[1:]
    reach = (length - columns) // 2
    result = np.empty_like(values)
    for _ in range(iterations):
        for row in range(height):
            for label in range(labels):
                sums = result[row, label, reach : reach + columns]
                sums[:] = 0
                for k in range(count):  # several at once would take longer
                    weight = weights[row, k]
                    other = _row(values, row, steps[k], label, columns)
                    for x in range(columns):
                        sums[x] += weight[x] * other[x]
                result[row, label, :reach] = sums[0]
                result[row, label, reach + columns :] = sums[columns - 1]
        values, result = result, values
    return values
