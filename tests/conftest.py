"""What all tests share."""

from __future__ import annotations

import os

import pytest

# before any test module imports a library that reads them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture
def no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, whatever this machine has in its own."""
    from huggingface_hub import _snapshot_download

    monkeypatch.setattr(_snapshot_download.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
