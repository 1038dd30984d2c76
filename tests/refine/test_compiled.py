"""Compiling where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from wsss_pipeline.refine.dense_crf_cpu import compiled


def double(value: int) -> int:
    return 2 * value


def test_without_a_folder_to_keep_it_the_code_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numba.njit
    asked = []

    def njit(**options: bool) -> object:
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return plain(**options)

    monkeypatch.setattr("wsss_pipeline.refine.dense_crf_cpu.njit", njit)
    assert compiled(double)(21) == 42
    assert asked == [{"cache": True, "nogil": True}, {"nogil": True}]


def test_the_dense_crf_works_with_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code = (
        "import numpy as np, torch; from wsss_pipeline.config import CrfConfig; "
        "from wsss_pipeline.refine import DenseCrf; "
        "print(DenseCrf(CrfConfig())([np.zeros((4, 5, 3), np.uint8)], [torch.ones(2, 4, 5)])[0].sum().item())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(20)
