"""Choosing a prompt template by its sharpness on labelled images.

Source: CLIP-ES (arXiv 2212.09506), section 3.3 and Eq. 9: of the templates, the one under which the classes
of an image score most evenly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from wsss_pipeline.cam.prompts import class_embeddings, sharpness
from wsss_pipeline.clip.image_encoder import ImageEncoder
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text_encoder import TextEncoder
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.data.classes import ClassSet, check_template
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import clip_input_size, resize_for_clip, to_clip_tensor
from wsss_pipeline.errors import ConfigError, ImageError
from wsss_pipeline.runtime.device import resolve_device, resolve_precision
from wsss_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRanking:
    """Templates with their sharpness, the best (smallest) first, and on how many images it was measured."""

    ranked: list[tuple[str, float]]
    images: int
    failed: dict[str, str] = field(default_factory=dict)


def select_prompt(
    images: Mapping[str, ImageFile],
    labels: Mapping[str, tuple[str, ...]],
    class_set: ClassSet,
    templates: Sequence[str],
    config: MaskConfig,
    *,
    limit: int | None = None,
    device: str = "auto",
    offline: bool = False,
) -> PromptRanking:
    """Rank templates by sharpness.

    The scores are those of softmax-GradCAM: one softmax over the classes of the image and the background
    words, of the mean patch embedding. Each image goes through CLIP once, whatever the number of templates.
    Only images with two classes or more say anything (Eq. 9 has the variance over an image's classes).

    Args:
        images: image id to file.
        labels: image id to class names.
        class_set: classes and background words.
        templates: to choose from, each with one ``{}``.
        config: CLIP, precision, largest picture.
        limit: use at most so many images.
        device: ``auto``, ``cpu``, ``cuda``.
        offline: fetch nothing.

    Raises:
        ClassSetError: a template without exactly one ``{}``.
        ConfigError: no image with two classes that can be used, or a prompt longer than CLIP reads.
        WeightsError: CLIP can't be found or read.
    """
    for template in templates:
        check_template(template, "--template")
    usable = [image_id for image_id, names in labels.items() if len(names) > 1 and image_id in images][:limit]
    if not usable:
        raise ConfigError(
            "no image with two classes or more, and sharpness compares the classes of an image; "
            "label some images with all that is in them"
        )
    place = resolve_device(device)
    clip = load_clip(locate_clip(config.clip, offline=offline), place)
    encoder = ImageEncoder(clip.vision, resolve_precision(config.clip.precision, place))
    embeddings, failed = _image_embeddings(encoder, {i: images[i] for i in usable}, config.max_pixels)
    if not embeddings:
        raise ConfigError(
            f"none of the {len(usable)} images with two classes or more can be used; see the warnings"
        )
    text_encoder = TextEncoder(clip.text, clip.tokenizer)
    ranked: list[tuple[str, float]] = []
    for template in templates:
        rows = class_embeddings(class_set, [template], text_encoder.encode)
        scores = []
        for image_id, embedding in embeddings.items():
            present = [class_set.index(name) - 1 for name in labels[image_id]]
            texts = torch.cat([rows.foreground[present], rows.background])
            scores.append(torch.softmax(clip.logit_scale * texts @ embedding, dim=0)[: len(present)])
        ranked.append((template, sharpness(scores)))
    ranked.sort(key=lambda item: item[1])
    return PromptRanking(ranked, len(embeddings), failed)


def write_choice(template: str, file: Path) -> None:
    """Write ``template`` as YAML that ``generate-masks --config`` reads.

    Raises:
        ConfigError: the file can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"templates": [template]}, allow_unicode=True), "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error


@torch.no_grad()
def _image_embeddings(
    encoder: ImageEncoder, images: Mapping[str, ImageFile], max_pixels: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Unit embeddings float32 (P,) on the CPU by image id, and the reason for each image that failed."""
    found: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    with Progress(len(images)) as progress:
        for image_id, file in images.items():
            try:
                pixels = read_image(file)
            except ImageError as error:
                failed[image_id] = str(error)
                logger.warning("%s", error)
                progress.advance(failed=1)
                continue
            size = clip_input_size(pixels.shape[1], pixels.shape[0], encoder.patch_size, max_pixels)
            tensor = to_clip_tensor(resize_for_clip(pixels, size.width, size.height))
            pooled = encoder.encode(tensor[None].to(encoder.device)).pooled[0]
            found[image_id] = F.normalize(pooled, dim=0).cpu()
            progress.advance()
    return found, failed
