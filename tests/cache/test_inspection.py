"""Shards that this process didn't write: looked into in bounded time, whatever they are, before it opens them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from cache_samples import assert_equal, damage, make_digest, make_mask, shards, write_images, write_one

from wsss_pipeline.cache import FinishedImages, MaskCache, MaskWriter, gc, inspection, merge, status, verify
from wsss_pipeline.cache.index import read_checked
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import MaskRecords
from wsss_pipeline.cache.shards import UnreadableShardError
from wsss_pipeline.errors import CacheRecordError, OutputError

IDS = [f"image-{number}" for number in range(20)]
CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SECONDS", 0.5)


def spin(shard: Path) -> None:
    """Zero a sector of the heap that holds the texts: HDF5 goes round in it for ever."""
    content = bytearray(shard.read_bytes())
    start = content.find(b"GCOL") + 512
    content[start : start + 512] = bytes(512)
    shard.write_bytes(content)


def test_a_shard_that_hdf5_never_leaves_is_damaged_and_made_anew(folder: Path) -> None:
    write_images(folder, IDS)
    write_images(folder, ["other"])
    spin(shards(folder)[0])
    started = time.monotonic()
    report = verify(folder)
    assert (report.sound, list(report.unreadable)) == (1, [shards(folder)[0].name])
    assert "took over" in report.unreadable[shards(folder)[0].name]
    assert list(MaskCache.open(folder)) == ["other"]
    assert status(folder).images == 1
    assert FinishedImages(folder).record(IDS[0]) is None
    target = folder.parent.parent / "merged"
    assert merge([folder], target).unreadable == 1
    assert gc(folder).set_aside == ["shard-0of1-00001.h5.damaged"]
    assert time.monotonic() - started < 60
    write_images(folder, IDS)
    assert verify(folder).sound == 21


def test_a_sector_that_went_bad_behind_the_notes_is_noticed(folder: Path) -> None:
    """A disk that loses bytes changes neither size nor times; the SHA-256 is what is left."""
    write_images(folder, IDS)
    (shard,) = shards(folder)
    spin(shard)
    checked = read_checked(folder)
    stamp = [getattr(shard.stat(), name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns")]
    content = json.loads((folder / "checked.json").read_text())
    content[shard.name]["stamp"] = stamp
    (folder / "checked.json").write_text(json.dumps(content))
    assert read_checked(folder)[shard.name].sha256 == checked[shard.name].sha256
    with MaskCache.open(folder) as cache, pytest.raises(CacheRecordError, match="took over"):
        cache[IDS[0]]
    assert not verify(folder).ok
    report = gc(folder)
    assert (report.set_aside, report.images) == ([f"{shard.name}.damaged"], 0)


def test_notes_that_come_with_a_cache_are_not_believed(folder: Path, tmp_path: Path) -> None:
    """Modification times can be given to a file; the time of its change can't."""
    write_images(folder, IDS)
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)  # times too
    assert (copy / "checked.json").read_bytes() == (folder / "checked.json").read_bytes()
    damage(shards(copy)[0], "image-1")
    status_before = shards(folder)[0].stat()
    os.utime(shards(copy)[0], ns=(status_before.st_atime_ns, status_before.st_mtime_ns))
    assert FinishedImages(copy).record("image-1") is None
    assert FinishedImages(copy).record("image-2") is not None


