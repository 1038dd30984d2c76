"""Stage one on a Ray cluster: chunks of images through actors that keep CLIP loaded.

Ray starts actors, starts them again where one dies, and repeats what the dead one had; this module only cuts the
work into chunks and counts. An actor writes each chunk as a finished shard before it reports it, so the cache is
all there is to resume from. Images, weights and cache lie on disks that all machines see under the same paths.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsss_pipeline.cache import MaskWriter
from wsss_pipeline.cache.shards import ShardName, next_sequence
from wsss_pipeline.data.image_files import Status, absolute
from wsss_pipeline.errors import EngineError, MissingDependencyError
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.stages.class_activation import ClassActivation, load_class_activation
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest
from wsss_pipeline.stages.mask_report import MaskReport
from wsss_pipeline.stages.mask_run import MaskRun

logger = logging.getLogger(__name__)

MOST_IMAGES = 256  # a chunk; its shard is in memory until it is written
CHUNKS_AN_ACTOR = 8  # at least, where there are images enough: an actor that dies loses one


@dataclass(frozen=True)
class Chunk:
    """Images that one actor labels and writes as one shard of ``folder``.

    ``request`` has the images; ``plan`` none. Every chunk brings them, since what an actor is made with could be
    lost with the machine that keeps it.
    """

    name: ShardName
    folder: Path
    request: MaskRequest
    plan: MaskPlan


@dataclass
class ChunkDone:
    """What became of a chunk; ``notes`` are arguments of ``KnownImages.note``."""

    name: ShardName
    stamp: tuple[int, int] | None
    report: MaskReport
    notes: list[tuple[str, Status, tuple[str, ...], bool]] = field(default_factory=list)

    def note(self, image_id: str, status: Status, labels: tuple[str, ...], has_cams: bool) -> None:
        """Remember an image for the driver's ``KnownImages``."""
        self.notes.append((image_id, status, labels, has_cams))


class MaskActor:
    """Loads CLIP with its first chunk and keeps it; Ray makes as many actors as there is room for."""

    def __init__(self) -> None:
        self._activation: ClassActivation | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[ChunkDone]]:
        """One batch of Ray's: chunks in, what became of them out."""
        return {"done": [self._label(chunk) for chunk in batch["chunk"]]}

    def _label(self, chunk: Chunk) -> ChunkDone:
        if self._activation is None:
            self._activation = load_class_activation(chunk.plan)
        images = chunk.request.images
        done = ChunkDone(chunk.name, None, MaskReport(chunk.folder, len(images), unlabelled=0))
        with ShardWriter(chunk.folder, chunk.name) as writer:
            run = MaskRun(
                chunk.request, chunk.plan, self._activation, writer, done.report, done, io.StringIO()
            )
            run.compute(list(images))
            if done.report.interrupted:
                raise InterruptedError("asked to stop in the midst of a chunk")
            done.stamp = writer.finish()
        return done


def compute_with_ray(
    request: MaskRequest,
    plan: MaskPlan,
    writer: MaskWriter,
    report: MaskReport,
    known: Any,
    todo: Sequence[str],
) -> None:
    """Label ``todo`` on the cluster of RAY_ADDRESS, the one this machine belongs to, or a local one.

    Raises:
        MissingDependencyError: Ray isn't installed.
        EngineError: Ray gave up.
    """
    ray = _import_ray()
    # Ray tells of dead workers on stdout, which is for results
    with redirect_stdout(sys.stderr):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
            actors = request.workers or _room(dict(ray.cluster_resources()), plan.device)
            logger.info("Ray: up to %d actors with CLIP", actors)
            chunks = _chunks(request, plan, todo, actors, report.path)
            with (
                StopRequest() as stop,
                Progress(len(todo)) as progress,
                closing(_run(chunks, plan.device, actors)) as results,  # before Ray is shut down
            ):
                for done in results:
                    _count(done, writer, report, known, progress)
                    if stop.requested:
                        break
                report.interrupted = stop.requested and progress.left > 0
        except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise EngineError(
                f"Ray gave up: {reason.strip()}; mend that and run the same command again, what was finished "
                "is kept"
            ) from error
        finally:
            ray.shutdown()


def _import_ray() -> Any:
    """Ray, which says no more than its errors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            "--engine ray: Ray isn't installed; pip install 'wsss-pipeline[ray]'"
        ) from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


def _room(resources: dict[str, float], device: str) -> int:
    """How many actors the cluster has room for at the moment."""
    return max(1, int(resources.get("CPU" if device == "cpu" else "GPU", 1)))


def _chunks(
    request: MaskRequest, plan: MaskPlan, todo: Sequence[str], actors: int, folder: Path
) -> list[Chunk]:
    length = max(1, min(MOST_IMAGES, len(todo) // (actors * CHUNKS_AN_ACTOR)))
    parts = [todo[start : start + length] for start in range(0, len(todo), length)]
    sequence = next_sequence(folder)
    workers = 0 if plan.device == "cpu" else request.workers
    lean_plan = replace(plan, clip=plan.clip.absolute(), image_ids=[], missing=[], unlabelled=[])
    return [
        Chunk(
            ShardName(sequence, number, len(parts)),
            folder.absolute(),  # actors have current folders of their own
            replace(
                request,
                images={image_id: absolute(request.images[image_id]) for image_id in part},
                labels={image_id: request.labels[image_id] for image_id in part},
                workers=workers,
            ),
            lean_plan,
        )
        for number, part in enumerate(parts)
    ]


def _run(chunks: Sequence[Chunk], device: str, actors: int) -> Generator[ChunkDone, None, None]:
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    items = [{"chunk": chunk} for chunk in chunks]
    dataset = from_items(items, override_num_blocks=len(items)).map_batches(
        MaskActor,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
        num_gpus=0 if device == "cpu" else 1,
    )
    for row in dataset.iter_rows():
        yield row["done"]


def _count(
    done: ChunkDone, writer: MaskWriter, report: MaskReport, known: Any, progress: Progress
) -> None:
    part = done.report
    if done.stamp is not None:
        writer.adopt(done.name, done.stamp)
    for note in done.notes:
        known.note(*note)
    for image_id, reason in part.failed.items():
        report.fail(image_id, reason)
        progress.advance(failed=1)
    for _ in range(part.computed):
        progress.advance()
    report.computed += part.computed
    report.without_labels += part.without_labels
    report.scaled += part.scaled
