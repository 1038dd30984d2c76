"""A mask set to write into."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_samples import MASK_SET

from wsss_pipeline.cache import open_mask_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return open_mask_set(tmp_path / "cache", MASK_SET)
