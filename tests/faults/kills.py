"""kill -9 at random moments, over every command that writes for long: ``python -m tests.faults.kills``.

Campaigns: generate-masks with each method in 1 and in 4 processes (``--small``: with the default one in 1, with each
in 2), propose-regions, merge, relabel, learn-prompts, export-masks, preview, compare, a chain, train-seg. In each,
the command is started again and again and killed after a random part of the time that it takes undisturbed. After
each kill what was finished before must still be there, whole and the same; a last run must then end with what an
undisturbed one made. Each run is a fork of this process, which has imported everything: the kills fall into the
work, not into the imports.

    python -m tests.faults.kills --kills 100 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from tests import forks
from wsss_pipeline.methods import DEFAULT_METHOD, method_names

State = Mapping[str, str]  # what is finished, by name, with a digest


@dataclass(frozen=True)
class Campaign:
    """Runs of one command.

    ``commands``: out of the folder to write into, what runs at once. ``state``: of that folder, what is finished.
    ``only_grows``: what was finished stays as it was; else it may be replaced by what comes later. ``result``: name
    of what an undisturbed run makes; campaigns that make the same share that run.
    """

    name: str
    commands: Callable[[Path], list[list[str]]]
    state: Callable[[Path], State]
    only_grows: bool
    result: str


def masks(folder: Path, name: str = "demo") -> State:
    """Of all finished shards of the mask set, which must be sound, image id to digest of all of its record."""
    from wsss_pipeline.cache import MaskCache, verify

    (path,) = folder.glob(f"{name}-*") or [None]
    if path is None or not list(path.glob("shard-*.h5")):
        return {}
    report = verify(path)
    assert report.ok, report
    with MaskCache.open(path) as cache:
        records = {image_id: cache[image_id] for image_id in cache}
    return {
        image_id: hashlib.sha256(
            record.mask.tobytes() + record.confidence.tobytes() + json.dumps(record.labels).encode()
        ).hexdigest()
        for image_id, record in records.items()
    }


def regions(folder: Path) -> State:
    """Of all finished shards, which must be sound, image id to digest of the run lengths."""
    from wsss_pipeline.cache import verify
    from wsss_pipeline.regions.store import StoredRegions

    (path,) = folder.glob("regions-*") or [None]
    if path is None or not list(path.glob("shard-*.h5")):
        return {}
    report = verify(path)
    assert report.ok, report
    with StoredRegions.open(path) as found:
        return {i: hashlib.sha256(found.read(i).counts.tobytes()).hexdigest() for i in found}


def learned(folder: Path, file: str) -> State:
    """Digest of what was learned at the end of training, once it is there."""
    progress = folder / "state" / "progress.json"  # written after the first file
    if not progress.exists() or json.loads(progress.read_text())["step"] < STEPS:
        return {}
    # of the tensors: the file's own description comes in any order
    tensors = sorted(load_file(folder / file).items())
    content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)
    return {file: hashlib.sha256(content).hexdigest()}


NETWORK, PROMPTS = "last/model.safetensors", "prompts.safetensors"


def network(folder: Path) -> State:
    """As ``learned``."""
    return learned(folder, NETWORK)


def files(folder: Path) -> State:
    """Of all files that have got their names, path to digest; pages show the folder that they were made in."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    contents = {path: path.read_bytes().replace(str(folder).encode(), b"") for path in found}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(content).hexdigest()
        for path, content in contents.items()
    }


STEPS = 24
SAM = Path(__file__).parent.parent / "golden" / "fma" / "sam_tiny"


def share(root: Path, method: str, folder: Path, index: int, count: int) -> list[str]:
    """generate-masks of share ``index`` of ``count`` into a folder, on the drawn scenes in ``root / "voc"``."""
    command = ["generate-masks", "--voc", str(root / "voc"), "--split", "train", "--classes", "demo"]
    command += ["--clip", "demo", "--offline", "--workers", "0", "--method", method]
    return [*command, "--cache", str(folder), "--shard", f"{index}/{count}"]


def generating(root: Path, method: str, count: int) -> Campaign:
    """generate-masks in so many processes."""
    return Campaign(
        f"generate-masks with {method}, {count} process{'es' if count > 1 else ''}",
        lambda folder: [share(root, method, folder, index, count) for index in range(count)],
        masks,
        True,
        f"masks of {method}",
    )


