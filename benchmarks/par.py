"""Speed of pixel-adaptive refinement (PAR) beside the same written plainly in torch.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/par.py [--threads 2] [--repeats 5] [--labels 3] [--device cuda]

One synthetic 500x375 image (that of dense_crf.py), 20 iterations. *Plain* is the published way: 48 neighbours by
padding and slicing, the scores of all labels held once for each neighbour. It has the threads of torch; the compiled
form works on as many copies of the image at a time, each in a thread, as stage one does. The ways take turns within
one run, so what else the machine does hits all alike; seconds an image: median, and the range, which is the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from dense_crf import HEIGHT, WIDTH, synthetic_image, synthetic_scores
from plain_excel import par as plain
from torch import Tensor

from wsss_pipeline.config import ParConfig
from wsss_pipeline.refine.par import propagate, propagate_in_torch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--labels", type=int, default=3, help="background included")
    parser.add_argument("--device", default="cpu", help="with cuda the compiled form isn't timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(options.labels)
    image = torch.from_numpy(synthetic_image(generator).transpose(2, 0, 1)).float()[None]
    scores, parameters = synthetic_scores(options.labels, generator)[None], ParConfig()
    image, scores = image.to(options.device), scores.to(options.device)
    pool, copies = ThreadPoolExecutor(options.threads), [image] * options.threads

    def compiled() -> Tensor:
        *_, last = pool.map(lambda one: propagate(one, scores, parameters), copies)
        return last

    ways: dict[str, tuple[Callable[[], Tensor], int]] = {
        "plain": (lambda: plain(image, scores), 1),
        "in torch": (lambda: propagate_in_torch(image, scores, parameters), 1),
    }
    if options.device == "cpu":
        ways["compiled"] = (compiled, len(copies))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = plain(image, scores).cpu()
    for repeat in range(options.repeats + 1):
        for name, (run, images) in ways.items():
            start = time.perf_counter()
            found = run().cpu()
            if repeat:  # the first call of each also loads and warms up
                seconds[name].append((time.perf_counter() - start) / images)
            assert (found - expected).abs().max() < 1e-5
    print(
        f"{options.device}, {options.threads} threads; {options.labels} labels, {WIDTH}x{HEIGHT}; seconds an image"
    )
    print(f"{'way':<9} {'median':>8} {'least':>8} {'most':>8} {'times as fast':>14}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        ratio = statistics.median(seconds["plain"]) / middle
        print(f"{name:<9} {middle:>8.3f} {min(times):>8.3f} {max(times):>8.3f} {ratio:>14.1f}")


if __name__ == "__main__":
    main()
