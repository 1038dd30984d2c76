"""Rounds of self-training, and WeakCLIP's settings, on the demo's drawn scenes.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.self_training --part rounds|weakclip --out DIR [--seeds 3]
        [--scenes 200 100] [--iterations 300] [--only TEXT ...] [--set KEY=VALUE ...]

*rounds*: the masks of each method train a network, whose own masks of the same images (restricted to their labels,
refined by the CRF) train the next one from its random start, twice. *weakclip*: WeakCLIP's network as published and
as ours, trained on CLIP-ES's masks. Figures are mIoU in percent of the training images' masks, and of the network on
unseen images. Ground truth serves these alone, but for the rows called ``best``: what a choice of the checkpoint by
the unseen images' ground truth gives. The published rates of CLIP and adapter rise to a number that makes their sum
over a run what it is over the published one.

A figure is in ``DIR/PART.json`` as soon as it is there; the same line goes on after a stop. The table has those that
are there, mean and 95 % confidence interval over the seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo_ablations import interval
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import RelabelConfig, resolve
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import MaskSource
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.runtime.output import write_file
from wsss_pipeline.segmentation.checkpoint import BEST, LAST
from wsss_pipeline.segmentation.train_config import OnlineConfig, load_train_config
from wsss_pipeline.stages.demo import SCENES, draw_scenes
from wsss_pipeline.stages.evaluate import evaluate, open_masks
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.relabel import RelabelJob, relabel
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

ROUNDS = 3  # trainings: on the method's masks, and on those of the network before, twice
METHODS = ("clip-es", "excel")
# what learns from finished masks -> recipe, and settings over it
NETWORKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "deeplabv3plus": ("demo/deeplabv3plus", ()),
    "segformer": ("demo/segformer", ()),
    "frozen-clip": ("weclip/demo", ("loss.affinity=0", "loss.confidence=soft", "loss.min_confidence=0.5")),
    "weakclip": ("weakclip/demo", ()),
}
SUM_OF_RATES = 1e-2  # of what learns slowly, over the 20,000 updates of the published run
_CLIP, _ADAPTER = "network.weakclip.clip=published", "network.weakclip.adapter=published"
_FREE = "loss.restrict_to_labels=false"
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "ours": (),
    "ours, CLIP learns slowly": (_CLIP,),
    "ours, adapter learns slowly": (_ADAPTER,),
    "ours, classes not restricted": (_FREE,),
    "published": (_CLIP, _ADAPTER, _FREE, "network.weakclip.edges=cut", "loss.min_confidence=0"),
}


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes, laid out as PASCAL VOC does."""

    data: Path
    seed: int

    def split(self, name: str) -> Path:
        """Its list of images."""
        return self.data / "ImageSets/Segmentation" / f"{name}.txt"

    def masks_of(self, method: str) -> Path:
        """Folder of stage one's masks of the training images."""
        job = MaskJob.read(
            {"clip.weights": "demo"},
            voc=self.data,
            split="train",
            classes="demo",
            preset=f"{method}/demo",
            cache=self.data.parent / "cache",
        )
        return generate_masks(job).path

    def train(
        self, masks: MaskSource, recipe: str, overrides: Sequence[str], out: Path, *, choose: bool = False
    ) -> Path:
        """Folder of a run that has ended; with ``choose`` the best network by ground truth is in it too."""
        config = load_train_config(recipe, None, overrides, {"seed": self.seed})
        config = config.model_copy(update={"online": OnlineConfig()})
        job = TrainJob(
            self.data / "JPEGImages",
            masks,
            out,
            config,
            split=self.split("train"),
            workers=0,
            offline=True,
            val_gt=self.data / "SegmentationClass" if choose else None,
            val_split=self.split("val") if choose else None,
        )
        if train_seg(job).interrupted:
            raise KeyboardInterrupt
        return out

    def relabel(self, checkpoint: Path, *, any_class: bool = False) -> Path:
        """Folder of a network's masks of the training images, out of each and its mirror image."""
        config = resolve(RelabelConfig, [("benchmark", {"inference.flip": True})])
        job = RelabelJob.read(
            checkpoint,
            self.data / "JPEGImages",
            self.data.parent / "cache",
            labels=self.data / "Annotations",
            classes="demo",
            split=self.split("train"),
            any_class=any_class,
            config=config,
            device="cpu",
        )
        return relabel(job).path

    def score(self, *, masks: Path | None = None, checkpoint: Path | None = None) -> float:
        """mIoU, in [0, 1]: of masks of the training images, or of a network on unseen ones."""
        source = open_masks(cache=masks, checkpoint=checkpoint, images=find_images(self.data / "JPEGImages"))
        split = self.split("train" if checkpoint is None else "val")
        return evaluate(source, self.data / "SegmentationClass", split=split).scores.miou


