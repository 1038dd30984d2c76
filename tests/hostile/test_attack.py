"""A small round of ``make attack``, which takes a quarter of an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_hangs_crashes_or_passes_for_sound() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attack", "--share", "0.004", "--seed", "1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) > 70
    assert all(row[-1] == "0" for row in rows)
