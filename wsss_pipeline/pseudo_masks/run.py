"""The loop that fills a cache: read, generate, write; in order, and whatever happens to one image.

On a CPU each image stays in one thread from its bytes to its labels. On a GPU, and for a SAM, files are read ahead in
threads, and batches of one size go through model and refiner together. Only where tensors lie differs, not what is
computed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from typing import Any, TypeVar

from wsss_pipeline.cache import MaskWriter, open_mask_set
from wsss_pipeline.data.image_files import Status, file_status
from wsss_pipeline.data.images import ImageWarnings, Remark, read_stored_image
from wsss_pipeline.errors import ImageError, MaskError, RegionError
from wsss_pipeline.files import check_machine
from wsss_pipeline.pseudo_masks.job import Job, MaskPlan, plan_masks
from wsss_pipeline.pseudo_masks.maker import LabelledImage, MaskMaker
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.runtime.device import is_out_of_memory, single_threaded_torch
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.runtime.progress import Progress

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

LOOK_AHEAD = 4  # batches that are looked through for images of one size


@dataclass(frozen=True)
class ReadImage:
    """An image that was read.

    Attributes:
        image_id: id of the image.
        status: size and times of its file, before it was read.
        digest: see ``image_digest``.
        image: on its way into the model.
        seconds: time for reading and preparing.
        remarks: what is worth a word about it, see ``StoredImage``.
    """

    image_id: str
    status: Status
    digest: str
    image: LabelledImage
    seconds: float
    remarks: dict[Remark, str]


# a PseudoMask, or Regions, with the seconds in the model and in the refiner
Made = tuple[ReadImage, Any, float, float]


def run_share(job: Job, maker: MaskMaker | None = None, *, quiet: bool = False) -> MaskReport:
    """Make the pseudo masks, or the regions, of a job's share that the cache doesn't hold yet.

    Args:
        job: inputs, read.
        maker: one that was made for the same classes and settings before.
        quiet: show no progress, say nothing of the choices: another process does.

    Raises:
        WsssError: nothing can be computed at all (classes, weights, cache folder); never for one image.
    """
    started = time.monotonic()
    plan = plan_masks(job, maker)
    for line in [] if quiet else plan.maker.lines():
        logger.info("%s", line)
    folder = open_mask_set(job.cache_dir, plan.maker.mask_set)
    count = len(plan.image_ids) + len(plan.missing)
    report = MaskReport(
        folder, count, plan.unlabelled, model=plan.maker.model, holds=plan.maker.mask_set.holds
    )
    with MaskWriter(folder, job.share.index, job.share.count) as writer:
        report.miss(plan.missing, job.unread)
        todo = plan.image_ids
        if not job.overwrite:
            options = {"need_cams": job.store_cams, "check_bytes": job.check_bytes}
            todo = writer.unfinished(todo, job.images, job.labels, **options)
        report.reused = len(plan.image_ids) - len(todo)
        if todo:
            if not quiet:
                counts = (report.images, report.reused, len(todo))
                logger.info("%d images: %d in the cache, %d to compute", *counts)
            plan.maker.load()  # which isn't part of computing
            with StopRequest() as stop, Progress(len(todo), is_shown=not quiet) as progress:
                _Run(plan, writer, report, stop, progress).compute(todo)
                report.interrupted = stop.requested and progress.left > 0
        writer.finish([*plan.image_ids, *plan.missing])
    report.seconds = time.monotonic() - started
    return report


class _Run:
    """One run over the images that are left to do."""

    def __init__(
        self, plan: MaskPlan, writer: MaskWriter, report: MaskReport, stop: StopRequest, progress: Progress
    ) -> None:
        self._job, self._maker, self._writer, self._report = plan.job, plan.maker, writer, report
        self._stop, self._progress = stop, progress
        self._outputs = 1 + len(self._maker.mask_set.class_names)

    def compute(self, todo: list[str]) -> None:
        """Compute and write the masks of ``todo``, in order, until done or asked to stop."""
        report, started = self._report, time.monotonic()
        report.workers = self._job.workers
        in_threads = self._maker.in_threads
        report.shared = ("reading", self._maker.model, "refining") if in_threads else ("reading",)
        report.busy = dict.fromkeys(("reading", self._maker.model, "refining", "writing"), 0.0)
        make = self._one_by_one if in_threads else self._in_batches
        # what is under way when a stop is asked for is finished and written
        wanted = takewhile(lambda _: not self._stop.requested, todo)
        with (
            single_threaded_torch() if in_threads else nullcontext(),
            ImageWarnings() as self._warnings,
            closing(make(wanted)) as results,  # type: ignore[type-var]  # a generator
        ):
            for image_id, wait in results:
                with self._one_image(image_id):
                    self._write(*wait())
        report.computing += time.monotonic() - started

    def _one_by_one(self, todo: Iterable[str]) -> Iterator[tuple[str, Callable[[], Made]]]:
        """Each image in a thread of its own, from its bytes to its labels."""

        def make(image_id: str) -> Made:
            read = self._read(image_id)
            if read.image.is_background:
                return read, read.image.background(self._job.store_cams, self._outputs), 0.0, 0.0
            return read, *self._maker.generate([read.image], self._job.store_cams)[0].wait()

        return ahead(make, todo, self._job.workers, 2 * self._job.workers)

    def _in_batches(self, todo: Iterable[str]) -> Iterator[tuple[str, Callable[[], Made]]]:
        """Batches of one size, found among some that are read ahead; one without classes needs no model."""
        size, store_cams = self._job.batch_size, self._job.store_cams
        length = 1 if size == 1 else LOOK_AHEAD * size
        under_way: deque[tuple[str, Callable[[], Made]]] = deque()
        reading = ahead(self._read, todo, self._job.workers, length + size)
        with closing(reading):  # type: ignore[type-var]  # a generator
            while window := list(islice(reading, length)):
                results: dict[str, Callable[[], Made]] = {}
                groups: dict[tuple[int, ...], list[ReadImage]] = {}
                for image_id, wait in window:
                    with self._one_image(image_id):
                        read = wait()
                        if read.image.is_background:
                            mask = read.image.background(store_cams, self._outputs)
                            results[image_id] = partial(_same, (read, mask, 0.0, 0.0))
                        else:
                            groups.setdefault(tuple(read.image.prepared.pixels.shape), []).append(read)
                for group in groups.values():
                    for start in range(0, len(group), size):
                        results |= self._start(group[start : start + size])
                under_way += [(image_id, results[image_id]) for image_id, _ in window if image_id in results]
                while len(under_way) > size:  # what the device is at meanwhile
                    yield under_way.popleft()
            yield from under_way

    def _start(self, batch: list[ReadImage]) -> dict[str, Callable[[], Made]]:
        """Results by image id, without those that failed."""
        try:
            generated = self._maker.generate([read.image for read in batch], self._job.store_cams)
        except (ImageError, MaskError, RegionError, MemoryError, RuntimeError) as error:
            if len(batch) == 1:
                with self._one_image(batch[0].image_id):
                    raise error
                return {}
            # one of them may be at fault, or together they are too many
            return {image_id: wait for read in batch for image_id, wait in self._start([read]).items()}
        return {
            read.image_id: lambda read=read, found=found: (read, *found.wait())  # type: ignore[misc]
            for read, found in zip(batch, generated, strict=True)
        }

    def _read(self, image_id: str) -> ReadImage:
        started, file = time.monotonic(), self._job.images[image_id]
        try:
            status = file_status(file)
        except (OSError, ValueError) as error:
            check_machine(error)
            reason = getattr(error, "strerror", None) or error
            raise ImageError(
                f"{one_line(file, 200)}: can't be read: {reason}; replace or remove it"
            ) from error
        stored = read_stored_image(file, self._maker.pixel_range)
        image = self._maker.prepare(stored.pixels, self._job.labels[image_id], image_id)
        seconds = time.monotonic() - started
        return ReadImage(image_id, status, stored.digest, image, seconds, stored.remarks)

    def _write(self, read: ReadImage, made: Any, looking: float, refining: float) -> None:
        report, started = self._report, time.monotonic()
        self._warnings.warn(self._job.images[read.image_id], read.remarks)
        scale = read.image.prepared.scale
        self._writer.write(
            read.image_id,
            made,
            image_digest=read.digest,
            seconds=read.seconds + looking + refining,
            scale=scale,
            status=read.status,
        )
        seconds = {"reading": read.seconds, self._maker.model: looking, "refining": refining}
        for stage, spent in {**seconds, "writing": time.monotonic() - started}.items():
            report.busy[stage] += spent
        report.computed += 1
        report.without_labels += read.image.is_background
        report.scaled += scale < 1
        self._progress.advance()

    @contextmanager
    def _one_image(self, image_id: str) -> Iterator[None]:
        """What goes wrong inside is this image's failure, not the run's."""
        try:
            yield
            return
        except (ImageError, MaskError, RegionError) as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"ran out of memory; {self._maker.if_too_large}"
        self._report.fail(image_id, reason)
        self._progress.advance(failed=1)


def ahead(
    make: Callable[[str], Result], image_ids: Iterable[str], threads: int, at_most: int
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Each id with what waits for ``make(id)``, in order.

    Args:
        make: work for one id.
        image_ids: ids, in order.
        threads: number of them; with 0, work is done when it is waited for.
        at_most: number of results that may wait.
    """
    if not threads:
        yield from ((image_id, partial(make, image_id)) for image_id in image_ids)
        return
    pool = ThreadPoolExecutor(threads)
    under_way: deque[tuple[str, Callable[[], Result]]] = deque()
    try:
        for image_id in image_ids:
            under_way.append((image_id, pool.submit(make, image_id).result))
            if len(under_way) > at_most:
                yield under_way.popleft()
        while under_way:
            yield under_way.popleft()
    finally:
        # what was handed out may still be waited for
        pool.shutdown(cancel_futures=bool(under_way))


def _same(made: Made) -> Made:
    return made
