"""From loaded pictures to labelled ones, in the way that suits the machine.

On a CPU each picture stays in one thread from CLIP to CRF. On a GPU batches go through both without leaving the
device. pydensecrf, which would block all threads, gets processes of its own behind CLIP's batches.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cache import PseudoMask
from wsss_pipeline.data.masks import CERTAIN
from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.runtime.stopwatch import Stopwatch
from wsss_pipeline.stages.class_activation import ClassActivation
from wsss_pipeline.stages.device_labels import label_on_device
from wsss_pipeline.stages.label_pixels import CrfArguments, LabelledPixels, label_pixels, start_workers
from wsss_pipeline.stages.loaded_image import LoadedImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """What becomes of an image, the seconds spent on it, and CLIP's and the CRF's part of them."""

    mask: PseudoMask
    seconds: float
    clip_seconds: float = 0.0
    crf_seconds: float = 0.0


Finish = Callable[[], Labelled]  # waits until an image is labelled


@dataclass
class Labelling(ABC):
    """What all ways have in common.

    ``activation``: CLIP and CAMs. ``crf``: with the backend resolved. ``store_cams``: keep the CAMs too.
    ``workers``: threads or processes beside the main one.
    """

    activation: ClassActivation
    crf: CrfConfig
    device: str
    store_cams: bool
    workers: int

    @abstractmethod
    def start(self, batch: Sequence[LoadedImage]) -> list[Finish]:
        """Begin with pictures of one size, each with at least one class.

        Raises:
            ImageError, MemoryError, RuntimeError: one of them can't be labelled, or all together can't; from
                what is returned as well.
        """

    @abstractmethod
    def stop(self) -> None:
        """Let go of threads and processes; what hasn't begun is dropped."""

    def background(self, image: LoadedImage) -> Labelled:
        """A picture in which no class is present."""
        mask, confidence = np.zeros(image.size, np.uint8), np.full(image.size, CERTAIN, np.uint8)
        cams = np.zeros((0, *image.size), np.float16) if self.store_cams else None
        return Labelled(PseudoMask(mask, confidence, image.labels, cams), time.monotonic() - image.started)

    def cams(self, batch: Sequence[LoadedImage]) -> tuple[list[Tensor], float]:
        """CAMs of pictures of one size, and the seconds that each took."""
        with Stopwatch(self.device) as watch:
            found = self.activation.cams(
                [image.clip_pixels() for image in batch], [image.classes for image in batch]
            )
        return found, watch.seconds() / len(batch)

    def stored(self, image: LoadedImage, cams: Tensor) -> NDArray[np.float16] | None:
        """The CAMs as the cache keeps them."""
        return upscale_cams(cams, image.size).half().cpu().numpy() if self.store_cams else None

    def crf_arguments(self, image: LoadedImage, cams: Tensor) -> CrfArguments:
        """Arguments of ``label_pixels``."""
        # half precision is what the cache stores and what the published CRF reads
        scores = assemble(upscale_cams(cams, image.working_size).half()).cpu().numpy()
        return image.working_pixels(), scores, image.classes, image.size, self.crf, self.device

    def labelled(
        self,
        image: LoadedImage,
        stored: NDArray[np.float16] | None,
        clip_seconds: float,
        pixels: LabelledPixels,
    ) -> Labelled:
        """All of a picture's results together."""
        mask, confidence, crf_seconds = pixels
        found = PseudoMask(mask, confidence, image.labels, stored)
        return Labelled(found, clip_seconds + crf_seconds, clip_seconds, crf_seconds)


@dataclass
class PictureThreads(Labelling):
    """CLIP and CRF of each picture in a thread of its own, or here and now where there are no workers."""

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.workers) if self.workers else None

    def start(self, batch: Sequence[LoadedImage]) -> list[Finish]:
        """See ``Labelling``."""
        if self._pool is None:
            done = [self._label(image) for image in batch]
            return [partial(_same, labelled) for labelled in done]
        return [self._pool.submit(self._label, image).result for image in batch]

    def stop(self) -> None:
        """See ``Labelling``."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _label(self, image: LoadedImage) -> Labelled:
        (cams,), clip_seconds = self.cams([image])
        pixels = label_pixels(*self.crf_arguments(image, cams))
        return self.labelled(image, self.stored(image, cams), clip_seconds, pixels)


class DeviceBatches(Labelling):
    """CLIP and CRF of a batch one after the other on a GPU."""

    def start(self, batch: Sequence[LoadedImage]) -> list[Finish]:
        """See ``Labelling``."""
        cams, clip_seconds = self.cams(batch)
        pixels = label_on_device(batch, cams, self.crf, self.device)
        return [
            partial(self._finish, image, self.stored(image, maps), clip_seconds, wait)
            for image, maps, wait in zip(batch, cams, pixels, strict=True)
        ]

    def stop(self) -> None:
        """There is nothing to let go of."""

    def _finish(
        self,
        image: LoadedImage,
        stored: NDArray[np.float16] | None,
        clip_seconds: float,
        wait: Callable[[], LabelledPixels],
    ) -> Labelled:
        return self.labelled(image, stored, clip_seconds, wait())


@dataclass
class CrfProcesses(Labelling):
    """CLIP's batches here, the CRF in processes of its own, or here where there are no workers."""

    def __post_init__(self) -> None:
        self._pool: Executor | None = start_workers(self.workers) if self.workers else None

    def start(self, batch: Sequence[LoadedImage]) -> list[Finish]:
        """See ``Labelling``."""
        cams, clip_seconds = self.cams(batch)
        return [self._submit(image, maps, clip_seconds) for image, maps in zip(batch, cams, strict=True)]

    def stop(self) -> None:
        """See ``Labelling``."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, image: LoadedImage, cams: Tensor, clip_seconds: float) -> Finish:
        arguments, stored = self.crf_arguments(image, cams), self.stored(image, cams)
        pixels = self._begin(arguments)

        def finish() -> Labelled:
            return self.labelled(image, stored, clip_seconds, self._result(pixels, arguments))

        return finish

    def _begin(self, arguments: CrfArguments) -> Future[LabelledPixels]:
        if self._pool is not None:
            try:
                return self._pool.submit(label_pixels, *arguments)
            except BrokenProcessPool:
                self._give_up_workers()
        result: Future[LabelledPixels] = Future()
        result.set_result(label_pixels(*arguments))
        return result

    def _result(self, result: Future[LabelledPixels], arguments: CrfArguments) -> LabelledPixels:
        try:
            return result.result()
        except BrokenProcessPool:
            self._give_up_workers()
            return label_pixels(*arguments)

    def _give_up_workers(self) -> None:
        if self._pool is not None:
            logger.warning("a CRF worker process died (out of memory?); going on without worker processes")
            self._pool = None


def _same(labelled: Labelled) -> Labelled:
    return labelled
