from __future__ import annotations

from pathlib import Path

import h5py
import pytest
from cache_samples import (
    assert_equal,
    current,
    damage,
    make_digest,
    make_mask,
    shards,
    write_images,
    write_one,
)

from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, gc, open_mask_set, status, verify
from wsss_pipeline.cache.index import read_checked, stamp
from wsss_pipeline.errors import CacheLockedError

IDS = [f"image-{number}" for number in range(30)]


def test_gc_keeps_every_image_once(folder: Path) -> None:
    write_images(folder, IDS)
    write_one(folder, "image-0", like="new")
    write_images(folder, ["late"])
    damage(shards(folder)[0], "image-1")
    (folder / "shard-0of1-00009.h5.damaged").write_bytes(b"x" * 100)
    (folder / "index.h5.tmp").write_bytes(b"x")
    write_images(folder, IDS[:5])
    write_one(folder, "image-0", like="new")
    before = {image_id: MaskCache.open(folder)[image_id] for image_id in MaskCache.open(folder)}
    size = sum(path.stat().st_size for path in folder.iterdir())

    report = gc(folder)

    assert (report.images, report.superseded, report.damaged) == (31, 7, [])
    assert report.bytes_freed == size - sum(path.stat().st_size for path in folder.iterdir()) > 0
    assert not [path for path in folder.iterdir() if path.suffix in (".damaged", ".tmp")]
    assert len(shards(folder)) == 1
    found = status(folder)
    assert (found.images, found.superseded) == (31, 0)
    assert verify(folder).ok
    cache = MaskCache.open(folder)
    for image_id, expected in before.items():
        assert_equal(cache[image_id], expected)
    with h5py.File(folder / "index.h5") as index:
        assert len(index["images"]) == 31
        assert index["images/image-0"].attrs["image_digest"] == make_digest("new")
    assert gc(folder).removed == []


def test_gc_drops_a_damaged_record_and_the_set_is_incomplete_then(folder: Path) -> None:
    write_images(folder, IDS)
    damage(shards(folder)[0], "image-1")
    assert gc(folder).damaged == ["image-1"]
    assert "image-1" not in MaskCache.open(folder)
    assert not status(folder).complete
    with MaskWriter(folder) as writer:
        assert current(writer, folder, IDS) == set(IDS) - {"image-1"}


def test_gc_sets_a_shard_aside_that_does_not_open_and_removes_it_the_second_time(folder: Path) -> None:
    write_images(folder, ["a"])
    write_images(folder, ["b"])
    shards(folder)[0].write_bytes(b"garbage")
    assert gc(folder).set_aside == ["shard-0of1-00001.h5.damaged"]
    assert (folder / "shard-0of1-00001.h5.damaged").read_bytes() == b"garbage"
    assert gc(folder).removed == ["shard-0of1-00001.h5.damaged"]
    assert list(MaskCache.open(folder)) == ["b"]


def test_gc_finishes_what_a_dead_writer_left(folder: Path) -> None:
    writer = MaskWriter(folder, 1, 3).__enter__()
    writer.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
    writer.flush()
    with pytest.raises(CacheLockedError, match=r"writer-1-of-3\.lock"):
        gc(folder)
    writer._lock.release()
    assert gc(folder).salvaged == 1
    assert_equal(MaskCache.open(folder)["a"], make_mask("a"))


def test_gc_splits_what_it_gathers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_pipeline.cache.maintenance.IMAGES_PER_SHARD", 20)
    for start in range(0, 30, 5):
        write_images(folder, IDS[start : start + 5])
    assert gc(folder).images == 30
    assert len(shards(folder)) == 2
    assert verify(folder).sound == 30


def test_a_gc_that_is_killed_before_it_removes_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(folder, IDS)
    write_images(folder, IDS[:3])

    def die(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            gc(folder)
    assert verify(folder).sound == 30
    assert gc(folder).images == 30
    assert status(folder).superseded == 0


def test_gc_counts_over_all_shards(folder: Path) -> None:
    for name in "abc":
        write_images(folder, [name, f"{name}-too"])
    write_one(folder, "a", like="new a")
    write_one(folder, "b", like="new b")
    damage(shards(folder)[0], "a-too")
    damage(shards(folder)[1], "b-too")
    report = gc(folder)
    assert sorted(report.damaged) == ["a-too", "b-too"]
    assert (report.superseded, report.images, report.salvaged) == (2, 4, 0)
    assert sorted(MaskCache.open(folder)) == ["a", "b", "c", "c-too"]


def test_gc_salvages_several_writers_and_sets_aside_what_does_not_open(folder: Path) -> None:
    writers = [MaskWriter(folder, index, 3).__enter__() for index in range(3)]
    for index, writer in enumerate(writers):
        writer.write(f"image-{index}", make_mask("x"), image_digest="0" * 64, seconds=0.0)
        writer.flush()
    partials = sorted(folder.glob("*.partial"))
    for writer in writers:
        writer._lock.release()
    partials[0].write_bytes(b"garbage")
    report = gc(folder)
    assert report.salvaged == 2
    assert len(report.set_aside) == 1
    assert (folder / report.set_aside[0]).read_bytes() == b"garbage"
    assert not list(folder.glob("*.partial"))
    assert len(MaskCache.open(folder)) == 2


def test_gc_leaves_what_it_may_not_read_or_what_is_of_another_set(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = open_mask_set(
        tmp_path / "other", MaskSet(name="voc12", determinants={"threshold": 0.7}, class_names=("cat", "dog"))
    )
    write_images(other, ["z"])
    for name in "ab":
        write_images(folder, [name])
    foreign = folder / "shard-0of1-00000.h5"
    foreign.write_bytes(shards(other)[0].read_bytes())
    shards(folder)[-1].write_bytes(b"garbage")
    report = gc(folder)
    assert report.set_aside == ["shard-0of1-00002.h5.damaged"]
    assert foreign.exists()
    assert "left as it is" in caplog.text
    assert sorted(MaskCache.open(folder)) == ["a"]


def test_what_gc_has_checked_is_believed_afterwards(folder: Path) -> None:
    for name in "ab":
        write_images(folder, [name])
    report = gc(folder)
    (shard,) = shards(folder)
    assert len(report.removed) == 2
    checked = read_checked(folder)
    assert {name: sound.stamp for name, sound in checked.items()} == {shard.name: stamp(shard)}
    assert status(folder).complete
    write_images(folder, [f"more-{number}" for number in range(1, 40)])
    gc(folder)
    assert set(read_checked(folder)) == {path.name for path in shards(folder)}
