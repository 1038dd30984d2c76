from __future__ import annotations

from pathlib import Path

import h5py
import pytest
from cache_samples import (
    assert_equal,
    damage,
    make_digest,
    make_mask,
    shards,
    wanted,
    write_images,
    write_one,
)

from wsss_pipeline.cache import (
    MaskCache,
    MaskWriter,
    gc,
    status,
    verify,
)
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
        assert writer.done(wanted(IDS)) == set(IDS) - {"image-1"}


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
    monkeypatch.setattr("wsss_pipeline.cache.compaction.IMAGES_PER_SHARD", 20)
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
