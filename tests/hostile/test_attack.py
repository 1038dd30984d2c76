"""A small round of ``make attack``, which takes a quarter of an hour."""

from __future__ import annotations

from tests.forks import ForkServer


def test_nothing_hangs_crashes_or_passes_for_sound(forks: ForkServer) -> None:
    arguments = ("--share", "0.004", "--seed", "1")
    code, stdout, stderr = forks.run(*arguments, module="tests.hostile.attack", timeout=300)
    assert code == 0, stdout + stderr
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) > 70
    assert all(row[-1] == "0" for row in rows)
