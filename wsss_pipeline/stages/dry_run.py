"""What ``generate-masks`` would do, without doing it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from wsss_pipeline.cache import FinishedImages, is_mask_set
from wsss_pipeline.data.images import image_size
from wsss_pipeline.errors import ImageError
from wsss_pipeline.stages.mask_plan import MaskPlan, MaskRequest, plan_masks

# Measured on photographs of PASCAL VOC: mask and confidence, compressed, per pixel.
BYTES_PER_PIXEL = 0.25
BYTES_PER_CAM_PIXEL = 1.0


def describe_run(request: MaskRequest) -> list[str]:
    """Lines for a person: choices, counts, images that can't be used, disk to be taken.

    Nothing is written. Every image left to do is opened as far as its header.

    Raises:
        WsssError: as ``plan_masks``.
    """
    plan = plan_masks(request)
    folder = request.cache_dir / plan.mask_set.folder_name
    done = set() if request.overwrite else _in_cache(request, plan)
    todo = [image_id for image_id in plan.image_ids if image_id not in done]
    bad, size = _survey(request, todo)
    free = shutil.disk_usage(
        next(path for path in (folder, *folder.absolute().parents) if path.exists())
    ).free
    lines = plan.lines()
    lines += [
        f"mask set: {folder}" + ("" if folder.exists() else " (new)"),
        f"images: {len(plan.image_ids)} with labels, {len(done)} of them in the cache, {len(todo)} to compute",
        f"without any class, so all background: {sum(not request.labels[i] for i in plan.image_ids)}",
        f"images that the labels don't name, left out: {len(plan.unlabelled)}",
    ]
    lines += _listed("named in the labels, but no file is there", plan.missing)
    lines += _listed("can't be used", bad)
    lines.append(f"disk: about {size / 2**20:.1f} MiB to be taken, {free / 2**20:.0f} MiB free")
    return lines


def _in_cache(request: MaskRequest, plan: MaskPlan) -> set[str]:
    folder = request.cache_dir / plan.mask_set.folder_name
    if not is_mask_set(folder):
        return set()
    finished = FinishedImages(folder, request.shard.index, request.shard.count)
    return {
        image_id
        for image_id in plan.image_ids
        if finished.is_current(
            image_id, request.images[image_id], request.labels[image_id], need_cams=request.store_cams
        )
    }


def _survey(request: MaskRequest, todo: Iterable[str]) -> tuple[list[str], float]:
    """One line for each image whose header can't be read, and the bytes that the others will take."""
    bad: list[str] = []
    size = 0.0
    for image_id in todo:
        try:
            width, height = image_size(request.images[image_id])
        except ImageError as error:
            bad.append(str(error))
            continue
        maps = len(request.labels[image_id]) if request.store_cams else 0
        size += width * height * (BYTES_PER_PIXEL + maps * BYTES_PER_CAM_PIXEL)
    return bad, size


def _listed(what: str, items: list[str], shown: int = 20) -> list[str]:
    lines = [f"{what}: {len(items)}", *(f"  {item}" for item in items[:shown])]
    return [*lines, f"  and {len(items) - shown} more"] if len(items) > shown else lines
