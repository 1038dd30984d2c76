"""Which confidence trains best: networks on drawn scenes, from the same masks with other pixels left out.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/confidence_training.py --out DIR [--network frozen-clip]
        [--scenes 200 100] [--seeds 3] [--iterations 300] [--only NAME ...]

Masks of ``clip-es`` with the CRF, once with the posterior for its confidence and once with ``product``, equal but
for that; on each a network. ``frozen-clip`` is a decoder on the frozen CLIP (recipe ``weclip/demo`` without targets
made in training and without its affinity loss, which would learn from the same pixels). ``segformer`` starts from
nothing and wants 3,000 scenes and 6,000 updates. mIoU on the unseen scenes as mean and 95 % confidence interval over
the seeds of network and order. Ground truth trains the bound and gives the scores, nothing else. What is done in
``--out`` isn't done again: interrupted, the same command goes on. On a core a decoder takes two minutes, such a
SegFormer twenty.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

from demo_ablations import interval

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import MaskFolder, MaskSource
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.segmentation.train_config import load_train_config
from wsss_pipeline.stages.demo import SCENES, draw_scenes
from wsss_pipeline.stages.evaluate import evaluate, open_masks
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

ALL = {"loss.confidence": "hard", "loss.min_confidence": 0}
# masks, and what is left out of them
WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "all pixels": ("product", ALL),
    "posterior from 0.95": ("posterior", {"loss.confidence": "hard", "loss.min_confidence": 0.95}),
    "product from 0.95": ("product", {"loss.confidence": "hard", "loss.min_confidence": 0.95}),
    "product, soft": ("product", {"loss.confidence": "soft", "loss.min_confidence": 0}),
    "posterior, keep 0.8": ("posterior", {"loss.confidence": "hard", "loss.keep": 0.8}),
    "product, keep 0.9": ("product", {"loss.confidence": "hard", "loss.keep": 0.9}),
    "product, keep 0.8": ("product", {"loss.confidence": "hard", "loss.keep": 0.8}),
    "product, keep 0.6": ("product", {"loss.confidence": "hard", "loss.keep": 0.6}),
    "product, keep 0.8, soft": ("product", {"loss.confidence": "soft", "loss.keep": 0.8}),
    "ground truth": ("ground truth", ALL),
}
# what learns -> recipe, and settings over it
NETWORKS: dict[str, tuple[str, dict[str, object]]] = {
    "frozen-clip": (
        "weclip/demo",
        {"online.method": "", "online.gate_from": 0, "loss.affinity": 0, "precision": "fp32"},
    ),
    "segformer": (
        "demo/segformer",
        {"optimisation.ema": 0.998, "augmentation.photometric": False, "validate_every": 2000},
    ),
}


def masks_of(data: Path, cache: Path, confidence: str) -> MaskCache:
    job = MaskJob.read(
        voc=data,
        split="train",
        classes="demo",
        settings={"clip.weights": "demo", "clip.precision": "fp32", "confidence": confidence},
        cache=cache,
    )
    return MaskCache.open(generate_masks(replace(job, offline=True, workers=1)).path)


def score(data: Path, out: Path, masks: MaskSource, network: str, settings: dict[str, object]) -> float:
    """mIoU on the unseen scenes of a network, trained where it isn't yet."""
    file = out.with_name(f"{out.name}.json")  # names hold dots
    if not file.exists():
        splits = data / "ImageSets/Segmentation"
        recipe, base = NETWORKS[network]
        config = load_train_config(recipe, flags={**base, **settings})
        job = TrainJob(
            data / "JPEGImages", masks, out, config, split=splits / "train.txt", workers=0, device="cpu"
        )
        trained = train_seg(job)
        if trained.interrupted:
            raise KeyboardInterrupt
        images = find_images(data / "JPEGImages")
        learnt = open_masks(checkpoint=trained.checkpoint, images=images, device="cpu")
        found = evaluate(learnt, data / "SegmentationClass", split=splits / "val.txt")
        file.write_text(json.dumps(found.scores.miou))
    value: float = json.loads(file.read_text())
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of scenes, masks and networks")
    parser.add_argument("--network", choices=NETWORKS, default="frozen-clip", help="what learns")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=SCENES, metavar="N", help="to train on, unseen"
    )
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument("--iterations", type=int, default=300, help="updates of 16 crops")
    parser.add_argument("--only", nargs="*", default=list(WAYS), metavar="NAME", help="ways to train")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    data = options.out / "data"
    if not data.exists():
        draw_scenes(options.out, seed=0, scenes=tuple(options.scenes))
    ways = {name: WAYS[name] for name in options.only}
    sources: dict[str, MaskSource] = {}
    for kind in dict.fromkeys(kind for kind, _ in ways.values()):
        if kind == "ground truth":
            names = masks_of(data, options.out / "cache", "posterior").class_names
            sources[kind] = MaskFolder(data / "SegmentationClass", names, "ground truth")
        else:
            sources[kind] = masks_of(data, options.out / "cache", kind)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, (kind, settings) in ways.items():
            given = {**settings, "seed": seed, "optimisation.iterations": options.iterations}
            kept_as = f"{options.network} {options.iterations} {seed} {name}".replace(", ", "-").replace(
                " ", "-"
            )
            miou = score(data, options.out / kept_as, sources[kind], options.network, given)
            found[name].append(miou)
            print(f"seed {seed}, {name}: {100 * miou:.1f}", flush=True)
    print(
        f"\n{options.network}, {options.scenes[0]} scenes, {options.iterations} updates, {options.seeds} seeds\n"
    )
    print("| it learns from | mIoU % |\n| --- | ---: |")
    for name, values in found.items():
        print(f"| {name} | {interval(values)} |")


if __name__ == "__main__":
    main()
