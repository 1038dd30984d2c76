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
    ("targets", "runs"),
    [
        ("labels,archives,manifest", 4000),
        ("known,settings", 1000),
        pytest.param("prompts", 4000, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_found_in_a_few_thousand_runs(targets: str, runs: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.readers", targets, f"-runs={runs}", "-seed=1"),
            # a new process inherits the largest size that its parent ever had; what is asked for at once counts
            *("-rss_limit_mb=0", "-malloc_limit_mb=1024"),
        ],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count(f"Done {runs} runs") == 1 + targets.count(",")
