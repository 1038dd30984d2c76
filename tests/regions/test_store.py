"""Region sets: what is written comes back, whatever happens meanwhile, and what others wrote is looked at first."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsss_pipeline.cache import (
    MaskCache,
    MaskSet,
    MaskWriter,
    gc,
    merge,
    open_mask_set,
    status,
    verify,
    writer,
)
from wsss_pipeline.cache.records import Parts, record_digest
from wsss_pipeline.errors import CacheError, CacheFormatError, CacheLockedError, CacheRecordError, RegionError
from wsss_pipeline.regions.regions import MAX_REGIONS, Regions
from wsss_pipeline.regions.sources import open_regions
from wsss_pipeline.regions.store import RegionRecords, StoredRegions

SET = MaskSet(name="regions", determinants={"sam": "0" * 64}, class_names=(), holds="regions")
SIZE = (12, 16)
PIXELS = np.zeros((*SIZE, 3), np.uint8)
FIELDS = ("counts", "lengths", "levels", "iou", "stability", "points")


def make(image_id: str, number: int | None = None) -> Regions:
    """The same regions for the same id."""
    rng = np.random.default_rng(list(hashlib.sha256(image_id.encode()).digest()))
    number = int(rng.integers(0, 9)) if number is None else number
    return Regions.of_masks(
        rng.random((number, *SIZE)) < 0.5,
        rng.integers(0, 3, number),
        iou=rng.random(number),
        stability=rng.random(number),
        points=rng.random((number, 2)) * 16,
    )


def write(folder: Path, image_ids: Iterable[str], index: int = 0, count: int = 1) -> None:
    ids = list(image_ids)
    with MaskWriter(folder, index, count) as records:
        for image_id in ids:
            records.write(image_id, make(image_id), image_digest="0" * 64, seconds=0.5)
        records.finish(ids)


def assert_equal(found: Regions, expected: Regions) -> None:
    assert found.size == expected.size
    for name in FIELDS:
        value, wanted = getattr(found, name), getattr(expected, name)
        assert value.dtype == wanted.dtype
        np.testing.assert_array_equal(value, wanted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return open_mask_set(tmp_path / "regions", SET)


def test_regions_come_back(folder: Path) -> None:
    ids = ["a/b", "..%2Fc", "d", "e", "f"]
    write(folder, ids)
    regions = StoredRegions.open(folder.parent)
    assert sorted(ids) == list(regions)
    assert any(len(make(image_id)) > 1 for image_id in ids)
    for image_id in ids:
        assert_equal(regions(image_id, PIXELS), make(image_id))
    assert regions.identity == {"region set": SET.fingerprint}
    assert_equal(pickle.loads(pickle.dumps(regions))("d", PIXELS), make("d"))


def test_no_region_is_a_record_too(folder: Path) -> None:
    with MaskWriter(folder) as records:
        records.write("none", make("none", 0), image_digest="0" * 64, seconds=0.0)
    found = StoredRegions.open(folder)("none", PIXELS)
    assert_equal(found, make("none", 0))
    assert found.masks().shape == (0, *SIZE)
    assert verify(folder).ok


def test_threads_may_share_a_set(folder: Path) -> None:
    ids = [str(number) for number in range(40)]
    for start in range(0, 40, 2):  # a shard each
        write(folder, ids[start : start + 2])
    regions = StoredRegions.open(folder)
    with ThreadPoolExecutor(4) as pool:
        for image_id, found in zip(ids, pool.map(lambda i: regions(i, PIXELS), ids), strict=True):
            assert_equal(found, make(image_id))


def test_shares_fill_one_set_and_each_has_its_lock(folder: Path) -> None:
    with MaskWriter(folder, 0, 2), pytest.raises(CacheLockedError, match="writer-0-of-2"):
        write(folder, ["a"], 0, 2)
    write(folder, ["a", "b"], 0, 2)
    assert not status(folder).complete
    write(folder, ["c"], 1, 2)
    assert status(folder).complete
    assert list(StoredRegions.open(folder)) == ["a", "b", "c"]


def test_gc_and_merge_keep_regions(folder: Path, tmp_path: Path) -> None:
    other = open_mask_set(tmp_path / "other", SET)
    write(folder, ["a", "b"])
    write(folder, ["b"])
    write(other, ["c"])
    assert gc(folder).superseded == 1
    together = merge([folder, other], tmp_path / "both").path
    regions = StoredRegions.open(together)
    for image_id in ("a", "b", "c"):
        assert_equal(regions(image_id, PIXELS), make(image_id))


def test_a_kill_loses_what_was_not_flushed_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "IMAGES_PER_FLUSH", 2)
    monkeypatch.setattr(writer, "FLUSH_REST", 0.0)
    ids = [f"image-{number}" for number in range(30)]
    child = os.fork()
    if child == 0:
        with MaskWriter(folder, images_per_shard=10) as records:
            for image_id in ids:
                records.write(image_id, make(image_id), image_digest="0" * 64, seconds=0.0)
                time.sleep(0.01)
        os._exit(0)
    limit = time.monotonic() + 60
    while not list(folder.glob("shard-*-00002.h5.partial")) and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with MaskWriter(folder):  # salvages what was flushed
        pass
    found = StoredRegions.open(folder)
    assert 12 <= len(found) < 30
    for image_id in found:
        assert_equal(found(image_id, PIXELS), make(image_id))
    assert verify(folder).ok


def test_an_image_that_is_missing_or_of_another_size_is_named(folder: Path) -> None:
    write(folder, ["a"])
    regions = StoredRegions.open(folder)
    with pytest.raises(RegionError, match=rf"'../b' isn't in .*propose-regions` with --out {folder.parent}"):
        regions("../b", PIXELS)
    with pytest.raises(RegionError, match=r"'a' in .* are of 16 x 12 pixels, the image has 12 x 16"):
        regions("a", PIXELS.transpose(1, 0, 2))


def test_masks_and_regions_are_told_apart(folder: Path) -> None:
    masks = open_mask_set(folder.parent, MaskSet(name="m", determinants={"a": 1}, class_names=("cat",)))
    write(folder, ["a"])
    assert open_regions(str(folder.parent)).identity == {"region set": SET.fingerprint}
    assert MaskCache.open(folder.parent).path == masks
    with pytest.raises(CacheFormatError, match="holds regions, not masks"):
        MaskCache.open(folder)
    with pytest.raises(CacheFormatError, match="holds masks, not regions"):
        open_regions(str(masks))
    open_mask_set(folder.parent / "both", MaskSet(name="m", determinants={"a": 1}, class_names=("cat",)))
    open_mask_set(folder.parent / "both", MaskSet(name="m", determinants={"a": 2}, class_names=("cat",)))
    with pytest.raises(CacheFormatError, match="none of regions"):
        open_regions(str(folder.parent / "both"))
    another = SET.model_copy(update={"determinants": {"sam": "1" * 64}})
    open_mask_set(folder.parent, another)
    with pytest.raises(CacheError, match="holds 2 region sets"):
        open_regions(str(folder.parent))


def test_regions_that_are_none_are_not_written(folder: Path) -> None:
    bad = make("a", 2)
    bad.counts[0] += 1
    many = Regions.of_masks(np.zeros((MAX_REGIONS + 1, 1, 1), bool))
    with MaskWriter(folder) as records:
        for regions, why in ((bad, "don't fill"), (many, "an image may have")):
            with pytest.raises(CacheRecordError, match=why):
                records.write("a", regions, image_digest="0" * 64, seconds=0.0)
        records.write("b", make("b"), image_digest="0" * 64, seconds=0.0)
    assert list(StoredRegions.open(folder)) == ["b"]


def restored(group: h5py.Group) -> None:
    """Give a group the digest of what is in it now, as whoever wrote it on purpose would."""
    names = ("size", *FIELDS)
    parts = Parts((0, 0), (), {name: group[name][()] for name in names})
    group.attrs["record_digest"] = record_digest("a", parts, group.attrs["image_digest"], 1.0)


def wrong_sum(group: h5py.Group) -> None:
    group["counts"][0] += 1
    restored(group)


def wrong_level(group: h5py.Group) -> None:
    group["levels"][0] = 3
    restored(group)


def flipped(group: h5py.Group) -> None:
    group["iou"][0] = 0.25


def other_size(group: h5py.Group) -> None:
    group["size"][...] = SIZE[::-1]
    restored(group)


def declared(name: str, shape: tuple[int, ...], kind: str) -> Callable[[h5py.Group], None]:
    """A dataset in one chunk that says it has so many values, and has none."""

    def change(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(
            name,
            shape,
            kind,
            chunks=shape,
            compression="gzip",
            compression_opts=4,
            shuffle=True,
            fletcher32=True,
        )

    return change


def huge_image(group: h5py.Group) -> None:
    group.attrs["width"], group.attrs["height"] = 2**31, 2**31


def linked(group: h5py.Group) -> None:
    del group["counts"]
    group["counts"] = h5py.ExternalLink("/etc/passwd", "/counts")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (wrong_sum, "fill 12 x 16"),
        (wrong_level, "level 3"),
        (flipped, "digest"),
        (other_size, "in a record of 12 x 16"),
        (declared("counts", (2**28,), "<i4"), "the limits are"),
        (declared("lengths", (2**20,), "<i4"), "the limits are"),
        (declared("points", (2**14, 2), "<f4"), "in the chunks"),
        (declared("counts", (400,), "<i4"), "missing or has"),
        (declared("counts", (20, 20), "<i4"), "too many values"),
        (declared("iou", (4,), "<f8"), "not float32"),
        (linked, "a link to somewhere else"),
    ],
)
def test_a_record_by_strangers_is_read_only_where_it_can_be_one(
    folder: Path, change: Callable[[h5py.Group], None], why: str
) -> None:
    with MaskWriter(folder) as records:
        records.write("a", make("a", 4), image_digest="0" * 64, seconds=0.0)
        records.write("b", make("b"), image_digest="0" * 64, seconds=0.0)
    (shard,) = folder.glob("shard-*.h5")
    with h5py.File(shard, "r+") as file:
        change(file["images/a"])
    assert why in verify(folder).damaged["a"]
    regions = StoredRegions.open(folder)
    tracemalloc.start()
    with pytest.raises(RegionError, match=r"'a'.*damaged"):
        regions("a", PIXELS)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert_equal(regions("b", PIXELS), make("b"))


def test_an_image_of_beyond_all_sizes_is_refused(folder: Path) -> None:
    write(folder, ["a"])
    (shard,) = folder.glob("shard-*.h5")
    with h5py.File(shard, "r+") as file:
        huge_image(file["images/a"])
    assert "the limits are" in verify(folder).damaged["a"]
    with pytest.raises(RegionError, match="2147483648 x 2147483648"):
        StoredRegions.open(folder)("a", PIXELS)


def test_a_truncated_shard_costs_its_images(folder: Path) -> None:
    write(folder, ["a"])
    write(folder, ["b"])
    shard = sorted(folder.glob("shard-*.h5"))[0]
    shard.write_bytes(shard.read_bytes()[:-3000])
    regions = StoredRegions.open(folder)
    assert_equal(regions("b", PIXELS), make("b"))
    with pytest.raises(RegionError, match="'a'"):
        regions("a", PIXELS)


def test_a_record_holds_the_arrays_that_are_documented() -> None:
    parts = RegionRecords().parts(make("a", 4))
    assert {name: array.dtype.str for name, array in parts.arrays.items()} == {
        "size": "<i4",
        "counts": "<i4",
        "lengths": "<i4",
        "levels": "|u1",
        "iou": "<f4",
        "stability": "<f4",
        "points": "<f4",
    }
