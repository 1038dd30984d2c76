"""How far attribute sentences tell the classes of a set apart, by the CLIP that is to use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsss_pipeline.clip.attributes import attribute_bank, enriched, load_attributes
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.methods.excel import ExcelConfig
from wsss_pipeline.runtime.device import resolve_device


@dataclass(frozen=True)
class ClassCheck:
    """What the sentences do for one class.

    Attributes:
        name: the class.
        sentences: number of its sentences.
        own: share of them that are more like this class's text than like any other's.
        plain: largest cosine of its text with another class's.
        enriched: the same of the enriched texts, less the mean of all, which CAMs take away too.
        nearest: name of the class that the enriched text is most like.
    """

    name: str
    sentences: int
    own: float
    plain: float
    enriched: float
    nearest: str


@torch.no_grad()
def check_attributes(
    config: ExcelConfig, class_set: ClassSet, device: str = "auto", offline: bool = False
) -> list[ClassCheck]:
    """Looks at the sentences of every class, in class order.

    Raises:
        ClassSetError: they can't be read.
        ConfigError: there are none, or one class alone.
        WeightsError: CLIP can't be found or loaded.
    """
    attributes = load_attributes(config.excel.attributes, class_set)
    if not attributes or len(attributes) < 2:
        raise ConfigError(
            f"class set '{class_set.name}' has no attributes, or one class: give --attributes FILE, or more classes"
        )
    clip = load_clip(locate_clip(config.clip, offline=offline), resolve_device(device))
    encode = TextEncoder(clip.text, clip.tokenizer).encode
    templates = config.templates or class_set.templates
    plain = class_embeddings(class_set, templates, encode).foreground
    bank = attribute_bank(attributes, class_set, templates[0], encode, config.excel.clusters)
    rich = enriched(plain, bank)
    before, after = _likeness(plain), _likeness(rich)
    checks = []
    for place, (name, sentences) in enumerate(attributes.items()):
        nearest = (encode([sentence.lower() for sentence in sentences]) @ plain.T).argmax(dim=1)
        checks.append(
            ClassCheck(
                name=name,
                sentences=len(sentences),
                own=float((nearest == place).double().mean()),
                plain=float(before[place].max()),
                enriched=float(after[place].max()),
                nearest=class_set.names[int(after[place].argmax())],
            )
        )
    return checks


def _likeness(rows: Tensor) -> Tensor:
    """Cosines (C, C) of rows less their mean; a row's own is -1, so that it isn't its nearest."""
    centred = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    return (centred @ centred.T).fill_diagonal_(-1)
