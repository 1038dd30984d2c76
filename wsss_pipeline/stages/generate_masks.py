"""Stage one: images with image-level labels -> pseudo masks in the cache.

Nothing that the cache already holds is computed again, and CLIP is loaded only where something is left
to compute. One bad image is reported, skipped and counted; it never ends the run.
"""

from __future__ import annotations

from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.pseudo_masks.run import run_share


def generate_masks(job: MaskJob) -> MaskReport:
    """Make the pseudo masks that the cache doesn't hold yet, here or on a Ray cluster.

    Raises:
        WsssError: nothing can be computed at all (classes, weights, cache folder); never for one image.
    """
    if job.engine == "ray":
        from wsss_pipeline.pseudo_masks.ray_tasks import run_on_ray

        return run_on_ray(job)
    return run_share(job)
