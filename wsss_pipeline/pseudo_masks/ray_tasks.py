"""Stage one on a Ray cluster: a task is a share of the work, run as on any machine.

Ray starts tasks, starts them again where a machine dies, and keeps a worker process, with CLIP loaded, for the next
task. Each task writes its share under its own lock, so the cache is all there is to resume from, for Ray as for the
next run. Images, weights and cache lie on disks that all machines see under the same paths.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from wsss_pipeline.cache import open_mask_set
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.image_files import absolute
from wsss_pipeline.errors import EngineError, MissingDependencyError, WsssError
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.pseudo_masks.job import MaskJob, plan_masks
from wsss_pipeline.pseudo_masks.report import MISSING, MaskReport
from wsss_pipeline.pseudo_masks.run import run_share
from wsss_pipeline.runtime.interrupts import StopRequest
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.runtime.share import Share

logger = logging.getLogger(__name__)

LEAST_IMAGES = 64  # a task, where there are images enough: opening a mask set lists its shards
TASKS_EACH = 8  # for each that runs at a time, so that none waits long for the last one
RETRIES = 5  # of a task whose worker died
READERS = 2  # threads that read ahead for a GPU


def run_on_ray(job: MaskJob) -> MaskReport:
    """Make a job's pseudo masks on the cluster of RAY_ADDRESS, the one this machine belongs to, or a local one.

    Raises:
        MissingDependencyError: Ray isn't installed.
        EngineError: Ray gave up.
        WsssError: as ``run_share``.
    """
    started = time.monotonic()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--engine ray: Ray isn't installed; pip install 'wsss-pipeline[ray]'"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    plan = plan_masks(job)
    for line in plan.maker.lines():
        logger.info("%s", line)
    folder = open_mask_set(job.cache_dir, plan.maker.mask_set)
    count = len(plan.image_ids) + len(plan.missing)
    report = MaskReport(folder, count, plan.unlabelled)
    on_cpu = plan.maker.device.type == "cpu"
    # tasks have current folders of their own, and no part in the images that aren't this job's
    ids = [*plan.image_ids, *plan.missing]
    base = replace(
        job,
        images={i: absolute(job.images[i]) for i in ids if i in job.images},
        labels={i: job.labels[i] for i in ids},
        cache_dir=job.cache_dir.absolute(),
        config=_absolute(job.config),
        workers=0 if on_cpu else READERS,
        limit=None,
        engine="local",
    )
    # Ray tells of dead workers on stdout, which is for results
    with redirect_stdout(sys.stderr):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
            room = int(ray.cluster_resources().get("CPU" if on_cpu else "GPU", 1))  # type: ignore[no-untyped-call]
            at_a_time = job.workers or max(1, room)
            parts = max(1, min(count, at_a_time * TASKS_EACH, max(at_a_time, count // LEAST_IMAGES)))
            logger.info("Ray: %d tasks, up to %d at a time", parts, at_a_time)
            shared = ray.put(base)
            task: Any = ray.remote(_run_task).options(
                num_cpus=1, num_gpus=0 if on_cpu else 1, max_retries=RETRIES
            )
            outer = job.share
            # share J of M within share I of N is share I + N * J of N * M
            waiting = [Share(outer.index + outer.count * part, outer.count * parts) for part in range(parts)]
            running: list[Any] = []
            with StopRequest() as stop, Progress(count) as progress:
                while waiting or running:
                    while waiting and len(running) < at_a_time and not stop.requested:
                        running.append(task.remote(shared, waiting.pop(0)))
                    ready, running = ray.wait(running, timeout=1)
                    for done in map(ray.get, ready):
                        _add(report, done)
                        progress.advance(done.images, failed=len(done.failed))
                    if stop.requested:
                        for reference in running:
                            ray.cancel(reference)  # it finishes its image, and the cache keeps what it made
                        break
                report.interrupted = stop.requested and progress.left > 0
        except WsssError:
            raise
        except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, WsssError):
                raise cause from error
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise EngineError(
                f"Ray gave up: {reason.strip()}; mend that and run the same command again, what was finished "
                "is kept"
            ) from error
        finally:
            ray.shutdown()
    report.seconds = time.monotonic() - started
    return report


def _run_task(job: MaskJob, share: Share) -> MaskReport:
    generator = _generator(job.class_set, job.config, job.device, job.offline)
    return run_share(replace(job, share=share), generator, quiet=True)


@lru_cache(maxsize=1)
def _generator(class_set: ClassSet, config: MaskConfig, device: str, offline: bool) -> MaskGenerator:
    """Kept by the worker process, with CLIP loaded, for its next task."""
    return MaskGenerator(class_set, config=config, device=device, offline=offline)


def _absolute(config: MaskConfig) -> MaskConfig:
    """The configuration with CLIP's folder or file under a path that holds in any current folder."""
    paths = {}
    for name in ("weights", "tokenizer"):
        value = getattr(config.clip, name)
        if value is not None and Path(value).expanduser().exists():
            paths[name] = str(Path(value).expanduser().absolute())
    return config.model_copy(update={"clip": config.clip.model_copy(update=paths)})


def _add(report: MaskReport, part: MaskReport) -> None:
    """Count what a task did."""
    report.computed += part.computed
    report.reused += part.reused
    report.without_labels += part.without_labels
    report.scaled += part.scaled
    report.miss(image_id for image_id, reason in part.failed.items() if reason == MISSING)
    for image_id, reason in part.failed.items():
        if reason != MISSING:
            report.fail(image_id, reason)
