"""Masks by image id: what one is, how sure it is, and the protocol of all that has them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.errors import ConfigError, ImageError, MaskError

IGNORE = 255  # in a mask of 8 bits
WIDE_IGNORE = 65_535  # in a mask of 16 bits
CERTAIN = 200  # half percents

_CHECKED = 32  # masks of a folder, before anything is done with the others


def ignore_value(outputs: int) -> int:
    """The mask value of "no label" where a mask may have ``outputs`` others, 0 background and 1..C.

    It follows from the number of classes alone: 255, in masks of 8 bits, up to 254 classes; 65,535, in masks of 16
    bits, beyond.
    """
    return IGNORE if outputs <= IGNORE else WIDE_IGNORE


def mask_type(outputs: int) -> type[np.unsignedinteger[Any]]:
    """The type of masks that may have ``outputs`` values and that of "no label", see ``ignore_value``."""
    return np.uint8 if outputs <= IGNORE else np.uint16


Mask = NDArray[np.unsignedinteger[Any]]  # of 8 or 16 bits


@dataclass(frozen=True, eq=False)
class PseudoMask:
    """Mask of one image.

    Attributes:
        mask: uint8 (H, W), uint16 with more than 254 classes: 0 background, 1..C classes; the type's largest value,
            255 or 65,535, where a file says "no label", never in the cache.
        confidence: uint8 (H, W), posterior of the pixel's label in half percents, rounded down: 0..200.
        labels: the image's class names, as they were given; empty where not known.
        cams: float16 (K, H, W) in 0..1, one for each of ``labels``, before refinement; None where not stored.

    Raises:
        MaskError: an array has another type, shape or range.
    """

    mask: Mask
    confidence: NDArray[np.uint8]
    labels: tuple[str, ...] = ()
    cams: NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        mask, confidence, cams = self.mask, self.confidence, self.cams
        expected, problem = (len(self.labels), *mask.shape), ""
        if mask.dtype not in (np.uint8, np.uint16) or mask.ndim != 2 or mask.size == 0:
            problem = f"the mask is {mask.dtype} {mask.shape}, not uint8 or uint16 (H, W)"
        elif confidence.dtype != np.uint8 or confidence.shape != mask.shape:
            problem = f"the confidence is {confidence.dtype} {confidence.shape}, not uint8 {mask.shape}"
        elif np.max(confidence) > CERTAIN:
            problem = f"the confidence goes up to {np.max(confidence)}, half percents end at {CERTAIN}"
        elif cams is not None and (cams.dtype != np.float16 or cams.shape != expected):
            problem = f"the CAMs are {cams.dtype} {cams.shape}, not float16 {expected}"
        if problem:
            raise MaskError(f"not a pseudo mask: {problem}")

    def with_ignore(self, min_confidence: float) -> Mask:
        """The mask with its type's largest value where the confidence is under ``min_confidence``, 0 to 1."""
        certain = self.confidence >= half_percent_threshold(min_confidence)
        ignore = self.mask.dtype.type(np.iinfo(self.mask.dtype).max)
        return np.where(certain, self.mask, ignore)


def half_percent_threshold(min_confidence: float) -> int:
    """The smallest confidence, in half percents, that reaches ``min_confidence``.

    Thresholds that are multiples of 0.5 % are exact (0.95 is 190); others count as the next multiple above.

    Raises:
        ConfigError: ``min_confidence`` isn't between 0 and 1.
    """
    if not 0.0 <= min_confidence <= 1.0:
        raise ConfigError(
            f"min_confidence is {min_confidence}; it must lie between 0 and 1, for example 0.95"
        )
    # 0.95 * 200 needn't be 190 in floating point, least of all where the threshold has been a float32
    return math.ceil(float(min_confidence) * CERTAIN - 1e-4)


class MaskSource(Protocol):
    """Masks by image id: of a mask set, a folder of files, a network. It may be pickled and forked.

    Attributes:
        class_names: names of mask values 1..C.
        identity: text that tells these masks from others: a fingerprint, or a digest of names; the same in each run.
        description: origin of the masks, for people.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def identity(self) -> str: ...
    @property
    def description(self) -> str: ...
    def __contains__(self, image_id: object) -> bool: ...
    def __getitem__(self, image_id: str) -> PseudoMask:
        """The mask of an image; a MaskError or ImageError: there is none, it is damaged, doesn't fit the classes."""


class MaskFolder:
    """A folder of index masks (0 background, 1..C classes, 255 or 65,535 no label), certain of every pixel.

    Some of the masks are read at once: values that are no class say that the class set is wrong, not a mask.

    Args:
        folder: searched with all below it.
        class_names: names of mask values 1..C.
        what: the masks, for people.
        check: choice to do so. A mask that can't be read is left for when it is asked for.
        suffix: choice of its files, with ``strip`` taken off the ids, see ``find_images``.
        strip: the same; with it, the option is ``--gt-suffix``.

    Raises:
        ImageError: the folder can't be used.
        MaskError: one of these masks holds a value that is no class.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        what: str = "predictions",
        *,
        check: bool = True,
        suffix: str | None = None,
        strip: bool = False,
    ) -> None:
        self.path = folder
        self.files = find_images(folder, suffix, option="--gt-suffix" if strip else "", strip=strip)
        self.class_names = tuple(class_names)
        self.description = f"{what} {folder}"
        ids = list(self.files)
        self.identity = f"{what} {hashlib.sha256(chr(10).join(ids).encode()).hexdigest()[:12]}"
        for image_id in ids[:: max(1, len(ids) // _CHECKED)] if check else []:
            with suppress(ImageError):
                self[image_id]

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.files

    def __getitem__(self, image_id: str) -> PseudoMask:
        if image_id not in self.files:
            raise MaskError(f"{self.description}: no mask of image '{image_id}'")
        outputs = 1 + len(self.class_names)
        mask = read_mask(self.files[image_id], wide=outputs > IGNORE)
        largest = int(mask.max(initial=0, where=mask != ignore_value(outputs)))
        if largest > len(self.class_names):
            raise MaskError(
                f"{self.files[image_id]} holds the value {largest}, but there are {len(self.class_names)} "
                "classes; give the class set that the masks were made with"
            )
        return PseudoMask(mask, np.full(mask.shape, CERTAIN, np.uint8))
