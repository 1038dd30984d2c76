"""What all tests share."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator

import pytest

from tests.forks import ForkServer

# before any test module imports a library that reads them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector needn't go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, whatever this machine has in its own."""
    from huggingface_hub import _snapshot_download

    monkeypatch.setattr(_snapshot_download.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.fixture
def without_heic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules that ask for pillow-heif as they are imported, as they are where it isn't installed.

    Functions that others hold look their module's names up in the same dict, so that they see the new values.
    """
    from wsss_pipeline.data import image_ids, images

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    before = [(module, dict(vars(module))) for module in (images, image_ids)]
    try:
        for module, _ in before:
            importlib.reload(module)
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Where processes come from that needn't import everything again."""
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()
