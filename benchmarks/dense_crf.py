"""Speed of the two backends of the dense CRF, side by side.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dense_crf.py [--device cuda] [--threads 1] [--repeats 7]

One synthetic 500x375 image (seeded: smooth shading, discs, noise), 2 to 5 labels, 10 iterations. The
backends take turns within one run, so what else the machine does hits both alike; medians, in milliseconds,
of complete calls, building the lattice and moving the image included: with one thread on a CPU the time on
that core, else the time that passes. pydensecrf always uses one CPU core; the lattice uses the threads of
torch, or the GPU. Without pydensecrf only the lattice is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.errors import MissingDependencyError
from wsss_pipeline.refine import DenseCrf

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


def synthetic_scores(labels: int, generator: np.random.Generator) -> torch.Tensor:
    """float32 (L, H, W), smooth as upscaled CAMs are."""
    coarse = torch.from_numpy(generator.random((1, labels - 1, HEIGHT // 16, WIDTH // 16), dtype=np.float32))
    cams = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")[0] ** 2
    return torch.cat([1 - cams.amax(dim=0, keepdim=True), cams])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="of the lattice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--repeats", type=int, default=7, help="calls per backend and line of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    refiners = {"lattice": DenseCrf(CrfConfig(backend="lattice"))}
    try:
        refiners["pydensecrf"] = DenseCrf(CrfConfig(backend="pydensecrf"))
    except MissingDependencyError as error:
        print(error)

    print(f"lattice on {options.device}, {options.threads} threads; {WIDTH}x{HEIGHT}, ms, median")
    print(f"{'labels':>6} {'lattice':>9} {'pydensecrf':>11} {'times as fast':>14}")
    clock = time.process_time if (options.device, options.threads) == ("cpu", 1) else time.perf_counter
    for labels in (2, 3, 4, 5):
        generator = np.random.default_rng(labels)
        image, scores = synthetic_image(generator), synthetic_scores(labels, generator)
        seconds: dict[str, list[float]] = {backend: [] for backend in refiners}
        for repeat in range(options.repeats + 1):
            for backend, refine in refiners.items():
                place = scores.to(options.device if backend == "lattice" else "cpu")
                start = clock()
                refine([image], [place])[0].cpu()  # waits for a GPU
                if repeat:  # the first call of each also loads and warms up
                    seconds[backend].append(clock() - start)
        middle = {backend: statistics.median(times) * 1000 for backend, times in seconds.items()}
        reference = middle.get("pydensecrf")
        other = "-" if reference is None else f"{reference:.0f}"
        ratio = "-" if reference is None else f"{reference / middle['lattice']:.2f}"
        print(f"{labels:>6} {middle['lattice']:>9.0f} {other:>11} {ratio:>14}")


if __name__ == "__main__":
    main()
