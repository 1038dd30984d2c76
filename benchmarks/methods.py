"""Speed and memory of every method against the published way of working, in one table.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.methods [--only TEXT] [--device cuda] [--repeats 2] [--count 2]

CLIP ViT-B/16 of seeded weights, drawn images: speed doesn't depend on what they mean. *plain* computes as published
(``plain_method.py``, ``plain_excel.py``, ``plain_fma.py``, ``plain_online.py``, ``weakclip.py``), in float32; *fp32*
and *bf16* are what the commands do, without reading and writing. Stage one: an image of 500x375 with 1 to 4 labels;
``--count`` of them a turn, of ours as many at a time as there are cores (on a GPU all in one batch). Regions of fma
are there beforehand. Training steps: up to the gradients, 4 crops of 320x320; of weakclip a crop of 512x512 with the
update, and an image's masks out of ``--scales`` of its six scales, each mirrored too.

The ways take turns. Seconds: the median and the range of ``--repeats`` turns after a first one, in which memory is
measured: by how much the process grew beyond its weights (on a GPU what torch allocated). ``--clock cpu`` counts the
CPU's seconds of all cores instead, for a machine that is busy with other work. *as plain*: share of equal pixels, or
how far the losses lie apart. *where*: what of fp32's seconds goes where. Rows are printed as they are done;
``--only`` does those whose name holds the text.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import online, plain_excel, plain_online, weakclip
from benchmarks.plain_fma import PlainFma
from benchmarks.plain_method import PlainMethod
from benchmarks.seeded_clip import write_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, prepare_image
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.runtime.device import images_at_a_time, single_threaded_torch

PLAIN, FP32, BF16 = "plain", "fp32", "bf16"
CLASSES = load_class_set("voc12")
Pixels = NDArray[np.uint8]
Shares = dict[str, float]  # seconds by part
# a turn: its seconds by part, and the masks or the loss that came out
Way = Callable[[], tuple[Shares, list[Pixels] | float]]


@dataclass
class Given:
    """What all methods work on.

    Attributes:
        images: uint8 (H, W, 3) RGB.
        labels: of each image, mask values 1..C.
        side: of the crops that are trained on, pixels; WeakCLIP's are larger by 8 / 5.
        scales: how many of WeakCLIP's a relabelled image is looked at in.
    """

    clip: Clip
    device: str
    images: list[Pixels]
    labels: list[list[int]]
    side: int
    batch: int
    scales: int


@dataclass
class Turn:
    """What a turn took."""

    seconds: float
    memory: float  # MiB
    parts: Shares
    outcome: list[Pixels] | float


def stage_one(method: str, given: Given) -> dict[str, Way]:
    """Masks of all images."""
    flags = {"clip.weights": "demo"}
    flags |= {"excel.attributes": "none"} if method == "excel" else {}
    flags |= {"vote.regions": "slic"} if method == "fma" else {}
    found: dict[int, Regions] = {}

    def ours(precision: str) -> Way:
        config = load_mask_config(f"{method}/voc12", flags={**flags, "clip.precision": precision})
        generator = MaskGenerator(config=config, device=given.device, offline=True)
        vision = given.clip.vision if precision == FP32 else deepcopy(given.clip.vision)
        vars(generator)["loaded_clip"] = replace(given.clip, vision=vision)
        generator.load()
        if method == "fma":
            refiner: Any = generator.refiner
            for number, image in enumerate(given.images):
                found.setdefault(number, refiner.source(str(number), image))
            refiner.source = lambda image_id, _: found[int(image_id)]

        def masks(numbers: list[int]) -> list[tuple[Any, float, float]]:
            labelled = [
                generator.prepare(
                    given.images[number],
                    [CLASSES.names[value - 1] for value in given.labels[number]],
                    str(number),
                )
                for number in numbers
            ]
            return [one.wait() for one in generator.generate(labelled, with_cams=False)]

        def run() -> tuple[Shares, list[Pixels] | float]:
            numbers = list(range(len(given.images)))
            if generator.in_threads:
                with single_threaded_torch(), ThreadPoolExecutor(images_at_a_time()) as pool:
                    several = [one for (one,) in pool.map(masks, [[number] for number in numbers])]
            else:
                several = masks(numbers)
            parts = {"CLIP, CAM, affinity": sum(clip for _, clip, _ in several)}
            parts[{"clip-es": "CRF", "fma": "vote"}.get(method, "PAR")] = sum(after for *_, after in several)
            return parts, [mask.mask for mask, *_ in several]

        return run

    fast = {precision: ours(precision) for precision in (FP32, BF16)}
    one = plain_masks(method, given, found)

    def plain() -> tuple[Shares, list[Pixels] | float]:
        return {}, [one(number) for number in range(len(given.images))]

    return {PLAIN: plain, **fast}


def plain_masks(method: str, given: Given, regions: dict[int, Regions]) -> Callable[[int], Pixels]:
    """Number of an image to its mask, as published."""
    clip = given.clip
    encode = TextEncoder(clip.text, clip.tokenizer).encode
    rows = class_embeddings(CLASSES, CLASSES.templates, encode)
    texts = rows.foreground.to(given.device), rows.background.to(given.device)
    from_0 = [[value - 1 for value in values] for values in given.labels]
    masks = {number: (one.masks(), one.levels) for number, one in regions.items()}

    def seen(number: int, statistics: Any = None) -> Tensor:
        patch = int(clip.vision.config.patch_size)
        prepared = prepare_image(given.images[number], patch, 1 << 20, statistics or clip.statistics)
        return prepared.pixels[None].to(given.device)

    if method == "clip-es":
        by_gradients = PlainMethod(clip.vision, *texts, clip.logit_scale)
        return lambda number: by_gradients.mask(given.images[number], seen(number), from_0[number])
    if method == "excel":
        by_texts = plain_excel.PlainExcel(clip.vision, torch.cat(texts))
        return lambda number: by_texts.mask(given.images[number], from_0[number])
    if method == "fma":
        by_vote = PlainFma(clip.vision, *texts, clip.logit_scale)
        return lambda number: by_vote.mask(seen(number), from_0[number], *masks[number])
    weclip = plain_online.WeclipStep(
        clip.vision, torch.cat(texts), len(CLASSES.names), cast(Any, None), math.log(clip.logit_scale)
    )

    def mask(number: int) -> Pixels:
        pixels = seen(number, IMAGENET_STATISTICS)
        size = given.images[number].shape[:2]
        encoding = weclip.encode(pixels)
        grid = plain_online.grid_of(clip.vision, pixels)
        maps, last = weclip.cams(encoding.features[-1][0], from_0[number], grid)
        spread = weclip.refine(maps, torch.stack([*(own[0] for own in encoding.attentions), last]), None)
        scores = plain_excel.assemble([cam.cpu().numpy() for cam in spread], (size[0], size[1]))
        image = torch.from_numpy(given.images[number]).permute(2, 0, 1).float().to(given.device) / 255
        return plain_excel.labels(plain_excel.refined(image, scores), from_0[number])

    return mask


def online_step(method: str, phase: str, given: Given) -> dict[str, Way]:
    """A training step on masks that are made in it."""
    wanted = online.setting(method, phase, given.batch, given.device, given.clip.vision, given.side)
    return {
        name: cast(Way, way(wanted))
        for name, way in zip((PLAIN, FP32, BF16), online.WAYS.values(), strict=True)
    }


def weakclip_part(part: str, given: Given) -> dict[str, Way]:
    """A training step of WeakCLIP, or an image's masks."""
    arguments = argparse.Namespace(
        device=given.device,
        batch=1,
        crop=given.side * 8 // 5 // 32 * 32,
        classes=20,
        scales=given.scales,
        precision=BF16,
        pixels=given.images[0],
    )
    ways = getattr(weakclip, part)(arguments, given.clip)

    def way(run: Callable[[], Any]) -> Way:
        def once() -> tuple[Shares, list[Pixels] | float]:
            found = run()
            return {}, found if part == "step" else [found.mask]

        return once

    return {name: way(run) for name, run in zip((PLAIN, FP32, BF16), ways.values(), strict=False)}


