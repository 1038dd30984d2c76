"""A thousand hostile images through generate-masks: each is labelled or listed, and the run ends."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.end_to_end.conftest import with_method
from tests.forks import ForkServer
from tests.hostile.images import build
from wsss_pipeline.cache import MaskCache, verify
from wsss_pipeline.methods import DEFAULT_METHOD, method_names

ROOT = Path(__file__).parents[2]
MOST_MEMORY = 3 * 2**30  # bytes; the largest image that is decoded takes 400 MB, several times over


def arguments(folder: Path, expected: Mapping[str, bool | None], every: int) -> list[object]:
    """generate-masks of ``folder / "images"``, one in so many of which has a class: the others need no CLIP."""
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "labels"])
        rows.writerows([name, "" if index % every else "cat"] for index, name in enumerate(expected))
    return [
        *("generate-masks", "--images", folder / "images", "--labels", folder / "labels.csv"),
        *("--classes", "cat,dog", "--clip", "demo", "--offline", "--template", "a photo of a {}."),
        *("--cache", folder / "cache", "--json"),
    ]


def check(folder: Path, expected: Mapping[str, bool | None], code: int, stdout: str, stderr: str) -> None:
    """Each image is labelled or listed, and those that must be usable are labelled."""
    assert code == 1, stderr[-3000:]
    assert "Traceback" not in stderr
    assert all(line.isprintable() for line in stderr.splitlines())
    summary = json.loads(stdout.splitlines()[0])
    failed = summary["failed"]
    assert summary["computed"] + len(failed) == len(expected)
    assert all(str(folder) in reason and len(reason) < 500 for reason in failed.values()), failed
    path = Path(stdout.splitlines()[-1])
    assert verify(path).ok
    with MaskCache.open(path) as cache:
        found = set(cache)
    assert found.isdisjoint(failed)
    assert found | set(failed) == set(expected)
    wrongly_refused = {name: failed[name] for name, usable in expected.items() if usable and name in failed}
    assert not wrongly_refused
    assert not {name for name, usable in expected.items() if usable is False and name in found}


def test_a_thousand_hostile_images_cost_themselves_alone(tmp_path: Path) -> None:
    expected = build(tmp_path / "images", 1000)
    assert len(expected) == 1000
    done = subprocess.run(
        [sys.executable, "-m", "wsss_pipeline", *arguments(tmp_path, expected, every=7)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    check(tmp_path, expected, done.returncode, done.stdout, done.stderr)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MOST_MEMORY


@pytest.mark.parametrize("method", [method for method in method_names() if method != DEFAULT_METHOD])
def test_hostile_images_with_a_class_cost_themselves_alone_with_any_method(
    tmp_path: Path, forks: ForkServer, method: str
) -> None:
    """All kinds but those whose size is beyond reason, which no method gets to see."""
    expected = build(tmp_path / "images", 160, seed=1, has_bombs=False)
    further = (*with_method(method), "--workers", 0)
    done = forks.run(*arguments(tmp_path, expected, every=1), *further)
    check(tmp_path, expected, *done)
