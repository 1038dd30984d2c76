"""Masks by image id: what one is, how sure it is, and the protocol of all that has them."""

from __future__ import annotations

import hashlib
import logging
import math
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.class_lists import Color, is_no_class, labelmap_entries
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import image_size, read_mask
from wsss_pipeline.errors import ClassSetError, ConfigError, ImageError, MaskError
from wsss_pipeline.files import MIB, check_machine, read_text

logger = logging.getLogger(__name__)

IGNORE = 255  # in a mask of 8 bits
WIDE_IGNORE = 65_535  # in a mask of 16 bits
CERTAIN = 200  # half percents

_CHECKED = 32  # masks of a folder, before anything is done with the others

# as CVAT's and other tools' labelmap.txt call what leaves a pixel out
_NO_LABEL = ("ignore", "ignored", "void", "unlabeled", "unlabelled")


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
        elif np.max(confidence) == np.iinfo(np.uint8).max:
            problem = "what it was made of isn't a number (NaN)"  # 255 stands for it
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
    """A folder of masks (0 background, 1..C classes, 255 or 65,535 no label), certain of every pixel.

    Some of the masks are read at once: values that are no class say that the class set is wrong, not a mask. One
    that can't be read is left for when it is asked for. ``read_mask`` has the kinds of files. Colours are those of
    CVAT's ``labelmap.txt`` in the folder or beside it, else those given.

    Args:
        folder: searched with all below it.
        class_names: names of mask values 1..C.
        what: what the masks are. Ground truth of 0 and 255 alone is refused, predictions may be that unsure.
        colors: RGB colour to mask value, see ``ClassSet.colors``.
        suffix: choice of its files, see ``find_images``; that of ground truth is taken off the ids.

    Raises:
        ImageError: the folder can't be used.
        MaskError: one of these masks holds a value or a colour that is no class, none can be read, or ground
            truth is 0 and 255 alone.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        what: Literal["predictions", "ground truth"] = "predictions",
        colors: Mapping[Color, int] | None = None,
        *,
        suffix: str | None = None,
    ) -> None:
        self.path = folder
        self.description, self._is_truth = f"{what} {folder}", what == "ground truth"
        option = "--gt-suffix" if self._is_truth else ""
        self.files = find_images(folder, suffix, option=option, strip=self._is_truth)
        self.class_names = tuple(class_names)
        self._colors = _labelmap_colors(folder, self.class_names) or dict(colors or {})
        ids = list(self.files)
        self.identity = f"{what} {hashlib.sha256(chr(10).join(ids).encode()).hexdigest()[:12]}"
        self._sizes: dict[str, tuple[int, int]] = {}  # width and height of the masks that were looked at
        if ids:
            self._check(ids[:: max(1, len(ids) // _CHECKED)])

    def __contains__(self, image_id: object) -> bool:
        return self._file(image_id) is not None

    def __getitem__(self, image_id: str) -> PseudoMask:
        if (file := self._file(image_id)) is None:
            raise MaskError(f"{self.description}: no mask of image '{image_id}'")
        outputs = 1 + len(self.class_names)
        mask = read_mask(file, self._colors, wide=outputs > IGNORE)
        if int(mask.max(initial=0, where=mask != ignore_value(outputs))) >= outputs:
            raise MaskError(f"{file} {values_problem(mask, len(self.class_names))}")
        return PseudoMask(mask, np.full(mask.shape, CERTAIN, np.uint8))

    def _file(self, image_id: object) -> ImageFile | None:
        """The mask's file; its name may have another Unicode form than the image's."""
        file = self.files.get(str(image_id))
        if file is None and not str(image_id).isascii():
            file = self._composed.get(unicodedata.normalize("NFC", str(image_id)))
        return file

    @cached_property
    def _composed(self) -> dict[str, ImageFile]:
        return {unicodedata.normalize("NFC", image_id): file for image_id, file in self.files.items()}

    def _check(self, some: Sequence[str]) -> None:
        ignore = ignore_value(1 + len(self.class_names))
        counts, failures, count = np.zeros(ignore + 1, np.int64), list[ImageError](), len(self.class_names)
        for image_id in some:
            try:
                mask = self[image_id].mask
                counts += np.bincount(mask.ravel(), minlength=ignore + 1)
                self._sizes[image_id] = mask.shape[1], mask.shape[0]
            except ImageError as error:
                failures.append(error)
        if not self._sizes:
            raise MaskError(f"{self.description}: none of the masks can be read; the first: {failures[0]}")
        if not self._is_truth:
            return
        if counts[ignore] and not counts[1:ignore].any():
            for image_id in self.files:  # the others may have objects
                with suppress(ImageError):
                    mask = self[image_id].mask
                    if ((mask > 0) & (mask < ignore)).any():
                        return
            raise MaskError(
                f"{self.description}: masks such as {self.files[next(iter(self._sizes))]} hold 0 and {ignore} only: "
                f"binary masks? {ignore} means 'ignore' here, so write objects as their class index, 1 for the first "
                "class"
            )
        if counts[ignore] > counts[0] and count > 1 and not counts[count]:
            logger.warning(
                "%s: %d covers %.0f %% of the pixels, more than 0 does, and the last class, %d, never occurs: are "
                "classes counted from 0 there, with %d for background? Here 0 is background, classes count from 1, "
                "and %d leaves a pixel out",
                self.description,
                ignore,
                100 * counts[ignore] / counts.sum(),
                count,
                ignore,
                ignore,
            )

    def check_sizes(self, images: Mapping[str, ImageFile]) -> None:
        """Passes masks of the size of their images; a MaskError where none of those looked at has it.

        Args:
            images: image id to file.
        """
        differing = ""
        for image_id, size in self._sizes.items():
            if image_id not in images:
                continue
            with suppress(ImageError):
                of_image = image_size(images[image_id])
                if size == of_image:
                    return
                differing = differing or (
                    f"{self.description}: the mask of '{image_id}' is {size[0]}x{size[1]}, its image "
                    f"{of_image[0]}x{of_image[1]}: {size_cause(size, of_image)}"
                )
        if differing:
            raise MaskError(differing)


def _labelmap_colors(folder: Path, class_names: tuple[str, ...]) -> dict[Color, int | str]:
    """What the colours of a folder's masks stand for by CVAT's ``labelmap.txt``; empty where there is none.

    Raises:
        MaskError: it can't be read.
    """
    places = (folder / "labelmap.txt", folder.absolute().parent / "labelmap.txt")
    file = next((place for place in places if place.is_file()), None)
    if file is None or not folder.is_dir():
        return {}
    try:
        entries = labelmap_entries(read_text(file, MIB), str(file))
    except (OSError, ValueError, ClassSetError) as error:
        check_machine(error)
        raise MaskError(f"colours of the masks in {folder}: {error}") from error
    values = {unicodedata.normalize("NFC", name): value for value, name in enumerate(class_names, start=1)}
    colors: dict[Color, int | str] = {}
    for name, color in entries:
        if color is None:
            continue
        called = unicodedata.normalize("NFC", name)
        if called in values:
            colors[color] = values[called]
        elif called.casefold() in _NO_LABEL or (is_no_class(called) and "ignore" in called.casefold()):
            colors[color] = ignore_value(1 + len(class_names))
        else:
            colors[color] = 0 if is_no_class(called) else name
    return {(0, 0, 0): 0, **colors} if colors else {}


def values_problem(mask: Mask, classes: int) -> str:
    """Which values of a mask are no class, and the likely cause; half a message.

    Args:
        mask: (H, W) with values above ``classes`` other than that of "no label".
        classes: number of classes without the background.
    """
    ignore = ignore_value(1 + classes)
    values = {int(value) for value in np.unique(mask)} - {0, ignore}
    grey = np.rint(voc_palette() @ (0.299, 0.587, 0.114)).astype(int)
    stretched = {i * 255 // classes for i in range(classes + 1)} | {
        round(i * 255 / classes) for i in range(classes + 1)
    }
    if values <= {*grey[: classes + 1].tolist(), int(grey[IGNORE])}:
        cause = "these are grey levels of the VOC colours: keep the palette when the PNGs are converted"
    elif classes == 80 and max(values) <= 91:
        cause = "these are COCO category ids (1..90 with gaps): map them to 1..80 in category order"
    elif values <= stretched:
        cause = (
            f"these are indices stretched to 0..255 so that one sees them: divide them by {255 / classes:g}"
        )
    elif len(values) > classes + 1:
        cause = "these look like grey levels or colours, not classes: a mask holds one class index a pixel"
    else:
        cause = "the masks belong to another class set: give the one that they were made with"
    shown = sorted(values)
    listed = ", ".join(map(str, shown[:12])) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    return (
        f"holds values {listed}, but with {classes} classes and the background it may hold "
        f"0..{classes} and {ignore}; {cause}"
    )


def size_cause(first: tuple[int, int], second: tuple[int, int]) -> str:
    """Why two sizes (width, height) of what belongs together may differ, and how to mend it."""
    (width, height), (other_width, other_height) = first, second
    if first == second[::-1]:
        return "one of the two was rotated (EXIF orientation); use images and masks of the same orientation"
    if abs(height * other_width - width * other_height) <= max(*first, *second):
        return "one of the two was resized; score masks at the size of the ground truth"
    return "they belong to different images; check that both folders use the same image ids"
