"""A frozen DINOv2 (Oquab et al., arXiv 2304.07193) from the hub or a folder, through transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wsss_pipeline.errors import NetworkError


@dataclass(frozen=True)
class Dino:
    """A loaded DINOv2, frozen, in float32.

    Attributes:
        model: ``transformers`` model of it.
        digest: SHA-256 (hexadecimal) of weights and architecture.
    """

    model: Any
    digest: str


def load_dino(weights: str, offline: bool) -> Dino:
    raise NetworkError("not yet")
