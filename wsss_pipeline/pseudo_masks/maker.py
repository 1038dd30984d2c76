"""What the loop asks of a maker of masks: a method with CLIP, or a trained network; or of regions: a SAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cache import MaskSet
from wsss_pipeline.config import PixelRange
from wsss_pipeline.data.masks import CERTAIN, PseudoMask, mask_type
from wsss_pipeline.data.transforms import Prepared
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.runtime.device import seconds_between


@dataclass(frozen=True)
class LabelledImage:
    """An image on its way into CLIP or a network, with its labels.

    Attributes:
        pixels: uint8 (H, W, 3) RGB.
        labels: names of the classes that are present; None where each may be.
        classes: their mask values 1..C, in the same order; none for regions.
        prepared: input of CLIP; for a network, which prepares it itself, the pixels (3, H, W) as they are.
        regions: its regions, where they vote.
    """

    pixels: NDArray[np.uint8]
    labels: tuple[str, ...] | None
    classes: list[int]
    prepared: Prepared
    regions: Regions | None = None

    @property
    def is_background(self) -> bool:
        """Whether no class is present, so that nothing needs to look at it."""
        return self.labels == ()

    def background(self, with_cams: bool, outputs: int) -> PseudoMask:
        """The mask where no class is present; ``outputs``: number 1+C of values that masks may have."""
        size = self.pixels.shape[:2]
        cams = np.zeros((0, *size), np.float16) if with_cams else None
        return PseudoMask(np.zeros(size, mask_type(outputs)), np.full(size, CERTAIN, np.uint8), (), cams)


@dataclass(frozen=True)
class Generated:
    """A pseudo mask that may still be on its way from the device, with the time it took there.

    Attributes:
        labels: the image's class names.
        mask, confidence, cams: uint8 or uint16 (H, W), uint8 (H, W), float16 (K, H, W) or None, on the host or on
            the way to it.
        marks: times of the device's clock, before CLIP, after it, and after refiner, arg max and copies.
        share: this image's part of the batch.
    """

    labels: tuple[str, ...]
    mask: Tensor
    confidence: Tensor
    cams: Tensor | None
    marks: tuple[Any, Any, Any]
    share: float

    def wait(self) -> tuple[PseudoMask, float, float]:
        """The pseudo mask, and the seconds in the model and in the refiner.

        Raises:
            MaskError: the refiner's posterior isn't finite.
        """
        start, middle, end = self.marks
        refining = seconds_between(middle, end) * self.share  # waits until the copies have arrived
        cams = None if self.cams is None else self.cams.numpy()
        mask = PseudoMask(self.mask.numpy(), self.confidence.numpy(), self.labels, cams)
        return mask, seconds_between(start, middle) * self.share, refining


class Waiting(Protocol):
    """What was started."""

    def wait(self) -> tuple[Any, float, float]:
        """The PseudoMask or Regions, and the seconds in the model and in the refiner; errors as ``generate``."""


class MaskMaker(Protocol):
    """Makes pseudo masks of labelled images, or regions of any.

    Attributes:
        device: where its tensors lie.
        in_threads: several threads call it at a time, with an image each, and torch has one thread in each of them.
        model: what looks at the images: CLIP, a network, or a SAM.
        if_too_large: advice to whom memory ran out on an image.
        pixel_range: values of images that become 0 and 255, see ``read_image``; None for what files say.
    """

    device: torch.device
    in_threads: bool
    model: str
    if_too_large: str

    @property
    def pixel_range(self) -> PixelRange | None: ...

    @property
    def mask_set(self) -> MaskSet:
        """What the masks or regions are and all that determines them."""

    def lines(self) -> list[str]:
        """The choices that decide over the masks, as a person reads them."""

    def load(self) -> None:
        """Load what making a mask takes, where it isn't there yet."""

    def prepare(
        self, pixels: NDArray[np.uint8], labels: Sequence[str] | None, image_id: str = ""
    ) -> LabelledImage:
        """An image, uint8 (H, W, 3) RGB, and its classes.

        Raises:
            ClassSetError: a label is unknown.
            RegionError: its regions vote, and there are none for this id.
        """

    def generate(self, batch: Sequence[LabelledImage], with_cams: bool) -> Sequence[Waiting]:
        """Start with images whose prepared sizes are equal, each with at least one class.

        Raises:
            ImageError, MaskError, MemoryError, RuntimeError: one of them can't be labelled, or all together can't.
        """