ROWS: dict[str, Callable[[Given], dict[str, Way]]] = {
    **{
        f"{method}, stage one": partial(stage_one, method) for method in ("clip-es", "excel", "weclip", "fma")
    },
    **{
        f"{method}, {phase} step": partial(online_step, method, phase)
        for method, phase in (
            ("weclip", online.EARLY),
            ("weclip", online.LATE),
            ("excel", online.EARLY),
            ("excel", online.LATE),
            ("weclip-plus", online.EARLY),
        )
    },
    "weakclip, step": partial(weakclip_part, "step"),
    "weakclip, relabelled image": partial(weakclip_part, "image"),
}


def resident(field: str) -> float:
    """A figure of /proc/self/status, MiB; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def turn(way: Way, device: str, clock: Callable[[], float], *, with_memory: bool) -> Turn:
    """One turn of a way; ``memory`` is 0 where it isn't asked for."""
    before = 0.0
    if with_memory and device == "cpu" and resident("VmHWM"):
        ctypes.CDLL(None).malloc_trim(0)  # what others have freed goes back, so that growth shows
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak is that from now on
        before = resident("VmRSS")
    elif with_memory and device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    started = clock()
    parts, outcome = way()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds, memory = clock() - started, 0.0
    if with_memory:
        peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        memory = peak - before
    return Turn(seconds, memory, parts, outcome)


