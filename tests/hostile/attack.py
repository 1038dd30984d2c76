"""Strangers' files and bad neighbours, many times over: ``python -m tests.hostile.attack``, or ``make attack``.

Campaigns: mutated shards of masks, of masks of 16 bits and of regions, manifests, lists of what was checked,
checkpoints, learned prompts, masks of 16 bits in files and tar archives; train-seg killed at
random updates; gc, merge, verify, export and training on one mask set at once. Each attempt has to end soon, with a
right result or an error of the package's own. Prints a table; exit code 1 where something did not hold.

    python -m tests.hostile.attack --share 1.0 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

from tests import forks
from wsss_pipeline.cache import (
    FinishedImages,
    MaskCache,
    MaskSet,
    MaskWriter,
    PseudoMask,
    open_mask_set,
    verify,
)
from wsss_pipeline.cache import inspection as inspection_module
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import MaskRecords, RecordKind
from wsss_pipeline.cache.shards import UnreadableShardError
from wsss_pipeline.clip.learned_prompts import LearnedPrompts
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import CheckpointError, ImageError, WsssError
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.regions.store import RegionRecords, StoredRegions
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds an attempt may take
LONGEST_MESSAGE = 3000
CLASSES = ("cat", "dog")
WIDE = (*CLASSES, *(f"class {number}" for number in range(3, 301)))  # too many for 8 bits
COLUMNS = ("no effect", "damage noticed", "refused", "ended by the limit", "did not hold")


@dataclass
class Table:
    """Outcomes by kind of attempt."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, kind: str) -> Iterator[list[str]]:
        """Counts what the block appends as its outcome; an error of the package's own is a refusal."""
        outcome = ["no effect"]
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            yield outcome
        except WsssError as error:
            is_line = str(error).isprintable() and len(str(error)) < LONGEST_MESSAGE
            outcome.append("refused" if is_line else f"message: {str(error)!r:.200}")
        except Exception as error:
            outcome.append(f"{type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.count(kind, outcome[-1])

    def count(self, kind: str, outcome: str, times: int = 1) -> None:
        """An outcome that is no column is a fault."""
        if outcome not in COLUMNS:
            self.faults.append(f"{kind}: {outcome}")
            outcome = COLUMNS[-1]
        self.rows.setdefault(kind, Counter())[outcome] += times

    def lines(self) -> list[str]:
        """As Markdown."""
        rows = [f"| what | tried | {' | '.join(COLUMNS)} |", "| --- " + "| ---: " * (len(COLUMNS) + 1) + "|"]
        for kind, outcomes in self.rows.items():
            counts = " | ".join(f"{outcomes[column]:,}" for column in COLUMNS)
            rows.append(f"| {kind} | {outcomes.total():,} | {counts} |")
        return rows


def make_mask(number: int, size: tuple[int, int] = (12, 16)) -> PseudoMask:
    """Always the same for a number."""
    rng = np.random.default_rng(number)
    labels = CLASSES[: number % 3]
    mask = rng.integers(0, 1 + len(labels), size).astype(np.uint8)
    return PseudoMask(mask, rng.integers(0, 201, size).astype(np.uint8), labels)


def make_wide_mask(number: int, size: tuple[int, int] = (12, 16)) -> PseudoMask:
    """One of 16 bits."""
    sound = make_mask(number, size)
    mask = np.where(sound.mask == 1, 299, sound.mask).astype(np.uint16)
    labels = tuple(WIDE[value - 1] for value in np.unique(mask) if value)
    return PseudoMask(mask, sound.confidence, labels)


def make_regions(number: int, size: tuple[int, int] = (12, 16)) -> Regions:
    rng, count = np.random.default_rng(number), 1 + number % 5
    scores = {"iou": rng.random(count), "stability": rng.random(count), "points": rng.random((count, 2)) * 12}
    return Regions.of_masks(rng.random((count, *size)) < 0.5, rng.integers(0, 3, count), **scores)


def write_masks(
    folder: Path, ids: list[str], masks: Callable[[str], Any], size: int = 1000, digest: str = "0" * 64
) -> None:
    with MaskWriter(folder, images_per_shard=size) as writer:
        for image_id in ids:
            writer.write(image_id, masks(image_id), image_digest=digest, seconds=0.0)
        writer.finish(ids)


# shards ------------------------------------------------------------------------------------------------------------


def regions(shard: Path) -> dict[str, list[tuple[int, int]]]:
    """Ranges of bytes by what lies in them."""
    content = shard.read_bytes()
    start = content.find(b"GCOL")
    heap = (start, start + int.from_bytes(content[start + 8 : start + 16], "little"))
    with h5py.File(shard) as file:
        datasets = [dataset for record in file["images"].values() for dataset in record.values()]
        chunks = [dataset.id.get_chunk_info(0) for dataset in datasets if dataset.chunks and dataset.size]
        plain = [dataset for dataset in datasets if not dataset.chunks and dataset.id.get_offset()]
        pixels = [(chunk.byte_offset, chunk.byte_offset + chunk.size) for chunk in chunks]
        pixels += [(d.id.get_offset(), d.id.get_offset() + d.id.get_storage_size()) for d in plain]
    taken = sorted([(0, 48), heap, *pixels])
    gaps = [(a, b) for (_, a), (b, _) in zip(taken, [*taken[1:], (len(content), 0)], strict=True) if a < b]
    return {"superblock": [(0, 48)], "heap of texts": [heap], "pixels": pixels, "groups and headers": gaps}


def mutated(content: bytes, place: int, chance: random.Random) -> bytes:
    """The same with something wrong at a place."""
    changed, kind = bytearray(content), chance.randrange(7)
    if kind == 0:
        changed[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        changed[place : place + 8] = chance.randbytes(8)
    elif kind == 2:
        sector = place // 512 * 512
        changed[sector : sector + 512] = bytes(min(512, len(content) - sector))
    elif kind == 3:
        changed[place : place + 8] = bytes(8)
    elif kind == 4:
        changed[place : place + 8] = b"\xff" * 8
    elif kind == 5:
        other = chance.randrange(len(content))
        changed[place : place + 64] = content[other : other + 64]
    else:
        return content[:place]
    return bytes(changed)


def attack_shards(table: Table, root: Path, times: int, chance: random.Random) -> None:
    attack_records(table, root, times, chance, "shard", MaskRecords(CLASSES), make_mask)


def attack_wide_shards(table: Table, root: Path, times: int, chance: random.Random) -> None:
    attack_records(table, root, times, chance, "shard of 16 bits", MaskRecords(WIDE), make_wide_mask)


def attack_regions(table: Table, root: Path, times: int, chance: random.Random) -> None:
    attack_records(table, root, times, chance, "shard of regions", RegionRecords(), make_regions)


def attack_records(
    table: Table,
    root: Path,
    times: int,
    chance: random.Random,
    what: str,
    kind: RecordKind[Any],
    make: Callable[[int], Any],
) -> None:
    """Shards whose records are of a kind."""
    mask_set = MaskSet(name="x", determinants={"a": 1}, class_names=kind.class_names, holds=kind.holds)
    folder = open_mask_set(root, mask_set)
    ids = [str(number) for number in range(20)]
    write_masks(folder, ids, lambda image_id: make(int(image_id)))
    (shard,) = folder.glob("shard-*.h5")
    fingerprint, content = read_manifest(folder).fingerprint, shard.read_bytes()
    expected = {i: info.digest for i, info in inspect(shard, fingerprint, kind, "records").infos.items()}
    places = regions(shard)
    for number in range(times):
        region = list(places)[number % len(places)]
        place = chance.randrange(*chance.choice(places[region]))
        shard.write_bytes(mutated(content, place, chance))
        with table.attempt(f"{what}, {region}") as outcome:
            try:
                found = inspect(shard, fingerprint, kind, "records")
            except UnreadableShardError as error:
                outcome.append("ended by the limit" if "took over" in str(error) else "refused")
                continue
            digests = {image_id: info.digest for image_id, info in found.infos.items()}
            if not digests.items() <= expected.items():
                outcome.append("a damaged record passed for a sound one")
            elif digests != expected:
                outcome.append("damage noticed")
            if number % 20 == 0:  # and what any command does with it
                with (MaskCache if kind.holds == "masks" else StoredRegions).open(folder) as cache:
                    for image_id in found.infos:
                        read, sound = kind.parts(cache.read(image_id)), kind.parts(make(int(image_id)))
                        if not all(
                            np.array_equal(read.arrays[name], sound.arrays[name]) for name in sound.arrays
                        ):
                            outcome.append("another record was read")
    shard.write_bytes(content)


# JSON --------------------------------------------------------------------------------------------------------------


ANYTHING = (
    *(None, True, False, 0, -1, 1.5, 2**70, "", "..", "a\0b", "\x1b]0;x\x07", "\u202e", "x" * 3000),
    *(
        [],
        {},
        [[]],
        {"a": None},
        float("nan"),
        float("inf"),
        ["cat"] * 1000,
        "../../etc/passwd",
        "tu-hf_hub:a/b",
    ),
)


def replaced(value: Any, chance: random.Random) -> Any:
    """``value`` with something else for one of its parts, or for all of it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        rest = {other: part for other, part in value.items() if other != key}
        return rest if chance.random() < 0.15 else {**rest, key: replaced(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], replaced(value[place], chance), *value[place + 1 :]]
    return chance.choice(ANYTHING)


def damaged_json(value: Any, chance: random.Random) -> bytes:
    text = json.dumps(value).encode()
    kind = chance.randrange(8)
    if kind == 0:
        return mutated(text, chance.randrange(len(text)), chance)
    if kind == 1:
        return b"[" * 100_000 + text
    for _ in range(chance.randint(1, 3)):
        value = replaced(value, chance)
    return json.dumps(value).encode()


def attack_manifests(table: Table, root: Path, times: int, chance: random.Random) -> None:
    determinants = {"classes": [{"name": "cat"}, {"name": "dog"}], "crf": {"iterations": 10}}
    mask_set = MaskSet(
        name="x", determinants=determinants, class_names=CLASSES, category_ids={"cat": 17, "dog": 18}
    )
    folder = open_mask_set(root, mask_set)
    write_masks(folder, ["1", "2"], lambda image_id: make_mask(int(image_id)))
    sound = read_manifest(folder)
    content = {name: (folder / name).read_bytes() for name in ("manifest.json", "checked.json")}
    for name, kind in (("manifest.json", "manifest"), ("checked.json", "list of checked shards")):
        for _ in range(times):
            (folder / name).write_bytes(damaged_json(json.loads(content[name]), chance))
            with table.attempt(kind) as outcome:
                found = read_manifest(folder)
                meaning = (found.fingerprint, found.mask_set.determinants, found.mask_set.class_names)
                if meaning != (sound.fingerprint, determinants, CLASSES):
                    outcome.append("it means something else")
                finished = FinishedImages(folder)
                if finished.record("1") is None and name == "manifest.json":
                    outcome.append("a sound mask isn't found")
        (folder / name).write_bytes(content[name])


# checkpoints and archives ------------------------------------------------------------------------------------------


def attack_checkpoints(table: Table, root: Path, times: int, chance: random.Random) -> None:
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    folder = root / "last"
    save_network(build_network(config, 3), folder, config, CLASSES, {"step": 7})
    content = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    header = 8 + int.from_bytes(content["model.safetensors"][:8], "little")
    for number in range(times):
        name = list(content)[number % 2]
        if name == "config.json":
            changed = damaged_json(json.loads(content[name]), chance)
        else:
            changed = mutated(content[name], chance.randrange(header), chance)
        (folder / name).write_bytes(changed)
        with table.attempt(f"checkpoint, {name}") as outcome:
            try:
                found = load_network(folder)
            except CheckpointError as error:
                outcome.append("refused" if str(error).isprintable() else f"message: {str(error)!r:.200}")
            else:
                if len(found.class_names) != 2 or not all(map(str.isprintable, found.class_names)):
                    outcome.append(f"classes {found.class_names}")
        (folder / name).write_bytes(content[name])


def attack_prompts(table: Table, root: Path, times: int, chance: random.Random) -> None:
    texts, file = ((("cat",), ("dog", "hound")), root / "prompts.safetensors")
    LearnedPrompts(torch.randn(4, 8), "end", CLASSES, texts, ("", "sky"), "0" * 64).save(file)
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    described = json.loads(content[8:header])
    for number in range(times):
        if number % 2:
            changed = mutated(content, chance.randrange(header), chance)
        else:
            wrong = damaged_json(described, chance)
            changed = len(wrong).to_bytes(8, "little") + wrong + content[header:]
        file.write_bytes(changed)
        with table.attempt("learned prompts") as outcome:
            found = LearnedPrompts.load(file)
            if found.class_names != CLASSES or not torch.isfinite(found.context).all():
                outcome.append("damage noticed" if all(map(str.isprintable, found.class_names)) else "names")


def attack_targets(table: Table, root: Path, times: int, chance: random.Random) -> None:
    """Files of 16 bits that a network is trained on."""
    sound, file = make_wide_mask(7).mask, root / "a.png"
    Image.fromarray(sound).save(file)
    content = file.read_bytes()
    for _ in range(times):
        file.write_bytes(mutated(content, chance.randrange(len(content)), chance))
        with table.attempt("masks of 16 bits") as outcome:
            found = MaskFolder(root, WIDE)["a"].mask
            if found.dtype != np.uint16:
                outcome.append(f"a mask of {found.dtype}")
            elif not np.array_equal(found, sound):
                outcome.append("damage noticed" if found.shape != sound.shape else "another mask was read")


def attack_archives(table: Table, root: Path, times: int, chance: random.Random) -> None:
    sound, headers = io.BytesIO(), list[int]()
    with tarfile.open(fileobj=sound, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(6):
            picture = io.BytesIO()
            Image.fromarray(np.full((6, 8, 3), number, np.uint8)).save(picture, "PNG")
            long = "x" * 120 if number == 3 else "x"
            for suffix, part in (("png", picture.getvalue()), ("cls", b"cat\n")):
                header = tarfile.TarInfo(f"{long}{number}.{suffix}")
                header.size = len(part)
                headers.append(sound.tell())
                tar.addfile(header, io.BytesIO(part))
    classes, archive = load_class_set("cat,dog"), root / "a.tar"
    for _ in range(times):
        changed = bytearray(sound.getvalue())
        for _ in range(chance.randint(1, 2)):
            start = chance.choice(headers)
            changed[start : start + 512] = damaged_header(bytes(changed[start : start + 512]), chance)
        archive.write_bytes(changed)
        with table.attempt("tar archive") as outcome:
            with contextlib.suppress(ImageError):
                images = find_images(archive)
                for file in images.values():
                    try:
                        read_image(file)
                    except ImageError:
                        outcome.append("damage noticed")
                if images:
                    read_labels(None, images, classes)
                if len(images) < 6:
                    outcome.append("damage noticed")
                continue
            outcome.append("refused")


def damaged_header(header: bytes, chance: random.Random) -> bytes:
    """With a wrong field, and mostly the right checksum."""
    changed = bytearray(header)
    kind = chance.randrange(6)
    if kind == 0:
        changed[124:136] = tarfile.itn(-chance.randrange(1, 2**20), 12, tarfile.GNU_FORMAT)
    elif kind == 1:
        changed[124:136] = tarfile.itn(chance.choice([2**33, 2**62, 513, 7]), 12, tarfile.GNU_FORMAT)
    elif kind == 2:
        changed[156:157] = chance.choice(b"123456SLKxgX\0").to_bytes(1, "little")
    elif kind == 3:
        changed[chance.randrange(512)] = chance.randrange(256)
    elif kind == 4:
        changed[:100] = chance.choice([b"../../x.png", b"/etc/x.png", b"x0.png", b"\xff\x1b.png"]).ljust(
            100, b"\0"
        )
    else:
        changed[:] = chance.randbytes(512)
    if chance.random() < 0.8:
        changed[148:156] = b" " * 8
        changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


# processes ---------------------------------------------------------------------------------------------------------


def kill_trainings(table: Table, times: int, seed: int) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults.kills",
            "--kills",
            str(times),
            "--seed",
            str(seed),
            "--only",
            "train-seg",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = "no effect" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    table.count("train-seg, kill -9, bit-equal end", outcome, times)


def wsss(*arguments: object) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "output"
        child = forks.start("wsss_pipeline", [*map(str, arguments)], (output, output))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), output.read_text("utf-8", errors="replace")


def work_together(table: Table, root: Path, seconds: float) -> None:
    """gc, merge, writers, verify, export and training on one mask set, until the time is over; once at least."""
    write_voc_folder(root, seed=1, scenes={"train": 24}, size=(64, 48))
    truth = root / "SegmentationClass"
    names = load_class_set("demo").names
    mask_set = MaskSet(name="demo", determinants={"a": 1}, class_names=names)
    folder, other = open_mask_set(root / "cache", mask_set), open_mask_set(root / "other", mask_set)
    ids = sorted(path.stem for path in truth.iterdir())

    def mask_of(image_id: str) -> PseudoMask:
        mask = read_mask(truth / f"{image_id}.png")
        mask[mask == 255] = 0
        return PseudoMask(mask, np.full_like(mask, 200))

    write_masks(folder, ids, mask_of, 2)
    write_masks(other, ids[:6], mask_of, 2)
    until, started, over = time.monotonic() + seconds, time.monotonic(), root / "over"
    neighbours = {}
    for name in ("gc", "merge", "write"):
        output = root / f"{name}.txt"
        words = ["--neighbour", name, str(folder), str(other), str(over)]
        neighbours[forks.start("tests.hostile.attack", words, (output, output))] = output
    train = ["train-seg", "--cache", folder, "--images", root / "JPEGImages", "--network", "segformer"]
    train += ["--encoder", "tiny", "--weights", "none", "--crop", 48, "--batch-size", 2]
    train += ["--iterations", 150 if seconds > 30 else 30]
    train += ["--workers", 1, "--device", "cpu", "--precision", "fp32", "--set", "save_every=100"]
    number = 0
    while number == 0 or time.monotonic() < until:
        number += 1
        out = root / f"run-{number}"
        code, said = wsss(*train, "--out", out)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if code == 0 else []
        sound = code == 0 and not sum(line["damaged"] for line in log)
        table.count("training beside gc and merge", "no effect" if sound else said[-500:] or "samples lost")
        code, said = wsss("export-masks", "--cache", folder, "--out", root / f"export-{number}")
        written = len(list((root / f"export-{number}").glob("*.png")))
        sound = code == 0 and written == len(ids)
        table.count("export beside gc and merge", "no effect" if sound else f"{written} masks: {said[-500:]}")
        report = verify(folder)
        table.count(
            "verify beside gc and merge",
            "no effect" if report.ok and report.sound == len(ids) else str(report),
        )
    over.touch()
    for process, output in neighbours.items():
        os.waitpid(process, 0)
        lines = output.read_text().splitlines()
        kind, rounds, fault = lines[-1].split(" ", 2) if lines else ("a neighbour", "1", "it died")
        table.count(f"{kind} beside the others", "no effect" if fault == "-" else fault, int(rounds))
    with MaskCache.open(folder) as cache:
        same = all(np.array_equal(cache[image_id].mask, mask_of(image_id).mask) for image_id in ids)
    table.count(
        f"all masks after {time.monotonic() - started:.0f} s of that",
        "no effect" if same else "masks are others",
    )


def be_a_neighbour(kind: str, folder: Path, other: Path, over: Path) -> None:
    """One that works on a mask set beside others until ``over`` is there; prints how often, and what went wrong."""
    from wsss_pipeline.cache import gc, merge
    from wsss_pipeline.errors import CacheLockedError

    chance, parent, rounds, fault = random.Random(kind), os.getppid(), 0, "-"
    while not over.exists() and os.getppid() == parent and fault == "-":
        try:
            if kind == "gc":
                gc(folder)
            else:
                with MaskCache.open(folder) as cache:
                    ids = chance.sample(list(cache), 4)
                    masks = {image_id: cache[image_id] for image_id in ids}
                # as of another image file each time, or the records would be there already
                place = folder if kind == "write" else other
                write_masks(place, ids, masks.__getitem__, 2, chance.randbytes(32).hex())
                if kind == "merge":
                    merge([other], folder)
            rounds += 1
        except CacheLockedError:
            pass
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".replace("\n", " ")
        time.sleep(chance.uniform(0, 0.3))
    print(kind, max(1, rounds), fault)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of attempts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neighbour", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("wsss_pipeline").addHandler(logging.NullHandler())
    logging.getLogger("wsss_pipeline").propagate = False
    if options.neighbour:
        kind, *places = options.neighbour
        be_a_neighbour(kind, *map(Path, places))
        return 0

    forks.import_all()

    def over(*_: object) -> None:
        raise TimeoutError(f"it took over {PATIENCE:.0f} s")

    signal.signal(signal.SIGALRM, over)
    inspection_module.SECONDS = 0.5
    table, chance = Table(), random.Random(options.seed)

    def times(number: int) -> int:
        return round(number * options.share)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number, (campaign, count) in enumerate(
            (
                (attack_shards, times(10_000)),
                (attack_wide_shards, times(2_000)),
                (attack_regions, times(4_000)),
                (attack_manifests, times(2_000)),
                (attack_checkpoints, times(1_000)),
                (attack_prompts, times(2_000)),
                (attack_targets, times(2_000)),
                (attack_archives, times(2_000)),
            )
        ):
            (root / str(number)).mkdir()
            campaign(table, root / str(number), count, chance)
            print(campaign.__name__, "ended", file=sys.stderr, flush=True)
        if times(100):
            kill_trainings(table, times(100), options.seed)
        print("kill_trainings ended", file=sys.stderr, flush=True)
        work_together(table, root / "together", 180 * options.share)
        shutil.rmtree(root / "together")
    print("\n".join(table.lines()))
    for fault in dict.fromkeys(table.faults):
        print(fault, file=sys.stderr)
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
