"""Dense CRF, arg max and confidence of pictures whose CAMs lie on a GPU: together, and without leaving it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.masks import CERTAIN
from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine import crf_image
from wsss_pipeline.refine.lattice_backend import infer_batch
from wsss_pipeline.runtime.stopwatch import Stopwatch
from wsss_pipeline.stages.label_pixels import LabelledPixels
from wsss_pipeline.stages.loaded_image import LoadedImage

LEAST_SCORE = 1e-5


@torch.no_grad()
def label_on_device(
    images: Sequence[LoadedImage], cams: Sequence[Tensor], crf: CrfConfig, device: str
) -> list[Callable[[], LabelledPixels]]:
    """Start labelling a batch; what comes back waits for a picture's mask, as ``label_pixels`` gives it.

    Args:
        images: each with at least one class.
        cams: per image float32 (K, h, w) on the device.
        crf: with backend ``lattice`` or ``none``.
        device: of the CAMs.
    """
    with Stopwatch(device) as watch:
        scores = [
            assemble(upscale_cams(maps, image.working_size).half())
            for image, maps in zip(images, cams, strict=True)
        ]
        if crf.backend == "none":
            posteriors = [score.float() / score.float().sum(dim=0) for score in scores]
        else:
            pixels = [crf_image(image.working_pixels(), crf.image) for image in images]
            posteriors = infer_batch(
                [torch.from_numpy(picture).to(device, non_blocking=True) for picture in pixels],
                [-score.clamp(LEAST_SCORE, 1).log().float() for score in scores],
                crf,
            )
        # a copy starts when the stream gets there; the watch's end says when it has arrived
        labels = [_to_host(image, posterior) for image, posterior in zip(images, posteriors, strict=True)]
    share = 1 / len(images)
    return [partial(_wait, watch, share, *found) for found in labels]


def _to_host(image: LoadedImage, posterior: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and confidence uint8 (H, W) at the picture's own size, on their way to the host."""
    if posterior.shape[1:] != image.size:
        posterior = F.interpolate(posterior[None], image.size, mode="bilinear", align_corners=False)[0]
    sure, label = posterior.max(dim=0)
    values = torch.tensor([0, *image.classes], dtype=torch.uint8).to(posterior.device, non_blocking=True)
    thresholds = torch.arange(CERTAIN + 1, dtype=torch.float64, device=posterior.device) / CERTAIN
    confidence = torch.searchsorted(thresholds.float(), sure.contiguous(), right=True) - 1
    masks = values[label], confidence.clamp_(min=0).to(torch.uint8)
    return masks[0].to("cpu", non_blocking=True), masks[1].to("cpu", non_blocking=True)


def _wait(watch: Stopwatch, share: float, mask: Tensor, confidence: Tensor) -> LabelledPixels:
    seconds = watch.seconds()
    return mask.numpy(), confidence.numpy(), seconds * share
