"""Training samples: image, mask and confidence, augmented by random numbers of their own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import PixelRange
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import IGNORE, MaskSource, ignore_value
from wsss_pipeline.errors import ImageError, MaskError, TrainingError

logger = logging.getLogger(__name__)

_SHOWN = 5


class Sample(TypedDict):
    """One crop of side S.

    Attributes:
        image: float32 (3, S, S), normalised.
        mask: int64 (S, S), 255 where there is no label, 65,535 with more than 254 classes.
        confidence: uint8 (S, S), half percents.
        present: bool (1+C,), classes of the whole image by its image-level labels; all False where none are known.
        image_id: id of the image.
        damaged: True where image or mask couldn't be used; no pixel then has a label.
    """

    image: Tensor
    mask: Tensor
    confidence: Tensor
    present: Tensor
    image_id: str
    damaged: bool


@dataclass(frozen=True)
class ImageLabels:
    """Image-level labels, for targets that are made in training.

    Attributes:
        class_names: names of mask values 1..C.
        present: image id to mask values of the classes that are in the image.
        identity: text that tells these labels, and how targets are made of them, from others.
        description: origin of the labels, for people.
    """

    class_names: tuple[str, ...]
    present: Mapping[str, tuple[int, ...]]
    identity: str
    description: str

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.present


class JointAugmentation(Protocol):
    """Random changes of an image and what belongs to its pixels."""

    @property
    def crop(self) -> int:
        """Side of what comes out, pixels."""

    def __call__(self, image: Tensor, mask: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One training sample, see ``Augmentation``."""


@dataclass
class SegmentationDataset(Dataset[Sample]):
    """Samples by (epoch, position); a function of ``seed`` and these two alone, whichever process asks.

    An image or mask that can't be used is warned of once a process and gives a sample without labels.

    Args:
        images: image id to file.
        masks: masks of these images; or their labels, which give a mask of 0 inside the image.
        image_ids: ids to train on; a position is one in this list.
        augmentation: random changes.
        seed: seed of all random numbers.
        pixel_range: values of images that become 0 and 255, see ``read_image``.
        least: uint8 (1+C,), for each mask value the confidence, in half percents, below which a pixel has none.
    """

    images: Mapping[str, ImageFile]
    masks: MaskSource | ImageLabels
    image_ids: Sequence[str]
    augmentation: JointAugmentation
    seed: int
    pixel_range: PixelRange | None = None
    least: Tensor | None = None
    _warned: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        image_id = self.image_ids[position]
        outputs = 1 + len(self.masks.class_names)
        present = torch.zeros(outputs, dtype=torch.bool)
        # more than 254 classes take 16 bits, and torch can do little with uint16
        kind = torch.uint8 if outputs <= IGNORE else torch.int32
        try:
            image = torch.tensor(read_image(self.images[image_id], self.pixel_range))
            if isinstance(self.masks, ImageLabels):
                mask = torch.zeros(image.shape[:2], dtype=kind)
                confidence = torch.zeros(image.shape[:2], dtype=torch.uint8)
                present[list(self.masks.present[image_id])] = True
            else:
                labelled = self.masks[image_id]
                mask, confidence = torch.tensor(labelled.mask).to(kind), torch.tensor(labelled.confidence)
                present[1:] = torch.tensor([name in labelled.labels for name in self.masks.class_names])
            if self.least is not None:
                needed = self.least[mask.long().clamp(max=len(self.least) - 1)]
                confidence[confidence < needed] = 0
            if image.shape[:2] != mask.shape:
                raise ImageError(
                    f"the image is {image.shape[1]}x{image.shape[0]}, its mask {mask.shape[1]}x{mask.shape[0]}: "
                    "they don't belong together"
                )
        except (ImageError, MaskError) as error:
            if image_id not in self._warned:
                self._warned.add(image_id)
                logger.warning("%s: counts nothing in training: %s", image_id, error)
            present[:] = False
            damaged, side = True, self.augmentation.crop
            # noise: where all is zero, each layer norm of a fresh SegFormer multiplies the gradient by a thousand
            noise = torch.Generator().manual_seed(_seed(self.seed, epoch, position))
            pixels = torch.randn(3, side, side, generator=noise)
            labels = torch.full((side, side), ignore_value(outputs))
            certainty = torch.zeros((side, side), dtype=torch.uint8)
        else:
            damaged = False
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(self.seed, epoch, position))
                pixels, labels, certainty = self.augmentation(image.permute(2, 0, 1), mask, confidence)
        return Sample(
            image=pixels,
            mask=labels.long(),
            confidence=certainty,
            present=present,
            image_id=image_id,
            damaged=damaged,
        )


def sample_order(
    length: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, int]]:
    """An endless stream of (epoch, position), shuffled anew each epoch.

    Args:
        length: number of samples of the data set.
        seed: seed of the order.
        start: elements of the whole stream to pass over.
        rank, world: process ``rank`` of ``world`` gets every ``world``-th element, so that its batches and
            those of the others make up the batches of one process.
    """

    def shuffled(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_seed(seed, epoch))
        order: list[int] = torch.randperm(length, generator=generator).tolist()
        return order

    first, passed = divmod(start, length)
    stream = ((epoch, position) for epoch in count(first) for position in shuffled(epoch))
    return islice(stream, passed + rank, None, world)


def _seed(*numbers: int) -> int:
    """A seed of 63 bits out of several numbers, unlike that of any other numbers."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def usable_ids(
    images: Mapping[str, ImageFile],
    masks: MaskSource | ImageLabels,
    split: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> list[str]:
    """Ids of ``split``, of all images without it, that have an image and a mask.

    Images that lack a mask are left out, with a warning, where they are no more than those that failed when the masks
    were made: one damaged image in a million stops neither stage.

    Raises:
        TrainingError: more lack one of the two and ``allow_missing`` is false, or none is left.
    """
    wanted = ids = list(images if split is None else split)
    is_labelled = isinstance(masks, ImageLabels)
    remedy_of_masks, what_else = (
        ("label them", "labels")
        if is_labelled
        else ("make their masks first, list the images to train on with --split", "a mask")
    )
    for source, what, remedy in (
        (images, "have no image file", "give the folder that the list belongs to"),
        (masks, f"aren't in the {masks.description}", remedy_of_masks),
    ):
        missing = [image_id for image_id in ids if image_id not in source]
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        failed = source.manifest.completion.failed if isinstance(source, MaskCache) else 0
        if len(missing) > failed and not allow_missing:
            raise TrainingError(
                f"{len(missing):,} of the {len(wanted):,} images {what} ({shown}); {remedy}, or leave them out "
                "with --allow-missing"
            )
        if missing:
            left_out = "%d of the %d images %s (%s); they are left out"
            logger.warning(left_out, len(missing), len(wanted), what, shown)
        ids = [image_id for image_id in ids if image_id in source]
    if not ids:
        raise TrainingError(f"no image to work on: none of {len(wanted):,} has an image file and {what_else}")
    return ids
