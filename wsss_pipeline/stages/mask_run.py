"""The loop of stage one: load, activate, label, write; in order, and whatever happens to one image."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from wsss_pipeline.runtime.device import single_threaded_torch
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.stages.class_activation import ClassActivation
from wsss_pipeline.stages.label_pixels import LabelledPixels, label_pixels, start_workers
from wsss_pipeline.stages.loaded_image import LoadedImage, load_image, same_size_batches, windows
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest
from wsss_pipeline.stages.mask_report import MaskReport

logger = logging.getLogger(__name__)

LOOK_AHEAD = 4  # batches that are looked through for images of one size

# torch has no exception class of its own for memory that ran out on the CPU
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Labelled:
    """What becomes of an image, the seconds spent on it, and those of CLIP and the CRF not counted elsewhere."""

    mask: PseudoMask
    seconds: float
    clip_seconds: float = 0.0
    crf_seconds: float = 0.0


@dataclass(frozen=True)
class Pending:
    """An image on its way; ``finish`` waits for it."""

    image: LoadedImage
    finish: Callable[[], Labelled]


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
        crf, on_cpu = plan.config.crf.backend, plan.device == "cpu"
        # on a CPU each picture stays in one thread from CLIP to CRF; pydensecrf would block all others
        self._threads = on_cpu and crf != "pydensecrf"
        self._workers = request.workers if on_cpu or crf == "pydensecrf" else 0
        self._pool: Executor | None = None
        self._pending: deque[Pending] = deque()
        self._warned_of_rotation = False
        report.workers = self._workers
        report.shared = ("CLIP", "CRF") if self._threads else ("CRF",)
        report.busy = dict.fromkeys(("reading", "CLIP", "CRF", "writing"), 0.0)

    def compute(self, todo: list[str]) -> None:
        """Compute and write the masks of ``todo``, in order, until done or asked to stop."""
        started = time.monotonic()
        try:
            with (
                StopRequest() as stop,
                Progress(len(todo)) as self._progress,
                single_threaded_torch() if self._threads else nullcontext(),
            ):
                self._pool = self._start_pool()
                images = self._load(todo, stop)
                for window in windows(images, self._window_length()):
                    self._activate(window)
                    self._collect(at_most_left=2 * self._workers)
                self._collect(at_most_left=0)
                self._report.interrupted = stop.requested and self._progress.left > 0
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._report.computing += time.monotonic() - started

    def _start_pool(self) -> Executor | None:
        if not self._workers:
            return None
        return ThreadPoolExecutor(self._workers) if self._threads else start_workers(self._workers)

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

    def _window_length(self) -> int:
        batch_size = self._request.batch_size
        return 1 if self._threads or batch_size == 1 else LOOK_AHEAD * batch_size

    def _activate(self, window: list[LoadedImage]) -> None:
        """CAMs of some images, handed on to the CRF in order; an image without classes needs none."""
        cams: dict[str, Tensor] = {}
        if not self._threads:
            for batch in same_size_batches(window, self._request.batch_size):
                cams.update(self._cams(batch))
        for image in window:
            if not image.classes:
                self._pending.append(Pending(image, partial(self._background, image)))
            elif self._threads:
                self._submit_whole(image)
            elif image.image_id in cams:
                with self._one_image(image.image_id):
                    self._submit(image, cams[image.image_id])

    def _cams(self, batch: list[LoadedImage]) -> dict[str, Tensor]:
        """CAMs by image id; without those that failed."""
        try:
            with self._busy("CLIP"):
                found = self._activation.cams(
                    [image.clip_pixels() for image in batch], [image.classes for image in batch]
                )
        except (ImageError, MemoryError, RuntimeError) as error:
            if len(batch) == 1:
                with self._one_image(batch[0].image_id):
                    raise error
                return {}
            # one of them may be at fault, or together they are too many
            return {key: cams for image in batch for key, cams in self._cams([image]).items()}
        return {image.image_id: cams for image, cams in zip(batch, found, strict=True)}

    def _background(self, image: LoadedImage) -> Labelled:
        mask, confidence = np.zeros(image.size, np.uint8), np.full(image.size, CERTAIN, np.uint8)
        cams = np.zeros((0, *image.size), np.float16) if self._request.store_cams else None
        seconds = time.monotonic() - image.started
        return Labelled(PseudoMask(mask, confidence, image.labels, cams), seconds)

    def _submit_whole(self, image: LoadedImage) -> None:
        """CLIP and CRF of one image in a thread of its own, or here and now where there is none."""
        if self._pool is not None:
            self._pending.append(Pending(image, self._pool.submit(self._whole, image).result))
            return
        with self._one_image(image.image_id):
            labelled = self._whole(image)
            self._pending.append(Pending(image, lambda: labelled))

    def _whole(self, image: LoadedImage) -> Labelled:
        started = time.monotonic()
        (cams,) = self._activation.cams([image.clip_pixels()], [image.classes])
        arguments, stored = self._crf_arguments(image, cams)
        clip_seconds = time.monotonic() - started
        mask, confidence, crf_seconds = label_pixels(*arguments)
        found = PseudoMask(mask, confidence, image.labels, stored)
        return Labelled(found, clip_seconds + crf_seconds, clip_seconds, crf_seconds)

    def _submit(self, image: LoadedImage, cams: Tensor) -> None:
        arguments, stored = self._crf_arguments(image, cams)
        seconds = time.monotonic() - image.started
        result = self._start(arguments)

        def finish() -> Labelled:
            mask, confidence, crf_seconds = self._result(result, arguments)
            found = PseudoMask(mask, confidence, image.labels, stored)
            return Labelled(found, seconds + crf_seconds, crf_seconds=crf_seconds)

        self._pending.append(Pending(image, finish))

    def _crf_arguments(
        self, image: LoadedImage, cams: Tensor
    ) -> tuple[tuple[Any, ...], NDArray[np.float16] | None]:
        """Arguments of ``label_pixels``, and the CAMs that are to be stored."""
        # half precision is what the cache stores and what the published CRF reads
        scores = assemble(upscale_cams(cams, image.working_size).half()).cpu().numpy()
        stored = None
        if self._request.store_cams:
            stored = upscale_cams(cams, image.size).half().cpu().numpy()
        crf, device = self._plan.config.crf, self._plan.device
        return (image.working_pixels(), scores, image.classes, image.size, crf, device), stored

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
                self._write(pending.image, pending.finish())

    def _result(self, result: Future[LabelledPixels], arguments: tuple[Any, ...]) -> LabelledPixels:
        try:
            return result.result()
        except BrokenProcessPool:
            self._give_up_workers()
            return label_pixels(*arguments)

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
            )
        self._known.note(image.image_id, image.status, image.labels, labelled.mask.cams is not None)
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(part in text for part in OUT_OF_MEMORY_TEXTS)