def test_verify_spares_the_next_reader_the_checking(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(folder, IDS)
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    assert verify(copy).ok
    monkeypatch.setattr("wsss_pipeline.cache.index.inspect", None)  # nobody asks
    with MaskCache.open(copy) as cache:
        assert_equal(cache["image-3"], make_mask("image-3"))
    assert status(copy).images == 20


def test_nothing_of_ones_own_is_inspected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("index", "finished"):
        monkeypatch.setattr(f"wsss_pipeline.cache.{module}.inspect", None)
    write_images(folder, IDS)
    write_images(folder, ["later"])
    with MaskCache.open(folder) as cache:
        assert_equal(cache["later"], make_mask("later"))
        assert_equal(cache[IDS[5]], make_mask(IDS[5]))


def test_a_process_that_is_killed_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(folder, IDS)
    (shard,) = shards(folder)
    fingerprint = read_manifest(folder).fingerprint
    assert inspect(shard, fingerprint, MaskRecords(CLASSES), "ids").ids == sorted(IDS)
    (inspector,) = inspection._present
    assert inspector._process is not None
    inspector._process.send_signal(signal.SIGKILL)
    inspector._process.wait()
    with pytest.raises(UnreadableShardError, match="was killed") as caught:
        inspect(shard, fingerprint, MaskRecords(CLASSES), "ids")
    assert not caught.value.is_damaged
    assert inspect(shard, fingerprint, MaskRecords(CLASSES), "records").damaged == {}
    spin(shard)
    monkeypatch.setattr(inspection, "SECONDS", 100.0)
    monkeypatch.setattr(inspection, "WAITING", 0.005)
    with pytest.raises(UnreadableShardError, match="couldn't be read within") as caught:
        inspect(shard, fingerprint, MaskRecords(CLASSES), "ids")
    assert not caught.value.is_damaged, "the machine may have been slow"


def test_one_name_that_is_no_text_hides_no_others(folder: Path) -> None:
    write_images(folder, ["a", "b"])
    with h5py.File(shards(folder)[0], "r+", libver=("v110", "v110")) as file:
        images = file["images"]
        images.id.links.move(b"a", images.id, b"\xff\x1b")
        images.id.links.create_soft(b"%41", b"/nowhere")
    assert list(MaskCache.open(folder)) == ["b"]
    report = verify(folder)
    assert report.sound == 1
    assert set(report.damaged) == {"\\xff\\x1b", "%41"}
    assert gc(folder).images == 1
    assert verify(folder).ok


@pytest.mark.parametrize("suffix", ["", ".partial", ".damaged", ".partial.tmp", f".{'0' * 16}.tmp"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_only_has_the_name_of_a_shard_is_left_alone(folder: Path, suffix: str, kind: str) -> None:
    write_images(folder, IDS[:2])
    other, precious = folder / f"shard-0of1-00009.h5{suffix}", folder.parent / "precious"
    precious.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(other)
    elif kind == "folder":
        other.mkdir()
        (other / "photo.jpg").write_bytes(b"precious")
    else:
        other.symlink_to(precious)
    with MaskWriter(folder) as writer:
        writer.write("late", make_mask("late"), image_digest=make_digest("late"), seconds=0.0)
        writer.finish([*IDS[:2], "late"])
    verify(folder)
    gc(folder)
    gc(folder)
    assert other.is_symlink() or other.exists() or (kind == "link" and not suffix)
    assert precious.read_bytes() == b"precious"
    assert kind != "folder" or (other / "photo.jpg").exists()
    assert sorted(MaskCache.open(folder)) == [*IDS[:2], "late"]


def test_a_link_to_nowhere_is_reported_and_left_alone(folder: Path, tmp_path: Path) -> None:
    write_images(folder, ["a"])
    link = folder / "shard-0of1-00000.h5"
    link.symlink_to(tmp_path / "nowhere")
    with MaskCache.open(folder) as cache:
        assert list(cache) == ["a"]
        assert list(cache.unreadable) == [link.name]
    assert list(verify(folder).unreadable) == [link.name]
    report = merge([folder], tmp_path / "merged")
    assert (report.images, report.unreadable) == (1, 1)
    assert gc(folder).set_aside == []
    assert link.is_symlink()
    write_images(folder, ["b"])
    assert status(folder).images == 2


def test_a_shard_of_300_gib_is_not_read(folder: Path, tmp_path: Path) -> None:
    write_images(folder, ["a"])
    write_images(folder, ["b"])
    with shards(folder)[0].open("ab") as file:
        file.truncate(300 * 2**30)  # takes no disk
    started = time.monotonic()
    assert list(MaskCache.open(folder)) == ["b"]
    assert list(verify(folder).unreadable) == [shards(folder)[0].name]
    assert merge([folder], tmp_path / "merged").unreadable == 1
    assert gc(folder).set_aside == []
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("version", [1.0, "1", [1], 2])
def test_a_format_version_of_another_type_is_another_format(folder: Path, version: object) -> None:
    write_images(folder, ["a"])
    with h5py.File(shards(folder)[0], "r+") as file:
        file.attrs["format_version"] = version
    assert list(MaskCache.open(folder)) == []


def test_a_reader_follows_gc(folder: Path) -> None:
    """Old shards go, and what they held is found in the new ones, by readers that were open before."""
    for name in IDS:
        write_images(folder, [name])
    write_one(folder, IDS[0], like="new")
    late, early = MaskCache.open(folder), MaskCache.open(folder)
    assert_equal(early[IDS[0]], make_mask("new"))
    before = shards(folder)
    assert gc(folder).images == 20
    assert not any(path.exists() for path in before)
    for cache in (early, late):
        assert_equal(cache[IDS[0]], make_mask("new"))
        for name in IDS[1:]:
            assert_equal(cache[name], make_mask(name))
            assert cache.labels(name) == make_mask(name).labels
        cache.close()


def test_a_reader_says_what_gc_dropped(folder: Path) -> None:
    write_images(folder, IDS)
    cache = MaskCache.open(folder)
    damage(shards(folder)[0], "image-1")
    gc(folder)
    with pytest.raises(CacheRecordError, match="image-1"):
        cache["image-1"]
    assert_equal(cache["image-2"], make_mask("image-2"))
    cache.close()


PLANTED = [
    *("manifest.json", "index.h5", "checked.json", "known-0-of-1.json", "checked-0-of-1.json"),
    *("writer-0-of-1.owner", "manifest.json.tmp", "index.h5.tmp", "shard-0of1-00002.h5.partial"),
    *("shard-0of1-00002.h5.partial.tmp", "writer-0-of-1.lock", "set.lock"),
]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_link_leads_nowhere(folder: Path, tmp_path: Path, name: str) -> None:
    write_images(folder, ["a"])
    victim = tmp_path / "victim"
    # of such content that reading through the link changes nothing
    victim.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"precious")
    content = victim.read_bytes()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    for work in (lambda: write_images(folder, ["b"]), lambda: gc(folder)):
        if name.endswith(".lock"):
            with pytest.raises(OutputError, match="links"):
                work()
        else:
            work()
    verify(folder)
    assert victim.read_bytes() == content
    assert set(MaskCache.open(folder)) >= {"a"}


def test_few_file_handles_are_no_damage(folder: Path) -> None:
    """A reader closes what it has open before it gives up, and what gives up says why."""
    for name in IDS:
        write_images(folder, [name])
    code = f"""
import os, resource
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.errors import ResourceError
cache = MaskCache.open({str(folder)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
for image_id in cache:
    cache[image_id]
cache.close()
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    cache["image-1"]
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ulimit -n" in done.stdout
