"""Speed of ``generate-masks`` against the published way of working, on the same images in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/stage_one.py [--images DIR] [--count 24] [--device cuda]
    OMP_WAIT_POLICY=PASSIVE python benchmarks/stage_one.py --method excel [--images DIR] [--count 6]

A CLIP ViT-B/16 with seeded random weights is made on the spot: speed doesn't depend on what they mean. Every
few images the ways take turns, so what else the machine does hits all alike: the plain method of
``plain_method.py`` or ``plain_excel.py`` (checked first against the published code's outputs), then the whole
command, reading, refinement and cache included, in float32 and in bfloat16. Seconds are those from the first image
to the last, without loading CLIP. Of ExCEL there is also PAR alone, on the plain method's own scores. Without
--images, scenes are drawn at VOC's size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import plain_excel
import torch
from numpy.typing import NDArray
from plain_excel import PlainExcel
from seeded_clip import write_clip
from torch import Tensor

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.attributes import attribute_bank, load_attributes
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import MaskConfig, ParConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import prepare_image
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.methods.excel import ExcelConfig
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.refine.par import propagate
from wsss_pipeline.runtime.device import images_at_a_time
from wsss_pipeline.stages.generate_masks import generate_masks

CLASSES = "voc12"
PLAIN, FP32, BF16 = "plain", "fp32", "bf16"
PLAIN_PAR, PAR = "PAR, plain", "PAR"
PlainMask = Callable[[NDArray[np.uint8], list[int]], NDArray[np.uint8]]  # image (H, W, 3), rows from 0


@dataclass
class Ways:
    """The ways of making masks, and what each has taken so far."""

    method: str
    images: dict[str, Path]
    labels: dict[str, tuple[str, ...]]
    clip_folder: Path
    work: Path
    device: str
    workers: int
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: Counter[str] = field(default_factory=Counter)
    masks: dict[str, dict[str, NDArray[np.uint8]]] = field(default_factory=dict)
    after_par: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # image, scores, refined

    def __post_init__(self) -> None:
        self.classes = load_class_set(CLASSES)
        clip = load_clip(locate_clip(self.config(FP32).clip, offline=True), torch.device(self.device))
        self.plain_mask = (self._plain_excel if self.method == "excel" else self._plain_clip_es)(clip)

    def config(self, precision: str) -> MaskConfig:
        flags = {"clip.weights": str(self.clip_folder), "clip.precision": precision, "classes": CLASSES}
        return load_mask_config(flags=flags | {"method": self.method})

    def _plain_clip_es(self, clip: Clip) -> PlainMask:
        from plain_method import PlainMethod

        text = TextEncoder(clip.text, clip.tokenizer)
        rows = class_embeddings(self.classes, self.classes.templates, text.encode)
        texts = rows.foreground.to(self.device), rows.background.to(self.device)
        method = PlainMethod(clip.vision, *texts, clip.logit_scale)

        def mask(image: NDArray[np.uint8], rows: list[int]) -> NDArray[np.uint8]:
            return method.mask(image, prepare_image(image, 16, 1 << 20).pixels[None].to(self.device), rows)

        return mask

    def _plain_excel(self, clip: Clip) -> PlainMask:
        encode = TextEncoder(clip.text, clip.tokenizer).encode
        rows = class_embeddings(self.classes, self.classes.templates, encode)
        sentences, config = load_attributes("", self.classes), self.config(FP32)
        assert isinstance(config, ExcelConfig)
        bank = attribute_bank(
            sentences, self.classes, self.classes.templates[0], encode, config.excel.clusters
        )
        texts = torch.cat([plain_excel.enriched(rows.foreground, bank.T), rows.background])
        method = PlainExcel(clip.vision, texts.to(self.device))

        def mask(image: NDArray[np.uint8], rows: list[int]) -> NDArray[np.uint8]:
            square = method.square(image)
            scores = method.scores(square, rows, (image.shape[0], image.shape[1]))
            started = time.perf_counter()
            after = plain_excel.refined(square, scores).cpu()
            self.seconds[PLAIN_PAR] += time.perf_counter() - started
            self.after_par.append((square, scores, after))
            return plain_excel.labels(after, rows)

        return mask

    def plain(self, ids: list[str]) -> None:
        started = time.perf_counter()
        for image_id in ids:
            image = read_image(self.images[image_id])
            rows = [self.classes.index(name) - 1 for name in self.labels[image_id]]
            self.masks.setdefault(PLAIN, {})[image_id] = self.plain_mask(image, rows)
        self.seconds[PLAIN] += time.perf_counter() - started

    def par(self) -> None:
        """Our PAR on what the plain way had since the last time, an image in each thread."""

        def ours(image: Tensor, scores: Tensor) -> Tensor:
            return propagate(image[None].to(self.device), scores[None].to(self.device), ParConfig()).cpu()[0]

        started = time.perf_counter()
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(ours, *zip(*[case[:2] for case in self.after_par], strict=True)))
        self.seconds[PAR] += time.perf_counter() - started
        for after, (_, _, expected) in zip(found, self.after_par, strict=True):
            assert (after - expected).abs().max() < 1e-4
        self.after_par.clear()

    def command(self, ids: list[str], precision: str) -> None:
        report = self._generate(ids, precision)
        assert not report.failed
        self.seconds[precision] += report.computing
        self.busy += Counter({f"{precision} {stage}": seconds for stage, seconds in report.busy.items()})
        with MaskCache.open(report.path) as cache:
            self.masks.setdefault(precision, {}).update({image_id: cache[image_id].mask for image_id in ids})

    def _generate(self, ids: list[str], precision: str) -> MaskReport:
        return generate_masks(
            MaskJob(
                images=self.images,
                labels={image_id: self.labels[image_id] for image_id in ids},
                class_set=self.classes,
                config=self.config(precision),
                cache_dir=self.work / f"{precision}-{ids[0]}",
                device=self.device,
                batch_size=1 if self.device == "cpu" else 16,
                workers=self.workers,
                offline=True,
            )
        )

    def equal(self, way: str, other: str) -> float:
        """Share of equal pixels."""
        pairs = [(self.masks[way][key], self.masks[other][key]) for key in self.masks[way]]
        return sum(int((a == b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)


def choose_images(
    folder: Path | None, work: Path, count: int
) -> tuple[dict[str, Path], dict[str, tuple[str, ...]]]:
    """``count`` images and 1 to 4 seeded labels for each."""
    if folder is None:
        write_voc_folder(work / "scenes", seed=8, scenes={"train": count}, size=(500, 375))
        folder = work / "scenes" / "JPEGImages"
    images = dict(list(find_images(folder).items())[:count])
    generator = np.random.default_rng(0)
    names = load_class_set(CLASSES).names
    labels = {}
    for number, image_id in enumerate(images):
        chosen = generator.choice(len(names), 1 + number % 4, replace=False)
        labels[image_id] = tuple(names[index] for index in chosen)
    return images, labels


def check(method: str) -> float:
    """Largest difference of the plain method's refined CAMs to the published ones, of their largest value."""
    if method == "excel":
        return plain_excel.check()["cam_refined"]
    import plain_method

    return plain_method.check()


