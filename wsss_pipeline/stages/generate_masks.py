"""Stage one: photographs with image-level labels -> pseudo masks in the cache.

Nothing that the cache already holds is computed again, and CLIP is loaded only where something is left
to compute. One bad image is reported, skipped and counted; it never ends the run.
"""

from __future__ import annotations

import logging
import time

from wsss_pipeline.cache import MaskWriter, open_mask_set
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
        todo = _left_to_do(request, plan, writer)
        report.reused = len(plan.image_ids) - len(todo)
        if todo:
            logger.info("%d images: %d in the cache, %d to compute", report.images, report.reused, len(todo))
            if request.engine == "ray":
                compute_with_ray(request, plan, writer, report, todo)
            else:
                activation = load_class_activation(plan)
                MaskRun(request, plan, activation, writer, report).compute(todo)
        writer.finish([*plan.image_ids, *plan.missing])
    report.seconds = time.monotonic() - started
    return report


def _left_to_do(request: MaskRequest, plan: MaskPlan, writer: MaskWriter) -> list[str]:
    """Ids whose masks aren't in the cache, or belong to other bytes or labels."""
    return [
        image_id
        for image_id in plan.image_ids
        if request.overwrite
        or not writer.is_current(
            image_id,
            request.images[image_id],
            request.labels[image_id],
            need_cams=request.store_cams,
            check_bytes=request.check_bytes,
        )
    ]