def alike(found: list[Pixels] | float, plain: list[Pixels] | float) -> str:
    """How far an outcome is that of the plain way."""
    if isinstance(found, list) and isinstance(plain, list):
        equal = sum(int((one == other).sum()) for one, other in zip(found, plain, strict=True))
        return f"{100 * equal / sum(mask.size for mask in plain):.2f} %"
    return f"{abs(float(cast(float, found)) / float(cast(float, plain)) - 1):.0e}"


def row(name: str, given: Given, repeats: int, clock: Callable[[], float]) -> str:
    """A line of the table."""
    ways = ROWS[name](given)
    first = {way: turn(run, given.device, clock, with_memory=True) for way, run in ways.items()}
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            turns[way].append(turn(run, given.device, clock, with_memory=False))
    count = len(given.images) if name.endswith("stage one") else 1
    seconds = {way: [one.seconds / count for one in several] for way, several in turns.items()}
    medians = {way: statistics.median(several) for way, several in seconds.items()}
    shown = [
        f"{medians[way]:.3f} ({min(several):.3f} to {max(several):.3f})" for way, several in seconds.items()
    ]
    parts = turns[FP32][-1].parts
    whole = sum(parts.values()) or 1.0
    cells = [
        name,
        shown[0],
        *(
            cell
            for way, text in zip((FP32, BF16), shown[1:], strict=True)
            for cell in (text, f"{medians[PLAIN] / medians[way]:.2f}")
        ),
        " / ".join(alike(turns[way][-1].outcome, turns[PLAIN][-1].outcome) for way in (FP32, BF16)),
        " / ".join(f"{first[way].memory:.0f}" for way in (PLAIN, FP32, BF16)),
        ", ".join(f"{part} {100 * taken / whole:.0f} %" for part, taken in parts.items()),
    ]
    return f"| {' | '.join(cells)} |"


def drawn(folder: Path, count: int, size: tuple[int, int]) -> tuple[list[Pixels], list[list[int]]]:
    """Images of a width and a height, and 1 to 4 seeded labels for each."""
    write_voc_folder(folder, seed=8, scenes={"train": count}, size=size)
    images = [read_image(path) for path in find_images(folder / "JPEGImages").values()]
    generator = np.random.default_rng(0)
    labels = [
        1 + generator.choice(len(CLASSES.names), 1 + number % 4, replace=False) for number in range(count)
    ]
    return images, [values.tolist() for values in labels]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=2, help="images of a turn of stage one")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each way after the first one")
    parser.add_argument("--batch", type=int, default=4, help="crops of a training step")
    parser.add_argument("--scales", type=int, default=2, help="of a relabelled image, the smallest ones")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP, in place of ViT-B/16 of seeded weights")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--side", type=int, default=320, help="of crops")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = locate_clip(ClipConfig(weights=str(options.clip or write_clip(work / "clip"))), offline=True)
        given = Given(
            load_clip(source, torch.device(options.device)),
            options.device,
            *drawn(work / "scenes", options.count, tuple(options.size)),
            options.side,
            options.batch,
            options.scales,
        )
        print(f"{options.device}, {torch.get_num_threads()} threads, seconds of the {options.clock} clock\n")
        print("| | plain, s | fp32, s | times | bf16, s | times | as plain | memory, MiB | where |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |", flush=True)
        for name in ROWS:
            if options.only in name:
                print(row(name, given, options.repeats, clock), flush=True)


if __name__ == "__main__":
    main()
