"""Speed of the two backends of the dense CRF, side by side.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dense_crf.py [--device cuda] [--threads 1] [--repeats 7]

One synthetic 500x375 picture (seeded: smooth shading, discs, noise), 2 and 4 labels, 10 iterations. The
backends take turns within one run, so what else the machine does hits both alike; medians, in milliseconds,
of complete calls, building the lattice and moving the arrays included. pydensecrf always uses one CPU
core; the lattice uses the threads of torch, or the GPU. Without pydensecrf only the lattice is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from numpy.typing import NDArray

from wsss_pipeline.config import CrfBackend, CrfConfig
from wsss_pipeline.errors import MissingDependencyError
from wsss_pipeline.refine import choose_backend, dense_crf, unary_from_scores

HEIGHT, WIDTH = 375, 500


def synthetic_image(generator: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 (H, W, 3): a shaded ground with forty discs and a little noise."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    image = np.stack([rows / HEIGHT, columns / WIDTH, (rows + columns) / (HEIGHT + WIDTH)], axis=-1) * 160
    for _ in range(40):
        row, column, radius = generator.uniform((0, 0, 10), (HEIGHT, WIDTH, 70))
        inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        image[inside] = image[inside] * 0.3 + generator.uniform(0, 170, 3)
    return (image + generator.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def synthetic_unary(labels: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """float32 (L, H, W) from smooth scores, as upscaled CAMs are."""
    coarse = torch.from_numpy(generator.random((1, labels - 1, HEIGHT // 16, WIDTH // 16), dtype=np.float32))
    cams = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")[0].numpy() ** 2
    return unary_from_scores(np.concatenate([1 - cams.max(axis=0, keepdims=True), cams]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="of the lattice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--repeats", type=int, default=7, help="calls per backend and line of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backends: list[CrfBackend] = ["lattice"]
    try:
        backends.append(choose_backend("pydensecrf"))
    except MissingDependencyError as error:
        print(error)

    print(f"lattice on {options.device}, {options.threads} threads; {WIDTH}x{HEIGHT}, ms, median")
    print(f"{'labels':>6} {'lattice':>9} {'pydensecrf':>11} {'times as fast':>14}")
    for labels in (2, 4):
        generator = np.random.default_rng(labels)
        image, unary = synthetic_image(generator), synthetic_unary(labels, generator)
        seconds: dict[CrfBackend, list[float]] = {backend: [] for backend in backends}
        for repeat in range(options.repeats + 1):
            for backend in backends:
                start = time.perf_counter()
                dense_crf(image, unary, CrfConfig(), backend, options.device)
                if repeat:  # the first call of each also loads and warms up
                    seconds[backend].append(time.perf_counter() - start)
        middle = {backend: statistics.median(times) * 1000 for backend, times in seconds.items()}
        reference = middle.get("pydensecrf")
        other = "-" if reference is None else f"{reference:.0f}"
        ratio = "-" if reference is None else f"{reference / middle['lattice']:.2f}"
        print(f"{labels:>6} {middle['lattice']:>9.0f} {other:>11} {ratio:>14}")


if __name__ == "__main__":
    main()
