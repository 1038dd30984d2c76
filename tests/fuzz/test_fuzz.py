"""A short round of each fuzzer; ``make fuzz`` takes longer ones."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("atheris") is None, reason="the optional package atheris isn't installed")
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        *(("labels", 4000), ("archives", 4000), ("manifest", 4000), ("known", 1000), ("settings", 1000)),
        pytest.param("prompts", 4000, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_found_in_a_few_thousand_runs(target: str, runs: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.readers", target, f"-runs={runs}", "-seed=1"),
            # a new process inherits the largest size that its parent ever had; what is asked for at once counts
            *("-rss_limit_mb=0", "-malloc_limit_mb=1024"),
        ],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Done {runs} runs" in done.stderr
