"""Methods and their parts on fresh drawn scenes with the embedded CLIP.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/demo_methods.py [--scenes 200] [--seeds 3] [--only TEXT]

Every variant sees the same scenes, those of ``demo_ablations.py``, and goes through ``MaskGenerator`` as a user's do;
mIoU over all scenes of a seed by the rule of ``wsss evaluate``, as mean and 95 % confidence interval over the seeds.
Needs no GPU: about ten minutes for 3 x 200 scenes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from demo_ablations import FIRST_SEED, interval

from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

CAM, PAR, CRF = {"refine": "none"}, {"refine": "par"}, {"refine": "crf"}
VOTE = {"refine": "vote", "vote.regions": "slic"}
WITH_AFFINITY = {"excel.affinity": True, "excel.affinity_iterations": 1}
PLAIN = {"excel.attributes": "none"}
SQUARE = {"excel.size": "square", "excel.side": 160}
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "CAM": ("excel", CAM),
    "CAM + PAR": ("excel", PAR),
    "CAM + CRF": ("excel", CRF),
    "CAM + vote of superpixels": ("excel", VOTE),
    "CAM + affinity": ("excel", {**CAM, **WITH_AFFINITY}),
    "CAM + affinity + PAR": ("excel", {**PAR, **WITH_AFFINITY}),
    "CAM + affinity + CRF": ("excel", {**CRF, **WITH_AFFINITY}),
    "CAM + affinity + vote of superpixels": ("excel", {**VOTE, **WITH_AFFINITY}),
    "without attributes: CAM": ("excel", {**CAM, **PLAIN}),
    "without attributes: CAM + PAR": ("excel", {**PAR, **PLAIN}),
    "without attributes: CAM + CRF": ("excel", {**CRF, **PLAIN}),
    "without calibration: CAM": ("excel", {**CAM, "excel.calibrated_blocks": 0}),
    "without calibration: CAM + CRF": ("excel", {**CRF, "excel.calibrated_blocks": 0}),
    "square of 160: CAM": ("excel", {**CAM, **SQUARE}),
    "square of 160: CAM + PAR": ("excel", {**PAR, **SQUARE}),
    "square of 160: CAM + PAR on the image": ("excel", {**PAR, **SQUARE, "excel.refine_on": "image"}),
    "clip-es: CAM": ("clip-es", {**CAM, "cam.affinity": False}),
    "clip-es: CAM + CAA": ("clip-es", CAM),
    "clip-es: CAM + CAA + PAR": ("clip-es", PAR),
    "clip-es: CAM + CAA + CRF": ("clip-es", CRF),
    "clip-es: CAM + vote of superpixels": ("clip-es", {**VOTE, "cam.affinity": False}),
    "clip-es: CAM + CAA + vote of superpixels": ("clip-es", VOTE),
    "fma: CAM + affinity": ("fma", CAM),
    "fma: CAM + affinity + CRF": ("fma", CRF),
    "fma: CAM + affinity + vote of superpixels": ("fma", VOTE),
}


def measure(method: str, settings: Mapping[str, Any], seed: int, scenes: int) -> float:
    """mIoU of the scenes of a seed, in [0, 1]."""
    base = {"clip.weights": "demo", "clip.precision": "fp32"}
    generator = MaskGenerator(
        "demo", method=method, settings={**base, **settings}, device="cpu", offline=True
    )
    names = ("background", *generator.class_set.names)
    matrix = np.zeros((len(names), len(names) + 1), np.int64)
    for index in range(scenes):
        scene = draw_scene((seed, index))
        matrix += confusion_matrix(generator(scene.image, scene.labels).mask, scene.mask, len(names))
    return Scores.from_matrix(matrix, names).miou


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=200, help="per seed")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds it")
    options = parser.parse_args()
    print(f"{options.seeds} x {options.scenes} scenes\n")
    print("| variant | mIoU % |\n| --- | ---: |")
    for name, (method, settings) in VARIANTS.items():
        if options.only not in name:
            continue
        found = [
            measure(method, settings, FIRST_SEED + seed, options.scenes) for seed in range(options.seeds)
        ]
        print(f"| {name} | {interval(found)} |", flush=True)


if __name__ == "__main__":
    main()
