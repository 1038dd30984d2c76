"""What a mask set of many images costs beside its masks: time and memory of writing, listing and reading.

    python benchmarks/cache_size.py 1000 10000 100000

Records are 8x8 pixels, so that nearly all that is measured is the cost of an image as such. Each row is a process
of its own, for its memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, PseudoMask, open_mask_set


def measure(count: int) -> None:
    mask = PseudoMask(np.zeros((8, 8), np.uint8), np.full((8, 8), 200, np.uint8), ("cat",))
    ids = [f"folder/{number:09}" for number in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = open_mask_set(Path(name), MaskSet("x", {"a": 1}, ("cat",)))
        started = time.perf_counter()
        with MaskWriter(folder) as writer:
            for image_id in ids:
                writer.write(image_id, mask, image_digest="0" * 64, seconds=0.0, status=(1, 2, 3))
            written = time.perf_counter() - started
            started = time.perf_counter()
            writer.finish(ids)
        finished = time.perf_counter() - started
        started = time.perf_counter()
        with MaskWriter(folder):
            started_again = time.perf_counter() - started
        started = time.perf_counter()
        cache = MaskCache.open(folder)
        opened = time.perf_counter() - started
        started = time.perf_counter()
        places = np.random.default_rng(0).integers(0, count, 500)
        for place in places:
            assert cache[ids[place]].mask.shape == (8, 8)
        read = (time.perf_counter() - started) / len(places)
        index, listed = ((folder / name).stat().st_size / count for name in ("index.h5", "known-0-of-1.json"))
        files = len(list(folder.glob("shard-*.h5")))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| {count:,} | {files} | {1e6 * written / count:.0f} | {finished:.1f} | {started_again:.1f} | {opened:.1f} "
        f"| {1e3 * read:.1f} | {index:.0f} | {listed:.0f} | {memory:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    print(
        "| images | files | write, us an image | finish and index, s | start again, s | open to read, s ",
        end="",
    )
    print("| read at random, ms an image | index, bytes an image | known list, bytes an image | peak MiB |")
    print("| ---: " * 10 + "|")
    for text in sys.argv[1:]:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(int(text),))
        process.start()
        process.join()
