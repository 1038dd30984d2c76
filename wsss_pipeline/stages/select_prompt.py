"""Choosing a prompt template by its sharpness on labelled images.

Source: CLIP-ES (arXiv 2212.09506), section 3.3 and Eq. 9: of the templates, the one under which the classes
of an image score most evenly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.classes import check_template
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import prepare_image
from wsss_pipeline.errors import ConfigError, ImageError
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.runtime.device import resolve_device, resolve_precision
from wsss_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRanking:
    """Templates with their sharpness, the best (smallest) first.

    Attributes:
        ranked: template and sharpness.
        images: number of images on which it was measured.
        failed: image id to reason.
    """

    ranked: list[tuple[str, float]]
    images: int
    failed: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def select_prompt(job: MaskJob, templates: Sequence[str]) -> PromptRanking:
    """Rank templates by sharpness.

    The scores are those of softmax-GradCAM: one softmax over the classes of the image and the background
    words, of the mean patch embedding. Each image goes through CLIP once, whatever the number of templates.
    Only images with two classes or more say anything (Eq. 9 has the variance over an image's classes).

    Args:
        job: images, labels, classes, CLIP and its precision, largest image, how many images at most, device.
        templates: candidates, each with one ``{}``.

    Raises:
        ClassSetError: a template without exactly one ``{}``.
        ConfigError: no image with two classes that can be used, or a prompt longer than CLIP reads.
        WeightsError: CLIP can't be found or read.
    """
    for template in templates:
        check_template(template, "--template")
    several = [name for name, labels in job.labels.items() if len(labels) > 1 and name in job.images]
    usable = several[: job.limit]
    if not usable:
        raise ConfigError(
            "no image with two classes or more, and sharpness compares the classes of an image; "
            "label some images with all that is in them"
        )
    device, class_set = resolve_device(job.device), job.class_set
    clip = load_clip(locate_clip(job.config.clip, offline=job.offline), device)
    trunk = Trunk(clip.vision, resolve_precision(job.config.clip.precision, device))
    embeddings: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    with Progress(len(usable)) as progress:
        for image_id in usable:
            try:
                image = read_image(job.images[image_id], job.config.images.pixel_range)
            except (ImageError, MemoryError) as error:
                failed[image_id] = str(error) or "ran out of memory; make it smaller, or free some"
                logger.warning("%s: %s", image_id, failed[image_id])
                progress.advance(failed=1)
                continue
            pixels = prepare_image(image, trunk.patch_size, job.config.max_pixels, clip.statistics).pixels
            (last,) = trunk.encode(pixels[None].to(trunk.device)).last
            embeddings[image_id] = F.normalize(last.pooled, dim=0).cpu()
            progress.advance()
    if not embeddings:
        raise ConfigError(
            f"none of the {len(usable)} images with two classes or more can be used; see the warnings"
        )
    encode = TextEncoder(clip.text, clip.tokenizer).encode
    ranked: list[tuple[str, float]] = []
    for template in templates:
        rows = class_embeddings(class_set, [template], encode)
        scores = []
        for image_id, embedding in embeddings.items():
            present = [class_set.index(name) - 1 for name in job.labels[image_id]]
            texts = torch.cat([rows.foreground[present], rows.background])
            scores.append(torch.softmax(clip.logit_scale * texts @ embedding, dim=0)[: len(present)])
        ranked.append((template, sharpness(scores)))
    return PromptRanking(sorted(ranked, key=lambda item: item[1]), len(embeddings), failed)


def sharpness(scores: Iterable[Tensor]) -> float:
    """Sharpness of a prompt: the smaller, the more evenly it finds all classes of an image (Eq. 9).

    Args:
        scores: per image, float (k,) softmax scores of its k present classes.

    Returns:
        The sum over images of variance (not standard deviation; over the k classes, population) divided
        by mean. An image with one class adds nothing.
    """
    tiny = torch.finfo(torch.float64).tiny
    several = [image.double() for image in scores if len(image) > 1]
    return sum(float(values.var(correction=0) / values.mean().clamp_min(tiny)) for values in several)
