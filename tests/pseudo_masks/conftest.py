"""The small world that the tests of the commands use, with the published text rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.end_to_end.conftest import GOLDEN, clip, generate, world  # noqa: F401  # fixtures
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.data.classes import ClassSet, load_class_set


@pytest.fixture
def published_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden text rows stand in for a text tower: those of the random one give maps of zeros."""
    with np.load(GOLDEN / "expected" / "text.npz") as text:
        foreground, background = torch.from_numpy(text["fg"]), torch.from_numpy(text["bg"])
    voc = load_class_set("voc12")

    def rows(
        classes: ClassSet, templates: Sequence[str], encode: Callable[[Sequence[str]], torch.Tensor]
    ) -> ClassEmbeddings:
        return ClassEmbeddings(foreground[[voc.index(name) - 1 for name in classes.names]], background)

    monkeypatch.setattr("wsss_pipeline.clip.learned_prompts.class_embeddings", rows)