def compare(options: argparse.Namespace, work: Path) -> None:
    print(f"plain method against the published code: refined CAMs within {check(options.method):.1e}")
    images, labels = choose_images(options.images, work, options.count)
    ways = Ways(
        options.method, images, labels, write_clip(work / "clip"), work, options.device, options.workers
    )
    ids = list(images)
    ways.plain(ids[:1])  # the first calls warm up
    for precision in (FP32, BF16):
        ways.command(ids[:1], precision)
    if ways.after_par:
        ways.par()
    ways.seconds.clear()
    ways.busy.clear()
    for start in range(0, len(ids), options.turn):
        turn = ids[start : start + options.turn]
        ways.plain(turn)
        for precision in (FP32, BF16):
            ways.command([*turn], precision)
        if ways.after_par:
            ways.par()
    at_a_time = f"{options.workers} images at a time"
    print(f"{len(ids)} images, {options.device}, {torch.get_num_threads()} threads, {at_a_time}\n")
    print("| way | s an image | times as fast | pixels as plain | busy |")
    print("| --- | ---: | ---: | ---: | --- |")
    for way in (PLAIN, FP32, BF16):
        busy = ", ".join(
            f"{key.split()[1]} {value / len(ids):.2f} s"
            for key, value in ways.busy.items()
            if key.startswith(way)
        )
        seconds = ways.seconds[way]
        print(
            f"| {way} | {seconds / len(ids):.3f} | {ways.seconds[PLAIN] / seconds:.2f} "
            f"| {100 * ways.equal(way, PLAIN):.3f} % | {busy} |"
        )
    for way in (PLAIN_PAR, PAR) if PAR in ways.seconds else ():
        seconds = ways.seconds[way]
        print(f"| {way} | {seconds / len(ids):.3f} | {ways.seconds[PLAIN_PAR] / seconds:.2f} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--method", choices=("clip-es", "excel"), default="clip-es")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=images_at_a_time(), help="images at a time")
    parser.add_argument(
        "--turn", type=int, default=12, help="images before the next way's turn; more for a GPU"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
