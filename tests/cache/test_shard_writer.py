"""A shard that a worker writes under another process's lock."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_samples import MASK_SET, assert_equal, make_digest, make_mask, shards

from wsss_pipeline.cache import MaskCache, MaskWriter, open_mask_set, status, verify
from wsss_pipeline.cache.index import read_trusted
from wsss_pipeline.cache.shard_names import ShardName
from wsss_pipeline.cache.shard_writer import ShardWriter
from wsss_pipeline.errors import CacheFormatError


def write(folder: Path, name: ShardName, *image_ids: str) -> tuple[int, int] | None:
    with ShardWriter(folder, name) as worker:
        for image_id in image_ids:
            worker.write(
                image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=2.5, scale=0.5
            )
        return worker.finish()


def test_adopted_shards_are_part_of_the_set_and_believed(folder: Path) -> None:
    names = [ShardName(7, number, 2) for number in range(2)]
    with MaskWriter(folder) as driver:
        for name, image_id in zip(names, "ab", strict=True):
            found = write(folder, name, image_id, f"{image_id}-too")
            assert found is not None
            assert found[0] == (folder / name.finished).stat().st_size
            driver.adopt(name, found)
        assert driver.finish(["a", "a-too", "b", "b-too"]).complete
        assert set(driver.places) == {"a", "a-too", "b", "b-too"}
    assert [path.name for path in shards(folder)] == ["shard-0of2-00007.h5", "shard-1of2-00007.h5"]
    assert set(read_trusted(folder)) == {name.finished for name in names}
    assert verify(folder).ok
    assert status(folder).complete
    assert_equal(MaskCache.open(folder)["a"], make_mask("a"))
    with MaskWriter(folder) as again:
        record = again.record("b-too")
    assert record is not None
    assert (record.image_digest, record.scale) == (make_digest("b-too"), 0.5)


def test_written_twice_it_is_the_same(folder: Path) -> None:
    name = ShardName(3, 0, 1)
    write(folder, name, "a", "b")
    before = {image_id: MaskCache.open(folder)[image_id] for image_id in "ab"}
    write(folder, name, "a", "b")
    assert len(shards(folder)) == 1
    assert_equal(MaskCache.open(folder)["a"], before["a"])
    assert verify(folder).sound == 2


def test_nothing_is_written_where_there_is_nothing(folder: Path, tmp_path: Path) -> None:
    assert write(folder, ShardName(1, 0, 1)) is None
    assert shards(folder) == []
    with ShardWriter(folder, ShardName(1, 0, 1)) as worker:
        worker.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
    assert shards(folder) == [], "it was never finished"
    with pytest.raises(CacheFormatError):
        ShardWriter(tmp_path / "nowhere", ShardName(1, 0, 1))
    other = open_mask_set(tmp_path / "other", MASK_SET)
    assert write(other, ShardName(1, 0, 1), "a") is not None
