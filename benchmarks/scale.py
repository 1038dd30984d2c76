"""What many images cost: time, memory and disk by method and number, and the start of commands on a full cache.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.scale --images 100 1000 10000 [--method clip-es]
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.scale --finished 1000000 [--work DIR]

--images runs the embedded CLIP over drawn scenes of 80x64, each number in a process of its own, for its memory: every
method, ``regions`` (``propose-regions`` with a tiny SAM of random weights), ``vote`` (these regions vote), ``slic``
(superpixels do) and ``prompts`` (learned ones). Seconds are those of the processor, which other work on the machine
hardly changes; the second run finds everything finished.

--finished fills a mask set without computing: one record, copied for each of so many images under its own id and
digest, and images that are links to a few files. Then commands are started on it, each in a process of its own. With
--work what was filled stays there, and a later call goes on with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from wsss_pipeline.cache import open_mask_set
from wsss_pipeline.cache.index import SoundShard, note_checked
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import escape_id, record_digest, write_record
from wsss_pipeline.cache.shards import ShardBuilder
from wsss_pipeline.cache.writer import IMAGES_PER_SHARD, finish_shard
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import image_digest
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.pseudo_masks.job import MaskJob

SIZE = (80, 64)
SCENES = 1000  # drawn; further images are links to them, of which a file may have 65,000
PER_FOLDER = 1000
MIB = 2**20
METHODS = ("clip-es", "excel", "weclip", "fma", "regions", "vote", "slic", "prompts")


def write_images(root: Path, count: int) -> tuple[Path, Path]:
    """A folder of ``count`` images and a file of their labels; what is there already stays."""
    folder, labels = root / f"images-{count}", root / f"labels-{count}.csv"
    if not labels.is_file():
        scenes = root / "scenes"
        write_voc_folder(scenes, seed=9, scenes={"train": min(count, SCENES)}, size=SIZE)
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
    checked: dict[str, SoundShard] = {}
    for start in range(0, count, IMAGES_PER_SHARD):
        builder = ShardBuilder(manifest.fingerprint)
        for number in range(start, min(count, start + IMAGES_PER_SHARD)):
            image_id, scene = _image_id(number), number % SCENES
            stored = escape_id(image_id).encode()
            h5py.h5o.copy(templates.images.id, b"%d" % scene, builder.images.id, stored)
            digest = record_digest(image_id, kind.parts(content), digests[scene], 1.0)
            attribute = h5py.h5a.open(h5py.h5o.open(builder.images.id, stored), b"record_digest")
            attribute.write(np.array(digest, h5py.string_dtype("utf-8")))
            builder.is_labelled[image_id] = True
        name = f"shard-0of1-{1 + start // IMAGES_PER_SHARD:05}.h5"
        checked[name] = finish_shard(folder, name, builder)
        builder.close()
    templates.close()
    note_checked(folder, 0, 1, checked)


def _image_id(number: int) -> str:
    return f"{number // PER_FOLDER:05}/{number % PER_FOLDER:03}"


def timed(command: list[str]) -> None:
    """Run a command in a process of its own and print a row: seconds by the clock, of the processor, peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "wsss_pipeline", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    shown = " ".join(part for part in command if "/" not in part)
    print(
        f"| `{shown}` | {time.perf_counter() - started:.1f} | {usage.ru_utime + usage.ru_stime:.1f} "
        f"| {usage.ru_maxrss / 1024:.0f} | {process.returncode} {said[-1] if process.returncode else ''} |",
        flush=True,
    )


def finished(count: int, work: Path) -> None:
    """Start commands on a mask set that holds ``count`` images."""
    images, labels = write_images(work, count)
    cache = work / f"cache-{count}"
    job = MaskJob.read({"clip.weights": "demo"}, images=images, labels=labels, classes="demo", cache=cache)
    folder = open_mask_set(cache, job.maker().mask_set)
    if not list(folder.glob("checked*.json")):
        fill(folder, images, count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", metavar="N", default=[])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--finished", type=int, metavar="N")
    parser.add_argument("--work", type=Path, help="folder to work in; kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        if options.finished:
            finished(options.finished, work)


if __name__ == "__main__":
    main()