def campaigns(root: Path, is_small: bool) -> list[Campaign]:
    """On the drawn scenes in ``root / "voc"``; merge has its sources in ``root / "share-0"`` and ``"share-1"``."""
    voc = root / "voc"
    common = ["--images", str(voc / "JPEGImages"), "--classes", "demo", "--workers", "0", "--device", "cpu"]
    common += ["--crop", "48", "--batch-size", "2", "--iterations", str(STEPS), "--precision", "fp32"]
    common += ["--set", "save_every=3"]
    train = ["train-seg", "--gt-masks", str(voc / "SegmentationClass"), "--network", "segformer"]
    train += ["--encoder", "tiny", "--weights", "none", *common]
    online = ["train-seg", "--online", "weclip", "--labels", str(voc / "Annotations"), *common]
    online += ["--set", f"online.gate_from={STEPS // 2}"]

    propose = ["propose-regions", "--sam", str(SAM), "--images", str(voc / "JPEGImages"), "--device", "cpu"]
    propose += ["--set", "points=[3]", "--set", "iou_threshold=0.5", "--set", "stability_threshold=0.3"]

    sources = [str(root / f"share-{index}") for index in range(2)]
    pictures = ["--images", str(voc / "JPEGImages")]
    learn = ["learn-prompts", "--voc", str(voc), "--split", "train", "--classes", "demo", "--clip", "demo"]
    learn += ["--offline", "--workers", "0", "--iterations", str(STEPS), "--batch-size", "2"]
    learn += ["--set", "augmentation.crop=48", "--set", "save_every=3"]
    relabel = ["relabel", "--checkpoint", str(root / "run"), *pictures, "--labels", str(voc / "Annotations")]
    relabel += ["--device", "cpu"]
    compare = ["compare", sources[0], str(voc / "SegmentationClass"), *pictures, "--report"]
    page = ["preview", "--cache", sources[0], *pictures, "--html"]
    export = ["export-masks", "--cache", sources[0], "--out"]
    chain = root / "chain.yaml"
    chain.write_text(
        "about: Both shares as files.\ninputs: {out: {about: folder}}\nstages:\n"
        f"  merged: cache merge {' '.join(sources)} --into {{out}}/cache\n"
        "  files: export-masks --cache {merged} --out {out}/files\n"
    )

    def both(folder: Path) -> State:
        return {**masks(folder / "cache"), **files(folder / "files")}

    return [
        *(
            generating(root, method, count)
            for method in method_names()
            for count in ((1, 4) if not is_small else (1, 2) if method == DEFAULT_METHOD else (2,))
        ),
        Campaign(
            "propose-regions, 2 processes",
            lambda folder: [[*propose, "--out", str(folder), "--shard", f"{index}/2"] for index in range(2)],
            regions,
            True,
            "regions",
        ),
        Campaign(
            "cache merge",
            lambda folder: [["cache", "merge", *sources, "--into", str(folder)]],
            masks,
            True,
            "merged",
        ),
        Campaign(
            "relabel",
            lambda folder: [[*relabel, "--cache", str(folder)]],
            lambda folder: masks(folder, "relabel"),
            True,
            "relabelled",
        ),
        Campaign(
            "learn-prompts",
            lambda folder: [[*learn, "--out", str(folder)]],
            lambda folder: learned(folder, PROMPTS),
            False,
            "prompts",
        ),
        Campaign("export-masks", lambda folder: [[*export, str(folder)]], files, True, "exported"),
        Campaign("preview --html", lambda folder: [[*page, str(folder)]], files, True, "page"),
        Campaign(
            "compare --report",
            lambda folder: [[*compare, str(folder / "report.html")]],
            files,
            True,
            "report",
        ),
        Campaign("run", lambda folder: [["run", str(chain), f"out={folder}"]], both, True, "chain"),
        Campaign("train-seg", lambda folder: [[*train, "--out", str(folder)]], network, False, "network"),
        Campaign(
            "train-seg --online", lambda folder: [[*online, "--out", str(folder)]], network, False, "online"
        ),
    ]


def prepare(root: Path, images: int) -> None:
    """Draw the scenes; make the sources of merge, of many small shards, and a network."""
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.demo.voc_folder import write_voc_folder
    from wsss_pipeline.segmentation.checkpoint import save_network
    from wsss_pipeline.segmentation.networks import build_network
    from wsss_pipeline.segmentation.train_config import NetworkConfig

    write_voc_folder(root / "voc", seed=4, scenes={"train": images}, size=(64, 48))
    for index in range(2):
        finish([share(root, DEFAULT_METHOD, root / f"share-{index}", index, 2)])
    names = load_class_set("demo").names
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    save_network(build_network(config, 1 + len(names)), root / "run" / "best", config, names)


