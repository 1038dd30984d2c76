"""What many images cost: time, memory and disk by method and number, and the start of commands on a full cache.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.scale --images 100 1000 10000 [--method clip-es]
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.scale --finished 1000000 [--work DIR]

--images runs the embedded CLIP, or that of ``--clip``, over drawn scenes of 80x64, each number in a process of its
own, for its memory: every method, ``regions`` (``propose-regions`` with a tiny SAM of random weights), ``vote``
(these regions vote), ``slic`` (superpixels do) and ``prompts`` (learned ones). Seconds are those of the processor,
which other work on the machine hardly changes; the second run finds everything finished.

--finished fills a mask set without computing: one record, copied for each of so many images under its own id and
digest, and images that are links to a few files. Then commands are started on it, each in a process of its own. With
--work what was filled stays there, and a later call goes on with it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch

from wsss_pipeline.cache import FinishedImages, open_mask_set
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import escape_id, record_digest, write_record
from wsss_pipeline.cache.shards import ShardBuilder
from wsss_pipeline.cache.writer import IMAGES_PER_SHARD, finish_shard
from wsss_pipeline.clip.learned_prompts import LearnedPrompts, initial_context, text_tower_digest
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_files import file_status
from wsss_pipeline.data.images import image_digest
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.pseudo_masks.job import Job, MaskJob
from wsss_pipeline.pseudo_masks.run import run_share
from wsss_pipeline.stages.propose_regions import ProposeJob

SIZE = (80, 64)
SCENES = 1000  # drawn; further images are links to them, of which a file may have 65,000
PER_FOLDER = 1000
SAM = Path(__file__).parent.parent / "tests/golden/fma/sam_tiny"
METHODS = ("clip-es", "excel", "weclip", "fma", "regions", "vote", "slic", "prompts")


def write_images(root: Path, count: int) -> tuple[Path, Path]:
    """A folder of ``count`` images and a file of their labels; what is there already stays."""
    folder, labels = root / f"images-{count}", root / f"labels-{count}.csv"
    if not labels.is_file():
        drawn = min(count, SCENES)
        scenes = root / f"scenes-{drawn}"
        write_voc_folder(scenes, seed=9, scenes={"train": drawn}, size=SIZE)
        files = sorted((scenes / "JPEGImages").iterdir())
        name = load_class_set("demo").names[0]
        with labels.with_suffix(".tmp").open("w") as file:
            file.write("image,labels\n")
            for number in range(count):
                image = folder / f"{number // PER_FOLDER:05}" / f"{number % PER_FOLDER:03}.jpg"
                if number % PER_FOLDER == 0:
                    image.parent.mkdir(parents=True, exist_ok=True)
                if not image.exists():
                    os.link(files[number % len(files)], image)
                file.write(f"{image.relative_to(folder)},{name}\n")
        labels.with_suffix(".tmp").rename(labels)
    return folder, labels


def fill(folder: Path, images: Path, count: int) -> None:
    """Shards with a record of each image, one and the same mask, and the note that they are sound."""
    manifest = read_manifest(folder)
    kind, class_names = manifest.mask_set.kind, manifest.mask_set.class_names
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[20:40, 20:60] = 1
    content = PseudoMask(mask, np.full(mask.shape, 190, np.uint8), class_names[:1])
    digests = [image_digest(images / f"{name}.jpg") for name in map(_image_id, range(min(count, SCENES)))]
    templates = ShardBuilder(manifest.fingerprint)
    for number, digest in enumerate(digests):
        write_record(templates.images, str(number), content, digest, 0.1, 1.0, kind)
    finished = FinishedImages(folder)
    status = [file_status(images / f"{name}.jpg") for name in map(_image_id, range(len(digests)))]
    for start in range(0, count, IMAGES_PER_SHARD):
        builder, name = (
            ShardBuilder(manifest.fingerprint),
            f"shard-0of1-{1 + start // IMAGES_PER_SHARD:05}.h5",
        )
        for number in range(start, min(count, start + IMAGES_PER_SHARD)):
            image_id, scene = _image_id(number), number % SCENES
            stored = escape_id(image_id).encode()
            h5py.h5o.copy(templates.images.id, b"%d" % scene, builder.images.id, stored)
            digest = record_digest(image_id, kind.parts(content), digests[scene], 1.0)
            attribute = h5py.h5a.open(h5py.h5o.open(builder.images.id, stored), b"record_digest")
            attribute.write(np.array(digest, h5py.string_dtype("utf-8")))
            builder.is_labelled[image_id] = True
            finished.note(image_id, (name, status[scene], content.labels, False))
        finished.note_sound(name, finish_shard(folder, name, builder))
        finished.save()
        builder.close()
    templates.close()


def _image_id(number: int) -> str:
    return f"{number // PER_FOLDER:05}/{number % PER_FOLDER:03}"


def job_of(method: str, count: int, work: Path, clip: str) -> Job:
    """The job of a method, or of regions, over so many drawn scenes, in one thread."""
    images, labels = write_images(work, count)
    settings: dict[str, object] = {"clip.weights": clip, "method": method}
    if method == "regions":
        # the tiny SAM is unsure of most that it sees
        layers = [("benchmark", {"points": [4], "iou_threshold": 0.5, "stability_threshold": 0.3})]
        return replace(ProposeJob.read(str(SAM), images, work / f"regions-{count}", layers=layers), workers=1)
    if method == "prompts":
        settings = {"clip.weights": clip, "prompts": str(write_prompts(work, clip))}
    elif method in ("slic", "vote"):
        settings |= {"method": "clip-es", "refine": "vote", "vote.regions": "slic"}
    elif method == "excel":
        settings["excel.side"] = 128  # of its 320, many of the embedded CLIP's patches
    elif method == "fma":
        settings["vote.regions"] = "slic"
    if method == "vote":
        regions = run_share(job_of("regions", count, work, clip), quiet=True)
        settings["vote.regions"] = str(regions.path)
    job = MaskJob.read(
        settings, images=images, labels=labels, classes="demo", cache=work / f"{method}-{count}"
    )
    return replace(job, workers=1, offline=True)


def write_prompts(work: Path, weights: str) -> Path:
    """Learned prompts that nobody learned: a seeded context."""
    classes = load_class_set("demo")
    clip = load_clip(locate_clip(ClipConfig(weights=weights), offline=True), torch.device("cpu"))
    texts = tuple(entry.texts() for entry in classes.classes)
    context = initial_context((4, clip.text.config.hidden_size), 0.3, "7")
    prompts = LearnedPrompts(
        context, "end", classes.names, texts, classes.background, text_tower_digest(clip)
    )
    prompts.save(work / "prompts.safetensors")
    return work / "prompts.safetensors"


def measure(method: str, count: int, work: Path, clip: str) -> None:
    """Two runs over so many images, and a row about them."""
    job = job_of(method, count, work, clip)
    before = time.process_time()
    first = run_share(job, quiet=True)
    computing, middle = time.process_time() - before, time.process_time()
    again = run_share(job, quiet=True)
    checking = time.process_time() - middle
    assert (first.computed, again.reused) == (count, count), (first.failed, again.failed)
    size = sum(file.stat().st_size for file in first.path.glob("shard-*.h5"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| {method} | {count:,} | {count / computing:.1f} | {memory:.0f} | {size / count:,.0f} "
        f"| {count / checking:,.0f} |",
        flush=True,
    )


def timed(title: str, command: list[str]) -> None:
    """Run a command in a process of its own and print a row: seconds by the clock, of the processor, peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "wsss_pipeline", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert not process.returncode, said
    print(
        f"| {title} | {time.perf_counter() - started:.1f} | {usage.ru_utime + usage.ru_stime:.1f} "
        f"| {usage.ru_maxrss / 1024:.0f} |",
        flush=True,
    )


