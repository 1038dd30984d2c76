"""What a disk, a clock or a neighbour may do to a run: nothing finished is lost, the next run mends it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import h5py
import pytest

from tests.end_to_end.conftest import wsss
from tests.faults.conftest import Finished
from tests.forks import ForkServer
from wsss_pipeline.methods import method_names


def test_kills_of_every_long_command_lose_nothing(forks: ForkServer) -> None:
    """A small round of the harness; ``make faults`` does a hundred kills."""
    campaigns = 1 + len(method_names()) + 10
    arguments = ("--small", "--kills", campaigns, "--images", "24", "--seed", "1")
    code, stdout, stderr = forks.run(*arguments, module="tests.faults.kills", timeout=400)
    assert code == 0, stderr
    assert stdout.count("ended as undisturbed ones") == campaigns


def regions(shard: Path) -> dict[str, int]:
    """A place in each kind of thing that a shard file consists of."""
    size = shard.stat().st_size
    with h5py.File(shard) as file:
        name = next(iter(file["images"]))
        record = file["images"][name]
        places = {
            "signature": 2,
            "superblock": 30,
            "end of the superblock": 44,
            "root group's header": h5py.h5o.get_info(file.id).addr + 20,
            "group of all images": h5py.h5o.get_info(file["images"].id).addr + 20,
            "a record's header": h5py.h5o.get_info(record.id).addr + 20,
            "a record's attributes": h5py.h5o.get_info(record.id).addr + 200,
            "a mask's header": h5py.h5o.get_info(record["mask"].id).addr + 30,
            "a mask's pixels": record["mask"].id.get_chunk_info(0).byte_offset + 10,
            "a confidence's pixels": record["confidence"].id.get_chunk_info(0).byte_offset + 10,
            "the last byte": size - 1,
        }
    return places | {f"{tenth} tenths": size * tenth // 10 for tenth in range(1, 10)}


def test_flipped_bytes_anywhere_in_a_shard_are_mended(finished: Finished) -> None:
    path = finished.generate()
    (shard,) = path.glob("shard-*.h5")
    expected, sound = finished.state(), shard.read_bytes()
    backup = finished.root / "backup"
    shutil.copytree(path, backup)
    damaging = 0
    for region, place in regions(shard).items():
        content = bytearray(sound)
        for offset in range(place, min(place + 8, len(content))):
            content[offset] ^= 0xA5
        shard.write_bytes(content)
        damaging += wsss("cache", "verify", "--cache", path).exit_code != 0
        finished.generate()
        assert "Traceback" not in finished.said, region
        assert wsss("cache", "gc", "--cache", path).exit_code == 0
        assert wsss("cache", "gc", "--cache", path).exit_code == 0
        assert finished.state() == expected, region
        shutil.rmtree(path)
        shutil.copytree(backup, path)
    assert damaging >= 10


@pytest.mark.parametrize("tenth", range(10))
def test_half_a_manifest_is_written_anew(finished: Finished, tenth: int) -> None:
    path = finished.generate()
    expected = finished.state()
    manifest = path / "manifest.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text[: len(text) * tenth // 10])
    for command in (
        ["cache", "status", "--cache", path],
        ["evaluate", "--cache", path, "--gt", finished.voc],
    ):
        result = wsss(*command)
        assert result.exit_code == 2
        assert "manifest.json" in result.stderr
    finished.generate("--json")
    assert finished.state() == expected
    assert "0 to compute" in finished.said or "nothing was left to compute" in finished.said


def test_permission_lost_in_the_midst(original: Finished, forks: ForkServer) -> None:
    # not below pytest's folder, which is for its user alone
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        finished = Finished(Path(name) / "world")
        shutil.copytree(original.voc, finished.voc)
        finished.cache.mkdir()
        finished.cache.chmod(0o777)
        *arguments, _, _ = map(str, finished.arguments())
        code, _, stderr = forks.run(
            finished.root / "first", finished.cache, *arguments, module="tests.faults.permission_lost"
        )
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2, stderr
        assert len(errors) == 1, stderr
        assert "Permission denied" in errors[0]
        assert "have its permissions changed" in errors[0]
        (path,) = finished.cache.iterdir()
        path.chmod(0o777)
        finished.generate()
        assert finished.state() == original.state()
        assert "salvaged" in finished.said  # what was flushed before is kept


def stopped_by_a_full_disk(forks: ForkServer, arguments: list[object], limit: int) -> str:
    """The one line that a command says when no file may grow beyond a limit."""
    code, _, stderr = forks.run(*arguments, file_size=limit)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert len(errors) == 1, stderr
    return errors[0]


def test_merge_on_a_full_disk_can_be_repeated(finished: Finished, forks: ForkServer) -> None:
    source, into = finished.generate(), finished.root / "merged"
    merge = ["cache", "merge", source, "--into", into]
    assert "can't be written" in stopped_by_a_full_disk(forks, merge, 4000)
    assert wsss(*merge).exit_code == 0
    finished.cache = into
    merged = finished.state()
    finished.cache = source.parent
    assert merged == finished.state()


def test_training_on_a_full_disk_goes_on_where_it_was(finished: Finished, forks: ForkServer) -> None:
    train: list[object] = [
        *("train-seg", "--gt-masks", finished.voc / "SegmentationClass", "--classes", "demo"),
        *("--images", finished.voc / "JPEGImages", "--network", "segformer", "--encoder", "tiny"),
        *("--weights", "none", "--crop", 48, "--batch-size", 2, "--iterations", 4, "--set", "save_every=2"),
        *("--workers", 0, "--device", "cpu", "--precision", "fp32", "--out", finished.root / "run"),
    ]
    assert "can't be written" in stopped_by_a_full_disk(forks, train, 100_000)
    result = wsss(*train)
    assert result.exit_code == 0, result.stderr
    assert (finished.root / "run" / "last" / "model.safetensors").exists()


def test_a_clock_that_was_set_back_changes_nothing(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finished.state()
    year = 365 * 86400
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() - year)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - year * 10**9)
    path = finished.generate("--json")
    assert "nothing was left to compute" in finished.said
    # a picture replaced by an older one is a changed picture
    images = finished.voc / "JPEGImages"
    first, second, *_ = sorted(images.iterdir())
    shutil.copy(second, first)
    os.utime(first, (now() - 2 * year, now() - 2 * year))
    finished.generate()
    assert "1 to compute" in finished.said
    found = finished.state()
    assert found.keys() == expected.keys()
    assert sum(found[key] != expected[key] for key in expected) == 1
    assert json.loads((path / "manifest.json").read_text())["completion"]["complete"]


def test_two_runs_at_once_leave_one_whole_cache(finished: Finished, forks: ForkServer) -> None:
    expected = finished.state()
    shutil.rmtree(finished.cache)
    runs = [forks.start(*finished.arguments()) for _ in range(3)]
    said = [run.communicate(timeout=200)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    assert set(codes) <= {0, 2}
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "which writes the same share; wait for it" in text
    assert finished.state() == expected
