"""Stage one: images with image-level labels -> pseudo masks in the cache.

Nothing that the cache already holds is computed again, and CLIP is loaded only where something is left
to compute. One bad image is reported, skipped and counted; it never ends the run.
"""

from __future__ import annotations

import shutil

from wsss_pipeline.cache import FinishedImages, is_mask_set
from wsss_pipeline.data.images import image_size
from wsss_pipeline.errors import ImageError
from wsss_pipeline.pseudo_masks.job import MaskJob, plan_masks
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.pseudo_masks.run import run_share

# Measured on photographs of PASCAL VOC: mask and confidence, compressed, per pixel.
BYTES_PER_PIXEL = 0.25
BYTES_PER_CAM_PIXEL = 1.0


def generate_masks(job: MaskJob) -> MaskReport:
    """Make the pseudo masks that the cache doesn't hold yet, here or on a Ray cluster.

    Raises:
        WsssError: nothing can be computed at all (classes, weights, cache folder); never for one image.
    """
    if job.engine == "ray":
        from wsss_pipeline.pseudo_masks.ray_tasks import run_on_ray

        return run_on_ray(job)
    return run_share(job)


def describe_masks(job: MaskJob) -> list[str]:
    """Lines for a person: choices, counts, images that can't be used, disk to be taken.

    Nothing is written. Every image left to do is opened as far as its header.

    Raises:
        WsssError: as ``plan_masks``.
    """
    plan = plan_masks(job)
    folder, todo = plan.folder, plan.image_ids
    if is_mask_set(folder) and not job.overwrite:
        finished = FinishedImages(folder, job.share.index, job.share.count)
        options = {"need_cams": job.store_cams, "check_bytes": job.check_bytes}
        todo = [i for i in todo if not finished.is_current(i, job.images[i], job.labels[i], **options)]
    bad: list[str] = []
    size = 0.0
    for image_id in todo:
        try:
            width, height = image_size(job.images[image_id])
        except ImageError as error:
            bad.append(str(error))
            continue
        maps = len(job.labels[image_id]) if job.store_cams else 0
        size += width * height * (BYTES_PER_PIXEL + maps * BYTES_PER_CAM_PIXEL)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, done = shutil.disk_usage(existing).free, len(plan.image_ids) - len(todo)
    return [
        *plan.generator.lines(),
        f"mask set: {folder}" + ("" if folder.exists() else " (new)"),
        f"images: {len(plan.image_ids)} with labels, {done} of them in the cache, {len(todo)} to compute",
        f"without any class, so all background: {sum(not job.labels[i] for i in plan.image_ids)}",
        f"images that the labels don't name, left out: {plan.unlabelled}",
        *_listed("named in the labels, but no file is there", plan.missing),
        *_listed("can't be used", bad),
        f"disk: about {size / 2**20:.1f} MiB to be taken, {free / 2**20:.0f} MiB free",
    ]


def _listed(what: str, items: list[str], shown: int = 20) -> list[str]:
    lines = [f"{what}: {len(items)}", *(f"  {item}" for item in items[:shown])]
    return [*lines, f"  and {len(items) - shown} more"] if len(items) > shown else lines