def start(command: list[str]) -> int:
    """A fork that runs ``wsss`` in a group of its own with its output in a file; its process id."""
    output = Path(os.environ["FAULTS_OUTPUT"])
    return forks.start("wsss_pipeline", command, (output, output), is_group=True)


def finish(commands: list[list[str]]) -> float:
    """Run to the end, all at once; the seconds it took."""
    started = time.monotonic()
    for child in [start(command) for command in commands]:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"exit code {code}: {Path(os.environ['FAULTS_OUTPUT']).read_text()[-2000:]}"
    return time.monotonic() - started


def kill_at_random(commands: list[list[str]], duration: float, chance: random.Random) -> int:
    """Start them, kill each at a moment of its own; how many died of it."""
    moments = sorted((chance.uniform(0, duration), start(command)) for command in commands)
    started = time.monotonic()
    for moment, child in moments:
        time.sleep(max(0.0, started + moment - time.monotonic()))
        os.killpg(child, signal.SIGKILL)  # a chain and the command that it is at
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for _, child in moments]
    assert set(codes) <= {0, -signal.SIGKILL}, (
        codes,
        Path(os.environ["FAULTS_OUTPUT"]).read_text()[-2000:],
    )
    return codes.count(-signal.SIGKILL)


def undisturbed(campaign: Campaign, root: Path) -> tuple[float, State]:
    """The seconds of a run that nobody kills, and what it makes."""
    folder = root / "undisturbed"
    duration = finish(campaign.commands(folder))
    expected = campaign.state(folder)
    assert expected, "the undisturbed run made nothing"
    shutil.rmtree(folder)
    return duration, expected


def run(
    campaign: Campaign, duration: float, expected: State, root: Path, kills: int, chance: random.Random
) -> tuple[int, int, int]:
    """Kill so often; the kills, how many runs went on from something finished, and folders that were filled."""
    done = resumed = folders = 0
    while done < kills:
        folder, state = root / f"folder-{folders}", {}
        folders += 1
        while done < kills and state != expected:
            resumed += bool(state) or (folder / "state").exists()
            done += kill_at_random(campaign.commands(folder), 0.7 * duration, chance)
            found = dict(campaign.state(folder)) if folder.exists() else {}
            if campaign.only_grows:
                assert state.items() <= found.items(), "something that was finished is gone or has changed"
                assert found.items() <= expected.items(), "something is there that no undisturbed run makes"
            state = found
        finish(campaign.commands(folder))
        assert campaign.state(folder) == expected, "the end isn't that of an undisturbed run"
        shutil.rmtree(folder)
    return done, resumed, folders


def main() -> None:
    """All campaigns, each with the same part of the kills; prints a line a campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=160, help="drawn scenes to make masks of")
    parser.add_argument("--small", action="store_true", help="fewer campaigns, of fewer processes")
    parser.add_argument("--only", default="", help="campaigns whose name begins so")
    options = parser.parse_args()
    from wsss_pipeline.cache import writer

    forks.import_all()
    writer.IMAGES_PER_FLUSH, writer.FLUSH_REST, writer.SECONDS_PER_FLUSH = 3, 0.0, 0.0
    writer.IMAGES_PER_SHARD = 8
    writer.MaskWriter.__init__.__kwdefaults__["images_per_shard"] = 8
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["FAULTS_OUTPUT"] = str(root / "output.txt")
        prepare(root, options.images)
        chance = random.Random(options.seed)
        chosen = [
            campaign for campaign in campaigns(root, options.small) if campaign.name.startswith(options.only)
        ]
        known: dict[str, tuple[float, State]] = {}
        for campaign in chosen:
            if campaign.result not in known:
                known[campaign.result] = undisturbed(campaign, root)
            each = -(-options.kills // len(chosen))
            kills, resumed, folders = run(campaign, *known[campaign.result], root, each, chance)
            print(
                f"{campaign.name}: {kills} kills, {resumed} runs went on from finished work, "
                f"{folders} folders ended as undisturbed ones",
                flush=True,
            )


if __name__ == "__main__":
    main()
