"""A thousand hostile images through generate-masks: each is labelled or listed, and the run ends."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

from tests.hostile.images import build
from wsss_pipeline.cache import MaskCache, verify

ROOT = Path(__file__).parents[2]
MOST_MEMORY = 3 * 2**30  # bytes; the largest image that is decoded takes 400 MB, several times over


def test_a_thousand_hostile_images_cost_themselves_alone(tmp_path: Path) -> None:
    expected = build(tmp_path / "images", 1000)
    assert len(expected) == 1000
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "labels"])
        # most without a class: they are read, and need no CLIP
        rows.writerows([name, "cat" if index % 7 == 0 else ""] for index, name in enumerate(expected))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "wsss_pipeline", "generate-masks", "--images", tmp_path / "images"),
            *("--labels", tmp_path / "labels.csv", "--classes", "cat,dog", "--clip", "demo", "--offline"),
            *("--template", "a photo of a {}.", "--cache", tmp_path / "cache", "--json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
    summary = json.loads(done.stdout.splitlines()[0])
    failed = summary["failed"]
    assert summary["computed"] + len(failed) == 1000
    assert all(str(tmp_path) in reason and len(reason) < 500 for reason in failed.values()), failed
    path = Path(done.stdout.splitlines()[-1])
    assert verify(path).ok
    with MaskCache.open(path) as cache:
        found = set(cache)
    assert found.isdisjoint(failed)
    assert found | set(failed) == set(expected)
    wrongly_refused = {name: failed[name] for name, usable in expected.items() if usable and name in failed}
    assert not wrongly_refused
    assert not {name for name, usable in expected.items() if usable is False and name in found}
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MOST_MEMORY
