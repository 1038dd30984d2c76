"""What CLIP is asked: templates, synonym fusion, and how sharp a prompt is.

Source: CLIP-ES (arXiv 2212.09506), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.classes import ClassSet


@dataclass(frozen=True)
class ClassEmbeddings:
    """float32 unit rows: ``foreground`` (C, P) in class order, ``background`` (G, P) in word order."""

    foreground: Tensor
    background: Tensor


def class_embeddings(
    classes: ClassSet, templates: Sequence[str], encode: Callable[[Sequence[str]], Tensor]
) -> ClassEmbeddings:
    """Text embeddings of all classes and background words.

    A text's row is the mean over the templates, made a unit again; a class with several texts (feature
    fusion) has the mean of their rows, made a unit again.

    Args:
        classes: texts come from ``ClassEntry.texts()``: one with sentence fusion, several with feature fusion.
        templates: at least one, each with one ``{}``.
        encode: N prompts to float32 (N, P) unit rows; called once.
    """
    groups = [entry.texts() for entry in classes.classes] + [(word,) for word in classes.background]
    # replace, not format: other braces in a template are just characters
    prompts = [template.replace("{}", text) for texts in groups for text in texts for template in templates]
    rows = encode(prompts)
    per_text = F.normalize(rows.view(-1, len(templates), rows.shape[-1]).mean(dim=1), dim=1)
    parts = torch.split(per_text, [len(texts) for texts in groups])
    fused = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=1)
    count = len(classes.classes)
    return ClassEmbeddings(fused[:count], fused[count:])


def sharpness(scores: Iterable[Tensor]) -> float:
    """Sharpness of a prompt: the smaller, the more evenly it finds all classes of an image (Eq. 9).

    Args:
        scores: per image, float (k,) softmax scores of its k present classes.

    Returns:
        The sum over images of variance (not standard deviation; over the k classes, population) divided
        by mean. An image with one class adds nothing.
    """
    total = 0.0
    for image in scores:
        values = image.double()
        if len(values) > 1:
            total += float(
                values.var(correction=0) / values.mean().clamp_min(torch.finfo(torch.float64).tiny)
            )
    return total


def built_in_templates() -> tuple[str, ...]:
    """The templates that come with the package to choose from, each with one ``{}``."""
    import yaml

    text = (resources.files("wsss_pipeline.cam") / "templates.yaml").read_text("utf-8")
    return tuple(yaml.safe_load(text))
