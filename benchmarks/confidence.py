"""How well a confidence tells right pixels from wrong ones, on fresh drawn scenes with the embedded CLIP.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/confidence.py [--scenes 200] [--seeds 3] [--only TEXT] [--size 160x120]

Every confidence judges the same masks of the same scenes, those of ``demo_ablations.py``, and is rounded to half
percents as a mask set stores it. Printed are, as mean and 95 % confidence interval over the seeds,

- AUROC of errors: how often a right pixel is surer than a wrong one, ties counting half;
- AURC: area under the risk-coverage curve, the mean share of errors among the surest pixels over all coverages, with
  ties in the mean of their orders (Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks",
  NeurIPS 2017); less is better;
- ECE: expected calibration error over 20 bins of equal width (Guo et al., "On Calibration of Modern Neural Networks",
  ICML 2017).

Beside the choices of ``--confidence`` stand others that were tried. Nothing is tuned here: the constant of
``product`` was chosen on other seeds (901 to 903). Needs no GPU: some ten minutes for 3 x 200 scenes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from demo_ablations import FIRST_SEED, interval
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.config import CrfConfig, ParConfig
from wsss_pipeline.data.masks import CERTAIN
from wsss_pipeline.demo.scenes import Scene, draw_scene
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.refine import DenseCrf, Par, label, label_confidences

VARIANTS = {
    "clip-es, CRF": ("clip-es", "crf"),
    "excel, PAR": ("excel", "par"),
    "excel, CRF": ("excel", "crf"),
}
SOFTER = CrfConfig(gaussian_weight=1.5, bilateral_weight=2.0)
BINS = 20


@dataclass
class Counts:
    """Right and wrong pixels by their confidence in half percents, float64 (201,) each."""

    right: NDArray[np.float64]
    wrong: NDArray[np.float64]

    def auroc(self) -> float:
        below = np.cumsum(self.wrong) - self.wrong
        return float((self.right * (below + self.wrong / 2)).sum() / (self.right.sum() * self.wrong.sum()))

    def aurc(self) -> float:
        wrong, pixels = self.wrong[::-1], (self.wrong + self.right)[::-1]
        # coverages within a group of equal confidences: its errors come evenly
        done_wrong, done = np.cumsum(wrong) - wrong, np.cumsum(pixels) - pixels
        middle = (done_wrong + wrong / 2) / np.maximum(done + pixels / 2, 1)
        return float((middle * pixels).sum() / pixels.sum())

    def ece(self) -> float:
        steps = np.arange(CERTAIN + 1)
        bins = np.minimum(steps * BINS // CERTAIN, BINS - 1)
        pixels = self.right + self.wrong
        sure = np.bincount(bins, pixels * steps / CERTAIN, BINS)
        right = np.bincount(bins, self.right, BINS)
        return float(np.abs(sure - right).sum() / pixels.sum())


def candidates(
    generator: MaskGenerator, scene: Scene
) -> tuple[NDArray[np.uint8], Mapping[str, NDArray[np.uint8]]]:
    """The mask, and every confidence of it by name, in half percents."""
    image, size = generator.prepare(scene.image, scene.labels), scene.mask.shape
    batch = torch.stack([image.prepared.pixels, image.prepared.pixels.flip(-1)])
    own, mirrored = generator.method.scores(batch, [image.classes] * 2)
    (scores, looked_at_twice) = (
        assemble(upscale_cams(maps, (size[0], size[1])).half(), generator.method.background_power)
        for maps in (own, mirrored.flip(-1))
    )
    (posterior,) = generator.refiner([scene.image], [scores])
    (margin,) = label_confidences("margin", [scene.image], [scores])
    (product,) = label_confidences("product", [scene.image], [scores])
    (around,) = Par(ParConfig())([scene.image], [scores])
    (softer,) = DenseCrf(SOFTER)([scene.image], [scores])
    assert margin is not None
    assert product is not None
    shares = scores.float() / scores.float().sum(dim=0)
    other = looked_at_twice.float() / looked_at_twice.float().sum(dim=0)
    index = posterior.argmax(dim=0)
    maps = {
        "posterior": None,
        "margin": margin,
        "product": product,
        "largest score": scores.float().amax(dim=0, keepdim=True).expand_as(scores),
        "score of the label": shares,
        "unsigned margin": _unsigned(scores),
        "posterior at temperature 2": _tempered(posterior, 2),
        "posterior at temperature 4": _tempered(posterior, 4),
        "CRF of half the weights": softer,
        "PAR of the scores": around,
        "mean of the score and its mirror image's": (shares + other) / 2,
        "distance to the border": _distances(index, len(scores)),
        "margin x posterior": margin * posterior,
        "product x distance": product * _distances(index, len(scores)),
    }
    found = {
        name: label(posterior, image.classes, (size[0], size[1]), confidences=kind)
        for name, kind in maps.items()
    }
    return found["posterior"][0].numpy(), {name: pair[1].numpy() for name, pair in found.items()}


def _unsigned(scores: Tensor) -> Tensor:
    best = scores.float().topk(2, dim=0).values
    return ((1 + best[0] - best[1]) / 2).expand(scores.shape)


def _tempered(posterior: Tensor, temperature: float) -> Tensor:
    return (posterior.clamp(min=1e-12).log() / temperature).softmax(dim=0)


def _distances(index: Tensor, labels: int) -> Tensor:
    """1 - exp(-d / 4), d the pixels to the nearest other label; for each label its own."""
    from scipy.ndimage import distance_transform_edt

    planes = [
        torch.from_numpy(distance_transform_edt(np.pad(index.numpy() == value, 1, mode="edge"))[1:-1, 1:-1])
        for value in range(labels)
    ]
    return 1 - torch.exp(-torch.stack(planes).float() / 4)


@torch.no_grad()
def measure(method: str, refine: str, seed: int, scenes: int, size: tuple[int, int]) -> dict[str, Counts]:
    settings = {"clip.weights": "demo", "clip.precision": "fp32", "refine": refine}
    generator = MaskGenerator("demo", method=method, settings=settings, device="cpu", offline=True)
    found: dict[str, Counts] = {}
    for number in range(scenes):
        scene = draw_scene((seed, number), *size)
        mask, confidences = candidates(generator, scene)
        right = mask == scene.mask
        for name, confidence in confidences.items():
            counts = found.setdefault(name, Counts(np.zeros(CERTAIN + 1), np.zeros(CERTAIN + 1)))
            counts.right += np.bincount(confidence[right], minlength=CERTAIN + 1)
            counts.wrong += np.bincount(confidence[~right], minlength=CERTAIN + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=200, help="per seed")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument("--only", default="", metavar="TEXT", help="masks whose name holds it")
    parser.add_argument("--size", default="160x120", help="of a scene, pixels")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    print(f"{options.seeds} x {options.scenes} scenes of {width}x{height}")
    for name, (method, refine) in VARIANTS.items():
        if options.only not in name:
            continue
        runs = [
            measure(method, refine, FIRST_SEED + seed, options.scenes, (width, height))
            for seed in range(options.seeds)
        ]
        errors = [
            run["posterior"].wrong.sum() / (run["posterior"].right + run["posterior"].wrong).sum()
            for run in runs
        ]
        print(f"\n{name}: {interval(errors)} % of the pixels are wrong\n")
        print("| confidence | AUROC % | AURC % | ECE % |\n| --- | ---: | ---: | ---: |")
        for kind in runs[0]:
            of_kind = [run[kind] for run in runs]
            figures = ([getattr(run, figure)() for run in of_kind] for figure in ("auroc", "aurc", "ece"))
            auroc, aurc, ece = map(list, figures)
            print(f"| {kind} | {interval(auroc)} | {hundredths(aurc)} | {interval(ece)} |", flush=True)


def hundredths(values: list[float]) -> str:
    """The mean, in percent; an AURC is small."""
    return f"{100 * float(np.mean(values)):.2f}"


if __name__ == "__main__":
    main()