def finished(count: int, work: Path) -> None:
    """Start commands on a mask set that holds ``count`` images."""
    images, labels = write_images(work, count)
    cache = work / f"cache-{count}"
    # few labels: all that is asked of this job is its mask set
    few = work / "few.csv"
    few.write_text("".join(labels.open().readlines()[:2]))
    job = MaskJob.read(
        {"clip.weights": "demo"}, images=images / "00000", labels=few, classes="demo", cache=cache
    )
    folder = open_mask_set(cache, job.maker().mask_set)
    if not list(folder.glob("known*.json")):
        # in a process of its own: the peak memory of those below is at least this one's
        filling = multiprocessing.get_context("spawn").Process(target=fill, args=(folder, images, count))
        filling.start()
        filling.join()
    ids = work / f"ids-{count}.txt"
    ids.write_text("".join(f"{_image_id(number)}\n" for number in range(0, count, 2)))
    print("| command | s | s of the processor | peak memory, MiB |\n| --- | ---: | ---: | ---: |")
    given = ["--images", str(images), "--labels", str(labels), "--classes", "demo", "--clip", "demo"]
    generate = ["generate-masks", *given, "--cache", str(cache), "--offline"]
    timed("`generate-masks`, and the index is written", generate)
    timed("`generate-masks`", generate)
    timed("`generate-masks --shard 3/64`", [*generate, "--shard", "3/64"])
    for command in ("ls", "status"):
        timed(f"`cache {command}`", ["cache", command, str(cache)])
    train = ["train-seg", "--cache", str(cache), "--images", str(images), "--network", "segformer"]
    train += [
        "--encoder",
        "tiny",
        "--weights",
        "none",
        "--iterations",
        "1",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    timed("`train-seg`, 1 update", [*train, "--crop", "64", "--out", str(work / f"run-{time.time_ns()}")])
    train += ["--leave-out", str(ids), "--crop", "64", "--out", str(work / f"run-{time.time_ns()}")]
    timed("`train-seg --leave-out`, 1 update", train)
    timed(
        "`preview`", ["preview", "--cache", str(cache), "--images", str(images), "--out", str(work / "p.png")]
    )
    html = ["preview", "--cache", str(cache), "--images", str(images), "--html", str(work / "page")]
    timed("`preview --html --limit 12`", [*html, "--limit", "12"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", metavar="N", default=[])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--clip", default="demo", help="of --images")
    parser.add_argument("--finished", type=int, metavar="N")
    parser.add_argument("--work", type=Path, help="folder to work in; kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        if options.images:
            columns = "method | images | images/s | peak memory, MiB | bytes an image | second run, images/s"
            print(f"| {columns} |\n| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for method in options.method if options.images else ():
            for count in sorted(options.images):
                process = multiprocessing.get_context("spawn").Process(
                    target=measure, args=(method, count, work, options.clip)
                )
                process.start()
                process.join()
        if options.finished:
            finished(options.finished, work)


if __name__ == "__main__":
    main()
