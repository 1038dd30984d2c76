"""Training samples: picture, mask and confidence, augmented by random numbers of their own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import CacheRecordError, ImageError, TrainingError
from wsss_pipeline.segmentation.augmentation import IGNORE, Augmentation
from wsss_pipeline.segmentation.mask_sources import MaskSource

logger = logging.getLogger(__name__)

_SHOWN = 5


class Sample(TypedDict):
    """``image`` float32 (3, S, S), ``mask`` int64 (S, S) with 255, ``confidence`` float32 (S, S) in [0, 1].

    ``damaged``: the picture or mask couldn't be used, and every pixel is 255.
    """

    image: Tensor
    mask: Tensor
    confidence: Tensor
    image_id: str
    damaged: bool


@dataclass
class SegmentationDataset(Dataset[Sample]):
    """Samples by (epoch, position); a function of ``seed`` and these two alone, whichever process asks.

    Args:
        images: image id to file.
        source: of the masks.
        image_ids: what to train on; a position is one in this list.
        augmentation: see there.
        seed: of all random numbers.

    A picture or mask that can't be used is warned of once a process and gives a sample without labels.
    """

    images: Mapping[str, ImageFile]
    source: MaskSource
    image_ids: Sequence[str]
    augmentation: Augmentation
    seed: int
    _warned: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, position = place
        image_id = self.image_ids[position]
        try:
            image = torch.from_numpy(read_image(self.images[image_id]).copy()).permute(2, 0, 1)
            mask, confidence = (torch.from_numpy(array.copy()) for array in self.source.read(image_id))
            if image.shape[1:] != mask.shape:
                raise ImageError(
                    f"the picture is {image.shape[2]}x{image.shape[1]}, its mask {mask.shape[1]}x{mask.shape[0]}: "
                    "they don't belong together"
                )
        except (ImageError, CacheRecordError) as error:
            return self._damaged(image_id, error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample_seed(self.seed, epoch, position))
            pixels, labels, weights = self.augmentation(image, mask, confidence)
        return Sample(image=pixels, mask=labels.long(), confidence=weights, image_id=image_id, damaged=False)

    def _damaged(self, image_id: str, error: Exception) -> Sample:
        if image_id not in self._warned:
            self._warned.add(image_id)
            logger.warning("%s: counts nothing in training: %s", image_id, error)
        side = self.augmentation.config.crop
        return Sample(
            image=torch.zeros(3, side, side),
            mask=torch.full((side, side), IGNORE),
            confidence=torch.zeros(side, side),
            image_id=image_id,
            damaged=True,
        )


def sample_seed(*numbers: int) -> int:
    """A seed of 63 bits out of several numbers, unlike that of any other numbers."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class EpochSampler(Sampler[tuple[int, int]]):
    """An endless stream of (epoch, position), shuffled anew each epoch, that can start anywhere.

    Args:
        length: of the data set.
        seed: of the order.
        start: elements of the whole stream to pass over.
        rank, world: process ``rank`` of ``world`` gets every ``world``-th element, so that its batches and
            those of the others make up the batches of one process.
    """

    length: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        element = self.start + self.rank
        epoch, order = -1, torch.empty(0)
        while True:
            if element // self.length != epoch:
                epoch = element // self.length
                generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator)
            yield epoch, int(order[element % self.length])
            element += self.world


def training_ids(
    images: Mapping[str, ImageFile],
    source: MaskSource,
    split: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> list[str]:
    """The ids to train on: those of ``split``, or of all images, that have a picture and a mask.

    Raises:
        TrainingError: some have none and ``allow_missing`` is false, or none is left.
    """
    wanted = list(split) if split is not None else list(images)
    without_picture = [image_id for image_id in wanted if image_id not in images]
    without_mask = [image_id for image_id in wanted if image_id in images and not source.has(image_id)]
    for missing, what, remedy in (
        (without_picture, "have no picture", "give the folder that the list belongs to"),
        (without_mask, f"aren't in the {source.description}", "make their masks first"),
    ):
        if missing and not allow_missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise TrainingError(
                f"{len(missing):,} of the {len(wanted):,} images {what} ({shown}); {remedy}, or leave them out "
                "with --allow-missing"
            )
        if missing:
            logger.warning("%d of the %d images %s; they are left out", len(missing), len(wanted), what)
    left = set(without_picture) | set(without_mask)
    ids = [image_id for image_id in wanted if image_id not in left]
    if not ids:
        raise TrainingError(f"no image to train on: none of {len(wanted):,} has a picture and a mask")
    return ids
