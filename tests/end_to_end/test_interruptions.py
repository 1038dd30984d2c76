"""Signals, a second writer, a disk that is full or read-only: nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import pytest

from tests.end_to_end.conftest import (
    LABELS,
    Run,
    generate_arguments,
    mask_set,
    write_labels,
)
from tests.forks import ForkServer
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.demo.voc_folder import write_voc_folder

ROOT = Path(__file__).parent.parent.parent

IMAGES = 120  # more than a run finishes before it is stopped


def many_images(world: Path, count: int) -> None:
    """The two smallest pictures in turn, under other names, ``count`` in all."""
    labels = {}
    for number in range(count):
        name = ("tiny_odd", "camera_gray")[number % 2]
        shutil.copy(world / "images" / f"{name}.png", world / "images" / f"{name}_{number}.png")
        labels[f"{name}_{number}"] = LABELS[name]
    write_labels(world, labels)


def records(path: Path) -> dict[str, tuple[bytes, bytes, tuple[str, ...]]]:
    with MaskCache.open(path) as cache:
        return {
            name: (cache[name].mask.tobytes(), cache[name].confidence.tobytes(), cache[name].labels)
            for name in cache
        }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_image_and_says_how_to_go_on(
    world: Path, clip: Path, forks: ForkServer, number: signal.Signals, generate: Run
) -> None:
    many_images(world, IMAGES)
    process = forks.start(*generate_arguments(world, clip))
    deadline = time.monotonic() + 60
    while not list((world / "cache").glob("*/*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)  # the first records are on disk
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"{number.name}: finishing the image at hand" in stderr
    assert "go on with: wsss generate-masks" in stderr
    assert "Traceback" not in stderr
    finished = len(records(Path(stdout.splitlines()[-1])))
    assert 0 < finished < IMAGES
    # one more will do: the others would take most of the time
    summary = json.loads(generate("--json", "--limit", finished + 1).stdout.splitlines()[0])
    assert (summary["reused"], summary["computed"]) == (finished, 1)


def test_a_signal_to_all_processes_ends_training_between_updates(tmp_path: Path, forks: ForkServer) -> None:
    """As a scheduler sends it: what loads the samples gets it too."""
    write_voc_folder(tmp_path, seed=5, scenes={"train": 8})
    process = forks.start(
        *("train-seg", "--gt-masks", tmp_path / "SegmentationClass"),
        *("--classes", "demo", "--images", tmp_path / "JPEGImages", "--out", tmp_path / "run"),
        *("--network", "segformer", "--encoder", "tiny", "--weights", "none", "--crop", "64"),
        *("--batch-size", "2", "--iterations", "100000", "--workers", "1", "--device", "cpu"),
        is_group=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "go on with: wsss train-seg" in output
    assert (tmp_path / "run" / "last").is_dir()


def test_a_second_writer_is_told_about_the_first(generate: Run, world: Path) -> None:
    from wsss_pipeline.cache import MaskWriter

    path = mask_set(generate("--limit", 1))
    with MaskWriter(path):
        result = generate()
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(os.getpid()) in line
    assert generate().exit_code == 0


def test_a_full_disk_stops_with_one_line_and_the_next_run_goes_on(
    world: Path, clip: Path, forks: ForkServer, generate: Run
) -> None:
    many_images(world, IMAGES)
    code, _, stderr = forks.run(*generate_arguments(world, clip), file_size=150_000)
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("error: ")]) == 1
    summary = json.loads(generate("--json", "--limit", 40).stdout.splitlines()[0])  # more would take long
    assert summary["reused"] > 0
    assert summary["reused"] + summary["computed"] == 40


def test_a_cache_that_cannot_be_made(generate: Run, world: Path) -> None:
    (world / "file").write_text("")
    result = generate(cache="file/cache")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "file" in result.stderr.splitlines()[-1]


def test_a_cache_of_another_format_version(generate: Run) -> None:
    path = mask_set(generate("--limit", 1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format_version"] = 999
    (path / "manifest.json").write_text(json.dumps(manifest))
    result = generate()
    assert result.exit_code == 2
    assert "999" in result.stderr.splitlines()[-1]


def test_flipped_bytes_in_a_finished_shard_are_noticed_and_made_again(generate: Run) -> None:
    path = mask_set(generate())
    before = records(path)
    (shard,) = path.glob("shard-*.h5")
    content = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        place = file["images/cat/confidence"].id.get_chunk_info(0).byte_offset
    content[place + 20] ^= 0xFF
    shard.write_bytes(content)
    result = generate("--json")
    assert json.loads(result.stdout.splitlines()[0])["computed"] >= 1
    assert records(path) == before
