"""The loop of stage one: load, activate, label, write; in order, and whatever happens to one image."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TextIO

from wsss_pipeline.cache import MaskWriter
from wsss_pipeline.config import CrfBackend
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import has_rotation
from wsss_pipeline.errors import ImageError
from wsss_pipeline.runtime.device import single_threaded_torch
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.stages.class_activation import ClassActivation
from wsss_pipeline.stages.labelling import (
    CrfProcesses,
    DeviceBatches,
    Finish,
    Labelled,
    Labelling,
    PictureThreads,
)
from wsss_pipeline.stages.loaded_image import LoadedImage, ahead, load_image, same_size_batches, windows
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest
from wsss_pipeline.stages.mask_report import MaskReport

logger = logging.getLogger(__name__)

LOOK_AHEAD = 4  # batches that are looked through for images of one size

SHARED_AMONG_WORKERS: dict[type[Labelling], tuple[str, ...]] = {
    PictureThreads: ("CLIP", "CRF"),
    CrfProcesses: ("CRF",),
    DeviceBatches: ("reading",),
}

# torch has no exception class of its own for memory that ran out on the CPU
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Pending:
    """An image on its way; ``finish`` waits for it."""

    image: LoadedImage
    finish: Finish


class MaskRun:
    """One run over the images that are left to do; its doings go into ``report``."""

    def __init__(
        self,
        request: MaskRequest,
        plan: MaskPlan,
        activation: ClassActivation,
        writer: MaskWriter,
        report: MaskReport,
        progress_stream: TextIO | None = None,
    ) -> None:
        self._progress_stream = progress_stream
        self._request = request
        self._plan = plan
        self._activation = activation
        self._writer = writer
        self._report = report
        self._way = way_of_labelling(plan.config.crf.backend, plan.device)
        self._pending: deque[Pending] = deque()
        self._warned_of_rotation = False
        report.workers = request.workers
        report.shared = SHARED_AMONG_WORKERS[self._way]
        report.busy = dict.fromkeys(("reading", "CLIP", "CRF", "writing"), 0.0)

    def compute(self, todo: list[str]) -> None:
        """Compute and write the masks of ``todo``, in order, until done or asked to stop."""
        started = time.monotonic()
        request, plan, threads = self._request, self._plan, self._way is PictureThreads
        self._labelling = self._way(
            self._activation, plan.config.crf, plan.device, request.store_cams, request.workers
        )
        try:
            with (
                StopRequest() as stop,
                Progress(len(todo), stream=self._progress_stream) as self._progress,
                single_threaded_torch() if threads else nullcontext(),
            ):
                batch_size = 1 if threads else request.batch_size
                length = 1 if batch_size == 1 else LOOK_AHEAD * batch_size
                readers = request.workers if self._way is DeviceBatches else 0
                reading = partial(ahead, self._read, todo, readers, length + batch_size)
                for window in windows(self._loaded(reading(), stop), length):
                    self._activate(window, batch_size)
                    self._collect(at_most_left=max(2 * request.workers, batch_size))
                self._collect(at_most_left=0)
                self._report.interrupted = stop.requested and self._progress.left > 0
        finally:
            self._labelling.stop()
            self._report.computing += time.monotonic() - started

    @contextmanager
    def _busy(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._report.busy[stage] += time.monotonic() - started

    @contextmanager
    def _one_image(self, image_id: str) -> Iterator[None]:
        """What goes wrong inside is this image's failure, not the run's."""
        reason = "ran out of memory; lower --max-pixels, --workers or --batch-size"
        try:
            yield
        except ImageError as error:
            self._fail(image_id, str(error))
        except MemoryError:
            self._fail(image_id, reason)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._fail(image_id, reason)

    def _fail(self, image_id: str, reason: str) -> None:
        self._report.fail(image_id, reason)
        self._progress.advance(failed=1)

    def _read(self, image_id: str) -> tuple[LoadedImage, float]:
        """A picture, and the seconds that reading it took."""
        started = time.monotonic()
        file, labels = self._request.images[image_id], self._request.labels[image_id]
        classes = [self._plan.class_set.index(name) for name in labels]
        patch_size, max_pixels = self._activation.patch_size, self._plan.config.max_pixels
        image = load_image(image_id, file, labels, classes, patch_size, max_pixels)
        self._warn_of_rotation(file)
        return image, time.monotonic() - started

    def _loaded(
        self, reading: Iterator[tuple[str, Callable[[], tuple[LoadedImage, float]]]], stop: StopRequest
    ) -> Iterator[LoadedImage]:
        """Pictures in order, without those that can't be read, until the end or a request to stop."""
        with closing(reading):  # type: ignore[type-var]  # a generator
            for image_id, read in reading:
                if stop.requested:
                    return
                image = None
                with self._one_image(image_id):
                    image, seconds = read()
                    self._report.busy["reading"] += seconds
                if image is not None:
                    yield image

    def _activate(self, window: list[LoadedImage], batch_size: int) -> None:
        """Start labelling some pictures, in order; one without classes needs no CAMs."""
        started: dict[str, Finish] = {}
        for batch in same_size_batches(window, batch_size):
            started.update(self._start(batch))
        for image in window:
            if not image.classes:
                self._pending.append(Pending(image, partial(self._labelling.background, image)))
            elif image.image_id in started:
                self._pending.append(Pending(image, started[image.image_id]))

    def _start(self, batch: list[LoadedImage]) -> dict[str, Finish]:
        """By image id, without those that failed."""
        try:
            found = self._labelling.start(batch)
        except (ImageError, MemoryError, RuntimeError) as error:
            if len(batch) == 1:
                with self._one_image(batch[0].image_id):
                    raise error
                return {}
            # one of them may be at fault, or together they are too many
            return {key: finish for image in batch for key, finish in self._start([image]).items()}
        return {image.image_id: finish for image, finish in zip(batch, found, strict=True)}

    def _collect(self, at_most_left: int) -> None:
        """Write what is ready, oldest first, until no more than so many images wait."""
        while len(self._pending) > at_most_left:
            pending = self._pending.popleft()
            with self._one_image(pending.image.image_id):
                self._write(pending.image, pending.finish())

    def _write(self, image: LoadedImage, labelled: Labelled) -> None:
        report = self._report
        report.busy["CLIP"] += labelled.clip_seconds
        report.busy["CRF"] += labelled.crf_seconds
        with self._busy("writing"):
            self._writer.write(
                image.image_id,
                labelled.mask,
                image_digest=image.digest,
                seconds=labelled.seconds,
                scale=image.clip_size.scale,
                status=image.status,
            )
        report.computed += 1
        report.without_labels += not image.classes
        report.scaled += image.clip_size.scale < 1
        self._progress.advance()

    def _warn_of_rotation(self, file: ImageFile) -> None:
        if not self._warned_of_rotation and has_rotation(file):
            self._warned_of_rotation = True
            logger.warning(
                "%s has an EXIF rotation tag, maybe others too: it is ignored, masks fit the stored pixels",
                file,
            )


def way_of_labelling(crf: CrfBackend, device: str) -> type[Labelling]:
    """The way that suits CRF and device; see ``labelling``."""
    if crf == "pydensecrf":
        return CrfProcesses
    return PictureThreads if device == "cpu" else DeviceBatches


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(part in text for part in OUT_OF_MEMORY_TEXTS)
