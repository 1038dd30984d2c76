from __future__ import annotations

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_samples import MASK_SET, assert_equal, make_digest, make_mask, write_images

from wsss_pipeline.cache import MaskCache, MaskSet, open_mask_set
from wsss_pipeline.cache.shards import METADATA_BYTES, open_shard
from wsss_pipeline.errors import CacheError, CacheFormatError, CacheRecordError

IDS = [f"folder/{number}" for number in range(40)]


def sums(cache: MaskCache, image_ids: list[str]) -> list[tuple[str, int, int]]:
    """What a data-loader worker does: read by id."""
    found = []
    for image_id in image_ids:
        pseudo_mask = cache[image_id]
        found.append((image_id, int(pseudo_mask.mask.sum()), int(pseudo_mask.confidence.sum())))
    return found


def work(cache: MaskCache, image_ids: list[str], results: multiprocessing.SimpleQueue) -> None:
    results.put(sums(cache, image_ids))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_what_the_parent_reads(folder: Path, method: str) -> None:
    for start in range(0, 40, 10):
        write_images(folder, IDS[start : start + 10])
    cache = MaskCache.open(folder)
    expected = sums(cache, IDS)  # so that handles are open when the workers start
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    orders = [np.random.default_rng(worker).permutation(IDS).tolist() for worker in range(4)]
    workers = [context.Process(target=work, args=(cache, order, results)) for order in orders]
    for worker in workers:
        worker.start()
    assert sums(cache, IDS) == expected, "while the workers read"
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    for part in found:
        assert sorted(part) == sorted(expected)


def test_little_of_what_was_read_of_a_shard_stays_in_memory(folder: Path) -> None:
    """HDF5 would keep what it knows of all records of 64 open shards: gigabytes, in each worker of a training."""
    write_images(folder, [f"{number}" for number in range(400)])
    (path,) = folder.glob("shard-*.h5")
    with open_shard(path, MASK_SET.fingerprint) as file:
        for record in file["images"].values():
            assert {name: values[...].shape for name, values in record.items()}["mask"] == (12, 16)
        assert file.id.get_mdc_size()[2] < 1.1 * METADATA_BYTES, "bytes that are kept at the moment"


def test_a_pickled_cache_carries_no_handles(folder: Path) -> None:
    write_images(folder, IDS)
    cache = MaskCache.open(folder)
    assert_equal(cache[IDS[0]], make_mask(IDS[0]))
    copy = pickle.loads(pickle.dumps(cache))
    cache.close()
    assert list(copy) == sorted(IDS)
    assert_equal(copy[IDS[0]], make_mask(IDS[0]))


def test_it_reads_like_a_mapping(folder: Path) -> None:
    write_images(folder, ["b", "a/c"])
    with MaskCache.open(str(folder.parent)) as cache:
        assert (list(cache), len(cache)) == (["a/c", "b"], 2)
        assert "a/c" in cache
        assert "c" not in cache
        assert cache.missing(["z", "b", "y"]) == ["z", "y"]
        assert cache.class_names == ("cat", "dog")
        assert cache.labels("b") == make_mask("b").labels
        assert cache.record_info("b").image_digest == make_digest("b")
        assert cache.manifest.fingerprint == MASK_SET.fingerprint
        assert cache.manifest.mask_set == MASK_SET
        assert cache.manifest.completion.complete


def test_more_shards_than_are_kept_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_pipeline.cache.mask_cache.OPEN_SHARDS", 2)
    for image_id in IDS[:6]:
        write_images(folder, [image_id])
    cache = MaskCache.open(folder)
    for image_id in [*IDS[:6], *IDS[:6]]:
        assert_equal(cache[image_id], make_mask(image_id))
    assert len(cache._open) == 2


def test_a_set_that_was_moved_is_read_where_it_is(folder: Path, tmp_path: Path) -> None:
    write_images(folder, IDS)
    shutil.move(folder, tmp_path / "elsewhere")
    assert sums(MaskCache.open(tmp_path / "elsewhere"), IDS)


def test_a_missing_image_names_the_command_that_makes_it(folder: Path) -> None:
    write_images(folder, ["a"])
    with pytest.raises(CacheRecordError, match=rf"'b' isn't in .* --cache {folder.parent}") as caught:
        MaskCache.open(folder)["b"]
    assert "\n" not in str(caught.value)


def test_an_empty_set_opens(folder: Path) -> None:
    assert list(MaskCache.open(folder)) == []


def test_a_shard_that_vanished_is_one_line(folder: Path) -> None:
    write_images(folder, ["a"])
    cache = MaskCache.open(folder)
    next(folder.glob("shard-*")).unlink()
    with pytest.raises(CacheRecordError, match="image 'a'"):
        cache["a"]


def test_several_sets_are_listed(folder: Path) -> None:
    other = open_mask_set(
        folder.parent, MaskSet(name="coco14", determinants={"other": True}, class_names=("cat",))
    )
    with pytest.raises(CacheError, match="holds 2 mask sets") as caught:
        MaskCache.open(folder.parent)
    assert folder.name in str(caught.value)
    assert other.name in str(caught.value)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder", "half a manifest", "another manifest"])
def test_what_is_no_cache_says_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cache"
    if kind == "file":
        path.write_text("hello")
    elif kind != "nothing":
        path.mkdir()
    if kind == "half a manifest":
        (path / "manifest.json").write_text('{"format": "wsss-')
    if kind == "another manifest":
        (path / "manifest.json").write_text('["a", "list"]')
    with pytest.raises(CacheFormatError, match="generate-masks") as caught:
        MaskCache.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_does_not_fit_its_fingerprint_is_refused(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.4", "0.5"))
    with pytest.raises(CacheFormatError, match="fingerprint"):
        MaskCache.open(folder)
