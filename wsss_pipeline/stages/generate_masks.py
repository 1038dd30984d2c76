"""Stage one: photographs with image-level labels -> pseudo masks in the cache.

Nothing that the cache already holds is computed again, and CLIP is loaded only where something is left
to compute. One bad image is reported, skipped and counted; it never ends the run.
"""

from __future__ import annotations

import logging
import time

from wsss_pipeline.cache import KnownImages, MaskWriter, open_mask_set
from wsss_pipeline.data.image_files import file_status
from wsss_pipeline.data.images import file_digest
from wsss_pipeline.errors import ImageError
from wsss_pipeline.stages.class_activation import load_class_activation
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest, plan_masks
from wsss_pipeline.stages.mask_report import MaskReport
from wsss_pipeline.stages.mask_run import MaskRun
from wsss_pipeline.stages.ray_engine import compute_with_ray

logger = logging.getLogger(__name__)


def generate_masks(request: MaskRequest) -> MaskReport:
    """Make the pseudo masks that the cache doesn't hold yet.

    Raises:
        WsssError: nothing can be computed at all (classes, weights, cache folder); never for one image.
    """
    started = time.monotonic()
    plan = plan_masks(request)
    for line in plan.lines():
        logger.info("%s", line)
    folder = open_mask_set(request.cache_dir, plan.mask_set)
    report = MaskReport(
        folder, images=len(plan.image_ids) + len(plan.missing), unlabelled=len(plan.unlabelled)
    )
    with MaskWriter(folder, request.shard.index, request.shard.count) as writer:
        for image_id in plan.missing:
            report.fail(image_id, "the labels name it, but there is no such image")
        known = KnownImages(folder, request.shard.index, request.shard.count)
        todo = _left_to_do(request, plan, writer, known)
        report.reused = len(plan.image_ids) - len(todo)
        if todo:
            logger.info("%d images: %d in the cache, %d to compute", report.images, report.reused, len(todo))
            if request.engine == "ray":
                compute_with_ray(request, plan, writer, report, known, todo)
            else:
                activation = load_class_activation(plan)
                MaskRun(request, plan, activation, writer, report, known).compute(todo)
        writer.finish([*plan.image_ids, *plan.missing])
        known.save(writer.places)
    report.seconds = time.monotonic() - started
    return report


def _left_to_do(request: MaskRequest, plan: MaskPlan, writer: MaskWriter, known: KnownImages) -> list[str]:
    """Ids whose masks aren't in the cache, or belong to other bytes or labels."""
    if request.overwrite:
        return plan.image_ids

    def is_done(image_id: str) -> bool:
        file, labels = request.images[image_id], request.labels[image_id]
        if not request.check_bytes and known.is_done(image_id, file, labels, request.store_cams):
            return True
        record = writer.record(image_id)
        if record is None or record.labels != labels:
            return False
        if request.store_cams and not record.has_cams:
            return False
        try:
            status = file_status(file)
            if record.image_digest != file_digest(file):
                return False
        except (OSError, ImageError):
            return False  # reported when it is loaded
        known.note(image_id, status, labels, record.has_cams)
        return True

    return [image_id for image_id in plan.image_ids if not is_done(image_id)]
