"""The loop of stage one: load, activate, label, write; in order, and whatever happens to one image."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cache import KnownImages, MaskWriter, PseudoMask
from wsss_pipeline.cache.pseudo_mask import CERTAIN
from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.data.images import has_rotation
from wsss_pipeline.errors import ImageError
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.stages.class_activation import ClassActivation
from wsss_pipeline.stages.label_pixels import LabelledPixels, label_pixels, start_workers
from wsss_pipeline.stages.loaded_image import LoadedImage, batches, load_image
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest
from wsss_pipeline.stages.mask_report import MaskReport

logger = logging.getLogger(__name__)

# torch has no exception class of its own for memory that ran out on the CPU
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Pending:
    """An image whose pixels are being labelled.

    ``seconds``: spent on it so far. ``arguments``: to label it here, should its worker process die.
    """

    image: LoadedImage
    cams: NDArray[np.float16] | None
    seconds: float
    result: Future[LabelledPixels]
    arguments: tuple[Any, ...]


class MaskRun:
    """One run over the images that are left to do; its doings go into ``report`` and ``known``."""

    def __init__(
        self,
        request: MaskRequest,
        plan: MaskPlan,
        activation: ClassActivation,
        writer: MaskWriter,
        report: MaskReport,
        known: KnownImages,
    ) -> None:
        self._request = request
        self._plan = plan
        self._activation = activation
        self._writer = writer
        self._report = report
        self._known = known
        self._workers = request.workers if _runs_on_cpu(plan) else 0
        self._pool: Executor | None = None
        self._pending: deque[Pending] = deque()
        self._warned_of_rotation = False
        report.workers = self._workers
        report.busy = dict.fromkeys(("reading", "CLIP", "CRF", "writing"), 0.0)

    def compute(self, todo: list[str]) -> None:
        """Compute and write the masks of ``todo``, in order, until done or asked to stop."""
        started = time.monotonic()
        self._pool = start_workers(self._workers, self._plan.config.crf.backend) if self._workers else None
        try:
            with StopRequest() as stop, Progress(len(todo)) as self._progress:
                for batch in batches(self._load(todo, stop), self._request.batch_size):
                    self._activate(batch)
                    self._collect(at_most_left=2 * self._workers)
                self._collect(at_most_left=0)
                self._report.interrupted = stop.requested and self._progress.left > 0
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
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
        reason = "ran out of memory; lower --max-pixels or --batch-size"
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
        self._progress.advance(failed=True)

    def _load(self, todo: list[str], stop: StopRequest) -> Iterator[LoadedImage]:
        patch_size, max_pixels = self._activation.patch_size, self._plan.config.max_pixels
        for image_id in todo:
            if stop.requested:
                return
            image = None
            with self._one_image(image_id), self._busy("reading"):
                file, labels = self._request.images[image_id], self._request.labels[image_id]
                classes = [self._plan.class_set.index(name) for name in labels]
                image = load_image(image_id, file, labels, classes, patch_size, max_pixels)
                self._warn_of_rotation(file)
            if image is not None:
                yield image

    def _activate(self, batch: list[LoadedImage]) -> None:
        """CAMs of a batch, handed on to the CRF; an image without classes needs none."""
        if not batch[0].classes:
            self._submit_background(batch[0])
            return
        try:
            with self._busy("CLIP"):
                found = self._activation.cams(
                    [image.clip_pixels() for image in batch], [image.classes for image in batch]
                )
        except (ImageError, MemoryError, RuntimeError) as error:
            if len(batch) == 1:
                with self._one_image(batch[0].image_id):
                    raise error
            else:  # one of them may be at fault, or together they are too many
                for image in batch:
                    self._activate([image])
            return
        for image, cams in zip(batch, found, strict=True):
            with self._one_image(image.image_id):
                self._submit(image, cams)

    def _submit_background(self, image: LoadedImage) -> None:
        result: Future[LabelledPixels] = Future()
        result.set_result((np.zeros(image.size, np.uint8), np.full(image.size, CERTAIN, np.uint8), 0.0))
        stored = np.zeros((0, *image.size), np.float16) if self._request.store_cams else None
        self._pending.append(Pending(image, stored, time.monotonic() - image.started, result, ()))

    def _submit(self, image: LoadedImage, cams: Tensor) -> None:
        # half precision is what the cache stores and what the published CRF reads
        scores = assemble(upscale_cams(cams, image.working_size).half()).cpu().numpy()
        stored = None
        if self._request.store_cams:
            stored = upscale_cams(cams, image.size).half().cpu().numpy()
        crf, device = self._plan.config.crf, self._plan.device
        arguments = (image.working_pixels(), scores, image.classes, image.size, crf, device)
        seconds = time.monotonic() - image.started
        self._pending.append(Pending(image, stored, seconds, self._start(arguments), arguments))

    def _start(self, arguments: tuple[Any, ...]) -> Future[LabelledPixels]:
        if self._pool is not None:
            try:
                return self._pool.submit(label_pixels, *arguments)
            except BrokenProcessPool:
                self._give_up_workers()
        result: Future[LabelledPixels] = Future()
        result.set_result(label_pixels(*arguments))
        return result

    def _collect(self, at_most_left: int) -> None:
        """Write what is ready, oldest first, until no more than so many images wait."""
        while len(self._pending) > at_most_left:
            pending = self._pending.popleft()
            with self._one_image(pending.image.image_id):
                self._write(pending, *self._result(pending))

    def _result(self, pending: Pending) -> LabelledPixels:
        try:
            return pending.result.result()
        except BrokenProcessPool:
            self._give_up_workers()
            return label_pixels(*pending.arguments)

    def _write(
        self, pending: Pending, mask: NDArray[np.uint8], confidence: NDArray[np.uint8], seconds: float
    ) -> None:
        image, report = pending.image, self._report
        report.busy["CRF"] += seconds
        with self._busy("writing"):
            self._writer.write(
                image.image_id,
                PseudoMask(mask, confidence, image.labels, pending.cams),
                image_digest=image.digest,
                seconds=pending.seconds + seconds,
                scale=image.clip_size.scale,
            )
        self._known.note(image.image_id, image.status, image.labels, pending.cams is not None)
        report.computed += 1
        report.without_labels += not image.classes
        report.scaled += image.clip_size.scale < 1
        self._progress.advance()

    def _give_up_workers(self) -> None:
        if self._pool is not None:
            logger.warning("a CRF worker process died (out of memory?); going on without worker processes")
            self._pool = None

    def _warn_of_rotation(self, file: Path) -> None:
        if not self._warned_of_rotation and has_rotation(file):
            self._warned_of_rotation = True
            logger.warning(
                "%s has an EXIF rotation tag, maybe others too: it is ignored, masks fit the stored pixels",
                file,
            )


def _runs_on_cpu(plan: MaskPlan) -> bool:
    """Whether the CRF is work for other cores; on a GPU the lattice stays in the process that holds it."""
    backend = plan.config.crf.backend
    return backend == "pydensecrf" or (backend == "lattice" and plan.device == "cpu")


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(part in text for part in OUT_OF_MEMORY_TEXTS)
