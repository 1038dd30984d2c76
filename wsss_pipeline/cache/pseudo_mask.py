"""One image's pseudo mask: labels, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.errors import CacheRecordError, ConfigError

IGNORE = 255
CERTAIN = 200  # half percents

# The float32 values from which on a posterior counts as n half percents.
_THRESHOLDS = (np.arange(CERTAIN + 1) / CERTAIN).astype(np.float32)

# In half percents: what a threshold may be off a whole number and still mean it, since 0.95 * 200 needn't be
# 190 in floating point, least of all where the threshold has been a float32.
_THRESHOLD_NOISE = 1e-4


@dataclass(frozen=True, eq=False)
class PseudoMask:
    """Pseudo mask of one image.

    Attributes:
        mask: uint8 (H, W), the most probable label: 0 background, 1..C classes; no 255.
        confidence: uint8 (H, W), posterior of that label in half percents, rounded down: 0..200.
        labels: the image's class names, as they were given.
        cams: float16 (K, H, W) in 0..1, one for each of ``labels``, before the CRF; None where not stored.

    Raises:
        CacheRecordError: an array has another type, shape or range.
    """

    mask: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    labels: tuple[str, ...]
    cams: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise CacheRecordError(f"not a pseudo mask: {problem}")

    def with_ignore(self, min_confidence: float) -> NDArray[np.uint8]:
        """uint8 (H, W): the mask with 255 where the confidence is under ``min_confidence``.

        Thresholds that are multiples of 0.5 % are exact (0.95 keeps 190 half percents and more); others count
        as the next multiple above.

        Raises:
            ConfigError: ``min_confidence`` isn't between 0 and 1.
        """
        return np.where(
            self.confidence >= half_percent_threshold(min_confidence), self.mask, np.uint8(IGNORE)
        )

    def _problem(self) -> str | None:
        mask, confidence, cams = self.mask, self.confidence, self.cams
        if mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
            return f"the mask is {mask.dtype} {mask.shape}, not uint8 (H, W)"
        if confidence.dtype != np.uint8 or confidence.shape != mask.shape:
            return f"the confidence is {confidence.dtype} {confidence.shape}, not uint8 {mask.shape}"
        if np.max(mask) == IGNORE:
            return "the mask holds 255, which only with_ignore() may set"
        if np.max(confidence) > CERTAIN:
            return f"the confidence goes up to {np.max(confidence)}, half percents end at {CERTAIN}"
        if cams is not None:
            expected = (len(self.labels), *mask.shape)
            if cams.dtype != np.float16 or cams.shape != expected:
                return f"the CAMs are {cams.dtype} {cams.shape}, not float16 {expected}"
        return None


def half_percent_threshold(min_confidence: float) -> int:
    """The smallest confidence, in half percents, that reaches ``min_confidence``.

    Raises:
        ConfigError: ``min_confidence`` isn't between 0 and 1.
    """
    if not 0.0 <= min_confidence <= 1.0:
        raise ConfigError(
            f"min_confidence is {min_confidence}; it must lie between 0 and 1, for example 0.95"
        )
    steps = float(min_confidence) * CERTAIN
    nearest = round(steps)
    return nearest if abs(steps - nearest) < _THRESHOLD_NOISE else int(np.ceil(steps))


def half_percent_confidence(posterior_max: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A posterior in half percents, rounded down, as the cache stores it.

    Args:
        posterior_max: float32, any shape, 0..1 up to rounding noise.

    Returns:
        uint8 of the same shape: the largest n in 0..200 with float32(n / 200) <= p, exactly. So the float32
        nearest to 0.95 gives 190, and the next one below it 189.

    Raises:
        CacheRecordError: the posterior holds NaN.
    """
    if np.isnan(posterior_max).any():
        raise CacheRecordError(
            "the posterior holds NaN, so it has no confidence; the scores went wrong before"
        )
    steps = np.searchsorted(_THRESHOLDS, posterior_max, side="right") - 1
    return np.maximum(steps, 0).astype(np.uint8)