class Figures:
    """Figures by row and column, each a list by seed, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.kept: dict[str, dict[str, dict[str, float]]] = {}
        if file.exists():
            self.kept = json.loads(file.read_text())

    def has(self, row: str, seed: int) -> bool:
        return str(seed) in self.kept.get(row, {})

    def keep(self, row: str, seed: int, **values: Any) -> None:
        self.kept.setdefault(row, {})[str(seed)] = values
        write_file(self.file, json.dumps(self.kept, indent=1))
        print(row, seed, values, flush=True)

    def table(self) -> list[str]:
        lines = [
            "| | masks | masks, any class | unseen images | seeds |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row, seeds in self.kept.items():
            columns = [
                [values[name] for values in seeds.values() if name in values]
                for name in ("masks", "any_class", "unseen")
            ]
            cells = [interval(values) if values else "" for values in columns]
            lines.append(f"| {row} | {' | '.join(cells)} | {len(seeds)} |")
        return lines


def rounds(scenes: Scenes, figures: Figures, method: str, network: str, overrides: Sequence[str]) -> None:
    """All rounds of a network from a method's masks."""
    recipe, own = NETWORKS[network]
    masks = scenes.masks_of(method)
    if not figures.has(method, scenes.seed):
        figures.keep(method, scenes.seed, masks=scenes.score(masks=masks))
    for number in range(ROUNDS):
        row = f"{method}, {network}, round {number}"
        out = scenes.data.parent / row.replace(", ", "-").replace(" ", "-")
        trained = scenes.train(MaskCache.open(masks), recipe, (*own, *overrides), out)
        masks = scenes.relabel(trained)
        if not figures.has(row, scenes.seed):
            unseen = scenes.score(checkpoint=trained)
            figures.keep(row, scenes.seed, masks=scenes.score(masks=masks), unseen=unseen)


def settings(scenes: Scenes, figures: Figures, name: str, overrides: Sequence[str]) -> None:
    """WeakCLIP with one choice of settings: its last checkpoint, and the one that ground truth would choose."""
    if figures.has(f"{name}, best", scenes.seed):
        return
    found = scenes.masks_of("clip-es")
    if not figures.has("clip-es", scenes.seed):
        figures.keep("clip-es", scenes.seed, masks=scenes.score(masks=found))
    masks = MaskCache.open(found)
    out = scenes.data.parent / name.replace(", ", "-").replace(" ", "-")
    chosen = [*SETTINGS[name], "validate_every=50", *overrides]
    if _CLIP in chosen or _ADAPTER in chosen:
        # half a period of a cosine, from 0
        updates = load_train_config("weakclip/demo", None, chosen).optimisation.iterations
        chosen.append(f"optimisation.min_lr={2 * SUM_OF_RATES / updates}")
    trained = scenes.train(masks, "weakclip/demo", chosen, out, choose=True)
    for row, checkpoint in ((name, trained / LAST), (f"{name}, best", trained / BEST)):
        figures.keep(
            row,
            scenes.seed,
            masks=scenes.score(masks=scenes.relabel(checkpoint)),
            any_class=scenes.score(masks=scenes.relabel(checkpoint, any_class=True)),
            unseen=scenes.score(checkpoint=checkpoint),
        )
    shutil.rmtree(out)


def main() -> None:
    """Compute what isn't there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["rounds", "weakclip"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=SCENES, metavar="N", help="to train on, unseen"
    )
    parser.add_argument("--iterations", type=int, default=300, help="updates of each training")
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="rows whose name holds one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    overrides = [f"optimisation.iterations={options.iterations}", *options.overrides]
    figures = Figures(options.out / f"{options.part}.json")
    for seed in range(options.seeds):
        scenes = Scenes(options.out / f"seed-{seed}" / "data", seed)
        if not scenes.data.exists():
            draw_scenes(scenes.data.parent, seed, tuple(options.scenes))
        if options.part == "weakclip":
            for name in SETTINGS:
                if any(text in name for text in options.only):
                    settings(scenes, figures, name, overrides)
            continue
        for network in NETWORKS:
            for method in METHODS:
                if any(text in f"{method}, {network}" for text in options.only):
                    rounds(scenes, figures, method, network, overrides)
    print("\n".join(figures.table()))


if __name__ == "__main__":
    main()
