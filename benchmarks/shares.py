"""One command against shares of it in several processes, and Ray's actors: images a second.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/shares.py --images DIR [--count 16] [--precision bf16]

CLIP ViT-B/16 with seeded weights, as in ``stage_one.py``. Seconds are those of computing, without the start of Python
and of CLIP; of several processes, those of the slowest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from seeded_clip import write_clip
from stage_one import choose_images


def run(work: Path, arguments: list[str], ways: list[list[str]]) -> tuple[float, int]:
    """Seconds and bytes of the cache of processes that run at once."""
    cache = Path(tempfile.mkdtemp(dir=work))
    command = [
        sys.executable,
        "-m",
        "wsss_pipeline",
        "-q",
        "generate-masks",
        *arguments,
        "--cache",
        str(cache),
        "--json",
    ]
    processes = [subprocess.Popen([*command, *way], stdout=subprocess.PIPE, text=True) for way in ways]
    summaries = [json.loads(process.communicate()[0].splitlines()[0]) for process in processes]
    assert not any(process.returncode for process in processes)
    return max(summary["computing"] for summary in summaries), sum(
        path.stat().st_size for path in cache.rglob("*") if path.is_file()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        images, labels = choose_images(options.images, work, options.count)
        (work / "labels.json").write_text(json.dumps(labels))
        folder = next(iter(images.values())).parent
        arguments = ["--images", str(folder), "--labels", str(work / "labels.json"), "--classes", "voc12"]
        arguments += ["--clip", str(write_clip(work / "clip")), "--precision", options.precision, "--offline"]
        print("| way | images/s | bytes an image |\n| --- | ---: | ---: |")
        for title, ways in (
            ("1 process, 1 worker", [["--workers", "1"]]),
            ("1 process, 2 workers", [["--workers", "2"]]),
            (
                "2 processes, a share and 1 worker each",
                [["--workers", "1", "--shard", f"{i}/2"] for i in range(2)],
            ),
        ):
            seconds, size = run(work, arguments, ways)
            print(f"| {title} | {len(images) / seconds:.2f} | {size / len(images):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
