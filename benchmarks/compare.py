"""Masks judged without ground truth, beside what they truly score, on fresh drawn scenes with the embedded CLIP.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/compare.py [--scenes 40] [--seeds 3] [--confidence product]

First, how near the order of estimated IoU (``evaluation/quality.py``) is to that of the true one: Spearman's rank
correlation over all classes of all images, and over the images' means. Second, how often the one of two settings that
``wsss compare`` recommends without ground truth is the better one, over all pairs of settings. Means and 95 %
confidence intervals over the seeds. Needs no GPU: 14 settings, half a second for each of a scene's on a busy core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from demo_ablations import FIRST_SEED, interval
from scipy.stats import spearmanr

from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.demo.scenes import CLASS_NAMES, Scene, draw_scene
from wsss_pipeline.evaluation.comparison import Comparison
from wsss_pipeline.evaluation.quality import Quality
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

AFFINITY = {"excel.affinity": True, "excel.affinity_iterations": 1}
SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "clip-es, CRF": ("clip-es", {"refine": "crf"}),
    "clip-es, PAR": ("clip-es", {"refine": "par"}),
    "clip-es, unrefined": ("clip-es", {"refine": "none"}),
    "clip-es without affinity, CRF": ("clip-es", {"refine": "crf", "cam.affinity": False}),
    "clip-es without affinity, PAR": ("clip-es", {"refine": "par", "cam.affinity": False}),
    "clip-es, two iterations, CRF": ("clip-es", {"refine": "crf", "cam.affinity_iterations": 2}),
    "clip-es, two iterations, PAR": ("clip-es", {"refine": "par", "cam.affinity_iterations": 2}),
    "excel, PAR": ("excel", {"refine": "par"}),
    "excel, CRF": ("excel", {"refine": "crf"}),
    "excel, unrefined": ("excel", {"refine": "none"}),
    "excel with affinity, PAR": ("excel", {"refine": "par", **AFFINITY}),
    "excel without attributes, PAR": ("excel", {"refine": "par", "excel.attributes": "none"}),
    "excel without calibration, PAR": ("excel", {"refine": "par", "excel.calibrated_blocks": 0}),
    "weclip, PAR": ("weclip", {"refine": "par"}),
}
CLEAR = 0.02  # of mIoU


def masks_of(name: str, confidence: str, scenes: Sequence[Scene]) -> list[PseudoMask]:
    method, settings = SETTINGS[name]
    base = {"clip.weights": "demo", "clip.precision": "fp32", "confidence": confidence}
    made = MaskGenerator("demo", method=method, settings={**base, **settings}, device="cpu", offline=True)
    return [made(scene.image, scene.labels) for scene in scenes]


def correlations(records: Sequence[PseudoMask], scenes: Sequence[Scene]) -> tuple[float, float]:
    """Spearman's rank correlation of estimated and true IoU, over classes of images and over images."""
    quality, true = Quality(CLASS_NAMES), []
    for number, (record, scene) in enumerate(zip(records, scenes, strict=True)):
        quality.add(str(number), record)
        of_scene = []
        for name in quality.images[str(number)]:
            value = 1 + CLASS_NAMES.index(name)
            own, truth = record.mask == value, scene.mask == value
            of_scene.append(np.count_nonzero(own & truth) / max(1, np.count_nonzero(own | truth)))
        true.append(of_scene)
    estimated = [list(quality.images[str(number)].values()) for number in range(len(scenes))]
    single = spearmanr(np.concatenate(true), np.concatenate(estimated)).statistic
    means = spearmanr([*map(np.mean, true)], [*map(np.mean, estimated)]).statistic
    return float(single), float(means)


def pairs(records: Mapping[str, Sequence[PseudoMask]], scenes: Sequence[Scene]) -> list[tuple[float, float]]:
    """For each pair of settings, by how much expected and true mIoU of the first are the larger ones."""
    found = []
    for one, other in combinations(records, 2):
        blind, scored = Comparison((one, other), CLASS_NAMES), Comparison((one, other), CLASS_NAMES)
        for number, scene in enumerate(scenes):
            both = (records[one][number], records[other][number])
            blind.add(str(number), both)
            scored.add(str(number), both, scene.mask)
        expected, scores = blind.expected_miou, scored.scores
        assert scores is not None
        found.append((expected[one] - expected[other], scores[one].miou - scores[other].miou))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=40, help="per seed")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument("--confidence", default="product", help="of the masks")
    options = parser.parse_args()
    print(f"{options.seeds} x {options.scenes} scenes, confidence {options.confidence}\n", flush=True)
    of_settings: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    of_pairs: list[list[tuple[float, float]]] = []
    for seed in range(options.seeds):
        scenes = [draw_scene((FIRST_SEED + seed, number)) for number in range(options.scenes)]
        records = {name: masks_of(name, options.confidence, scenes) for name in SETTINGS}
        for name, own in records.items():
            of_settings[name].append(correlations(own, scenes))
        of_pairs.append(pairs(records, scenes))
    print("| rank correlation x 100 | classes of images | images |\n| --- | ---: | ---: |")
    for name, found in of_settings.items():
        single, means = zip(*found, strict=True)
        print(f"| {name} | {interval(single)} | {interval(means)} |")
    print(f"\n| of {len(of_pairs[0])} pairs of settings | recommended rightly, % |\n| --- | ---: |")
    for what, is_taken in {
        "all": lambda expected, true: True,
        f"{100 * CLEAR:g} points of mIoU apart": lambda expected, true: abs(true) > CLEAR,
        f"expected to be {100 * CLEAR:g} points apart": lambda expected, true: abs(expected) > CLEAR,
    }.items():
        chosen = [[pair for pair in of_seed if is_taken(*pair)] for of_seed in of_pairs]
        right = [np.mean([(expected > 0) == (true > 0) for expected, true in own]) for own in chosen]
        share = np.mean([len(own) for own in chosen]) / len(of_pairs[0])
        print(f"| {what} ({100 * share:.0f} % of them) | {interval(list(map(float, right)))} |")
    lost = [
        np.mean([abs(true) if (expected > 0) != (true > 0) else 0 for expected, true in own])
        for own in of_pairs
    ]
    print(f"\nmIoU lost by following it: {interval(list(map(float, lost)))} points a pair on average")


if __name__ == "__main__":
    main()
