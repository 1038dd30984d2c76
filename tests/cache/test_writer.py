from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from cache_samples import (
    MASK_SET,
    Images,
    assert_equal,
    current,
    make_digest,
    make_mask,
    shards,
    start_writer,
    write_images,
    write_one,
)

from wsss_pipeline.cache import FinishedImages, MaskCache, MaskSet, MaskWriter, open_mask_set, status, verify
from wsss_pipeline.cache import writer as writer_module
from wsss_pipeline.cache.index import read_checked
from wsss_pipeline.cache.manifest import Completion, ShareCompletion, read_manifest
from wsss_pipeline.errors import CacheError, CacheFormatError, CacheLockedError, OutputError

IDS = [f"image-{number}" for number in range(30)]


def write_without_closing(folder: Path, image_ids: list[str]) -> None:
    """As a killed process leaves it: flushed, not finished, the lock free."""
    writer = MaskWriter(folder).__enter__()
    for image_id in image_ids:
        writer.write(image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=0.0)
    writer.flush()
    writer._lock.release()


def test_folder_name_holds_name_and_fingerprint(folder: Path) -> None:
    assert folder.name == f"voc12-{MASK_SET.fingerprint[:12]}"
    assert open_mask_set(folder.parent, MASK_SET) == folder
    other = MaskSet(name="../../my set", determinants={"a": 1}, class_names=("cat",))
    assert open_mask_set(folder.parent, other).parent == folder.parent


def test_a_second_run_finds_everything_done_and_writes_nothing(folder: Path) -> None:
    write_images(folder, IDS)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    with MaskWriter(folder) as writer:
        assert current(writer, folder, IDS) == set(IDS)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    assert after == before


def test_changed_bytes_or_labels_or_missing_cams_are_redone(folder: Path, tmp_path: Path) -> None:
    write_images(folder, ["a", "b", "c"])
    write_images(folder, ["with-cams"], cams=True)
    images = Images(tmp_path / "images", ["a", "b", "c", "with-cams"])
    images.files["a"].write_bytes(b"other bytes")
    images.labels["b"] = (*images.labels["b"], "sofa")
    with MaskWriter(folder) as writer:
        assert images.current(writer) == {"c", "with-cams"}
        assert images.current(writer, need_cams=True) == {"with-cams"}
    record = FinishedImages(folder).record("with-cams")
    assert record is not None
    assert record.has_cams
    assert FinishedImages(folder).record("never seen") is None


def test_a_later_record_takes_the_place_of_an_earlier_one(folder: Path) -> None:
    write_images(folder, ["a", "b"])
    with MaskWriter(folder) as writer:
        writer.write("a", make_mask("first try"), image_digest="1" * 64, seconds=0.0)
        writer.write("a", make_mask("second try"), image_digest="2" * 64, seconds=0.0)
    cache = MaskCache.open(folder)
    assert len(cache) == 2
    assert_equal(cache["a"], make_mask("second try"))
    assert cache.record_info("a").image_digest == "2" * 64
    with h5py.File(folder / "index.h5") as index:
        assert index["images/a"].attrs["image_digest"] == "2" * 64


def test_shards_rotate_and_leave_no_partial_behind(folder: Path) -> None:
    with MaskWriter(folder, images_per_shard=10) as writer:
        for image_id in IDS[:25]:
            writer.write(image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=0.0)
        assert len(shards(folder)) == 2
        writer.flush()
        assert [path.name for path in folder.glob("*.partial")] == ["shard-0of1-00003.h5.partial"]
        assert len(MaskCache.open(folder)) == 20, "a partial file isn't read"
    assert [path.name for path in shards(folder)] == [f"shard-0of1-0000{n}.h5" for n in (1, 2, 3)]
    assert not list(folder.glob("*.partial"))


def test_shards_also_rotate_by_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_pipeline.cache.writer.BYTES_PER_SHARD", 20_000)
    write_images(folder, IDS)
    assert len(shards(folder)) > 1
    assert max(path.stat().st_size for path in shards(folder)) < 30_000


def test_many_images_are_flushed_on_their_own(folder: Path) -> None:
    with MaskWriter(folder) as writer:
        for number in range(200):
            writer.write(f"{number}", make_mask(f"{number}"), image_digest="0" * 64, seconds=0.0)
        assert list(folder.glob("*.partial"))


def test_what_a_dead_writer_flushed_is_salvaged(folder: Path) -> None:
    write_without_closing(folder, IDS)
    (folder / "shard-0of1-00009.h5.partial.tmp").write_bytes(b"half")
    with MaskWriter(folder) as writer:
        assert current(writer, folder, IDS) == set(IDS)
    assert not [path for path in folder.iterdir() if "partial" in path.name]
    cache = MaskCache.open(folder)
    for image_id in IDS:
        assert_equal(cache[image_id], make_mask(image_id))


def test_only_sound_records_are_salvaged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_without_closing(folder, ["a", "b"])
    (partial,) = folder.glob("*.partial")
    with h5py.File(partial, "r+") as file:
        del file["images/a/confidence"]
    with MaskWriter(folder) as writer:
        assert current(writer, folder, ["a", "b"]) == {"b"}
    assert "damaged" in caplog.text


def test_a_partial_file_that_does_not_open_is_kept_and_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(folder, ["a"])
    (folder / "shard-0of1-00007.h5.partial").write_bytes(b"\x89HDF\r\n\x1a\n and then nothing")
    with MaskWriter(folder) as writer:
        assert current(writer, folder, ["a"]) == {"a"}
    (damaged,) = folder.glob("*.damaged")
    assert damaged.name in caplog.text
    assert damaged.read_bytes().startswith(b"\x89HDF")


def test_the_partial_file_of_a_living_writer_of_another_share_is_left_alone(folder: Path) -> None:
    with MaskWriter(folder, 0, 2) as first:
        first.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
        first.flush()
        with MaskWriter(folder, 1, 2) as second:
            second.write("b", make_mask("b"), image_digest="0" * 64, seconds=0.0)
        assert list(MaskCache.open(folder)) == ["b"]
        assert (folder / "shard-0of2-00001.h5.partial").exists()
    assert list(MaskCache.open(folder)) == ["a", "b"]


def test_flipped_bytes_in_a_finished_shard_are_noticed_and_only_those_images_redone(folder: Path) -> None:
    write_images(folder, IDS)
    (shard,) = shards(folder)
    with h5py.File(shard) as file:
        place = file["images/image-3/confidence"].id.get_chunk_info(0)
    content = bytearray(shard.read_bytes())
    content[place.byte_offset + place.size // 2] ^= 0xFF
    shard.write_bytes(content)
    with MaskWriter(folder) as writer:
        assert current(writer, folder, IDS) == set(IDS) - {"image-3"}
        writer.write("image-3", make_mask("image-3"), image_digest=make_digest("image-3"), seconds=0.0)
        assert writer.finish(IDS).complete
    assert current(FinishedImages(folder), folder, IDS) == set(IDS)
    assert verify(folder).ok


def test_a_damaged_shard_costs_its_own_images_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(folder, ["a"])
    write_images(folder, ["b"])
    first = shards(folder)[0]
    first.write_bytes(first.read_bytes()[:100])
    cache = MaskCache.open(folder)
    assert list(cache) == ["b"]
    assert cache.missing(["b", "a"]) == ["a"]
    assert list(cache.unreadable) == [first.name]
    assert first.name in caplog.text
    with MaskWriter(folder) as writer:
        assert current(writer, folder, ["a", "b"]) == {"b"}


def test_two_writers_of_one_share_exclude_each_other(folder: Path) -> None:
    process = start_writer("hold", folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    try:
        with pytest.raises(CacheLockedError, match=rf"writer-0-of-1\.lock .* process {process.pid} on "):
            MaskWriter(folder).__enter__()
        with MaskWriter(folder, 1, 2) as other_share:
            other_share.write("b", make_mask("b"), image_digest="0" * 64, seconds=0.0)
    finally:
        process.communicate("")
    with MaskWriter(folder), pytest.raises(CacheLockedError, match=f"process {os.getpid()} on "):
        MaskWriter(folder).__enter__()
    with MaskWriter(folder):
        pass


def test_completion_needs_every_share(folder: Path) -> None:
    def completion() -> tuple[int, bool]:
        found = read_manifest(folder).completion
        return found.images, found.complete

    assert completion() == (0, False)
    write_images(folder, IDS[:10], share="0/2")
    assert completion() == (10, False)
    write_images(folder, IDS[10:], share="1/2")
    assert completion() == (30, True)
    with MaskWriter(folder, 1, 2) as writer:
        writer.write("new", make_mask("new"), image_digest="0" * 64, seconds=0.0)
        writer.flush()
        assert completion() == (30, False)
        found = writer.finish([*IDS[10:], "new", "failed"])
        assert (found.shares["1/2"].expected, found.shares["1/2"].missing) == (22, 1)
    assert completion() == (31, False)


def test_an_error_inside_keeps_what_was_written(folder: Path) -> None:
    def interrupted() -> None:
        with MaskWriter(folder) as writer:
            writer.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(MaskCache.open(folder)) == ["a"]
    assert not read_manifest(folder).completion.complete


def test_an_error_inside_hides_no_second_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first is the one that is raised."""

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def interrupted() -> None:
        with MaskWriter(folder) as writer:
            writer.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
            monkeypatch.setattr(os, "fsync", fail)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "No space left on device" in caplog.text


def test_a_record_that_fails_half_way_leaves_nothing(folder: Path) -> None:
    with MaskWriter(folder) as writer:
        with pytest.raises(ValueError, match="NULL"):
            writer.write("bad", make_mask("bad"), image_digest="a\0b", seconds=0.0)
        writer.write("good", make_mask("good"), image_digest="0" * 64, seconds=0.0)
    assert verify(folder).ok
    assert list(MaskCache.open(folder)) == ["good"]


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing_flushed(folder: Path) -> None:
    write_images(folder, ["before"])
    process = start_writer("starve", folder, count=60_000)
    output, _ = process.communicate()
    assert process.returncode == 0, "HDF5 itself crashes where it can't write"
    assert output.startswith("OutputError: ")
    assert str(folder) in output
    assert "File too large" in output
    assert output.count("\n") == 1
    assert not list(folder.glob("*.tmp"))
    assert verify(folder).ok
    assert list(MaskCache.open(folder)) == ["before"]
    with MaskWriter(folder):
        pass
    salvaged = MaskCache.open(folder)
    assert len(salvaged) > 10
    assert_equal(salvaged["image-0"], make_mask("image-0"))


def test_after_a_failed_write_the_writer_refuses_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with MaskWriter(folder, images_per_shard=2) as writer:
        writer.write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="No space left on device; free some space"):
            writer.write("b", make_mask("b"), image_digest="0" * 64, seconds=0.0)
        monkeypatch.undo()
        with pytest.raises(OutputError, match="earlier write failed"):
            writer.write("c", make_mask("c"), image_digest="0" * 64, seconds=0.0)
    assert len(MaskCache.open(folder)) == 0


@pytest.mark.parametrize("name", ["file/cache", "file"])
def test_a_cache_below_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"can't be written: .*; choose a path that has no file in it"):
        open_mask_set(tmp_path / name, MASK_SET)


def test_a_read_only_folder_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Read-only file system; choose a folder"):
        write_images(folder, ["a"])


def test_a_damaged_manifest_is_written_anew_and_the_masks_kept(folder: Path) -> None:
    write_images(folder, ["a"])
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    assert open_mask_set(folder.parent, MASK_SET) == folder
    with MaskWriter(folder) as writer:
        assert current(writer, folder, ["a"]) == {"a"}


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999", '"many"', "[]", "null"])
def test_a_manifest_with_no_number_where_one_should_be_is_written_anew(folder: Path, number: str) -> None:
    write_images(folder, ["a"])
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"images": 1', f'"images": {number}'))
    with pytest.raises(CacheFormatError, match="isn't a whole manifest"):
        read_manifest(folder)
    open_mask_set(folder.parent, MASK_SET)
    assert list(MaskCache.open(folder)) == ["a"]


def test_the_manifest_is_this_text_for_ever(tmp_path: Path) -> None:
    classes = [{"name": "cat"}, {"name": "d\u00f6g"}]
    mask_set = MaskSet(
        name="x",
        determinants={"classes": classes, "at": 1e-7},
        class_names=("cat", "d\u00f6g"),
        category_ids=None,
    )
    folder = open_mask_set(tmp_path, mask_set)
    write_images(folder, ["a"])
    text = (folder / "manifest.json").read_text()
    written = read_manifest(folder)
    assert json.loads(text)["completion"] == {
        "images": 1,
        "shares": {"0/1": {"expected": 1, "missing": 0}},
        "complete": True,
    }
    values = {
        "format": "wsss-pseudo-masks",
        "format_version": 1,
        "name": "x",
        "fingerprint": mask_set.fingerprint,
        "created": written.created,
        "class_names": ["cat", "d\u00f6g"],
        "category_ids": None,
        "palette": None,
        "determinants": {"classes": classes, "at": 1e-7},
        "versions": written.versions,
        "completion": json.loads(text)["completion"],
    }
    assert text == json.dumps(values, indent=2) + "\n"
    (folder / "manifest.json").write_text(json.dumps({**values, "palette": None, "of a later program": 1}))
    assert read_manifest(folder) == written


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("completion", {}),
        ("completion", {"images": -1, "shares": {}, "complete": False}),
        ("completion", {"images": 1, "shares": {"0/1": {"expected": True, "missing": 0}}, "complete": False}),
        ("completion", {"images": 1, "shares": {}, "complete": "yes"}),
        ("class_names", "cat"),
        ("category_ids", {"cat": "1", "dog": "2"}),
        ("versions", {"torch": 2}),
        ("created", None),
    ],
)
def test_a_manifest_with_a_value_of_another_type_is_refused(folder: Path, key: str, value: object) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(
        CacheFormatError, match=rf"isn't a whole manifest \(.*{key}.*\); the same `wsss "
    ) as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 500


def test_another_format_version_is_refused(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    for use in (MaskCache.open, lambda path: MaskWriter(path).__enter__()):
        with pytest.raises(CacheFormatError, match="format version 2, this program reads 1; use "):
            use(folder)
    with pytest.raises(CacheFormatError, match="format version 2"):
        open_mask_set(folder.parent, MASK_SET)


def test_a_shard_of_another_mask_set_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = open_mask_set(
        folder.parent, MaskSet(name="other", determinants={"a": 1}, class_names=("cat", "dog"))
    )
    write_images(other, ["a"])
    stray = folder / "shard-0of1-00005.h5"
    stray.write_bytes(shards(other)[0].read_bytes())
    assert len(MaskCache.open(folder)) == 0
    assert "belongs to mask set" in caplog.text


def test_a_writer_that_is_not_open_says_so(folder: Path) -> None:
    with pytest.raises(CacheError, match="with statement"):
        MaskWriter(folder).write("a", make_mask("a"), image_digest="0" * 64, seconds=0.0)


def test_equal_masks_have_equal_digests_whatever_time_they_took(folder: Path) -> None:
    digests = []
    for seconds in (0.1, 99.0):
        with MaskWriter(folder) as writer:
            writer.write("a", make_mask("a"), image_digest="0" * 64, seconds=seconds)
        with h5py.File(shards(folder)[-1]) as file:
            digests.append(file["images/a"].attrs["record_digest"])
            assert np.isclose(file["images/a"].attrs["seconds"], seconds)
    assert digests[0] == digests[1]


def test_the_last_of_several_writers_makes_the_index(folder: Path) -> None:
    writers = [MaskWriter(folder, index, 3).__enter__() for index in range(3)]
    for index, writer in enumerate(writers):
        writer.write(f"image-{index}", make_mask("x"), image_digest="0" * 64, seconds=0.0)
    for index, writer in enumerate(writers):
        assert not (folder / "index.h5").exists()
        completion = writer.finish([f"image-{index}"])
        assert completion.images == index + 1
        writer.close()
        assert len(list(folder.glob("checked-*.json"))) == (index + 1 if index < 2 else 0)
    assert completion.complete
    assert status(folder).images == 3
    with h5py.File(folder / "index.h5") as index:
        assert sorted(index["images"]) == ["image-0", "image-1", "image-2"]
    # all are believed: flipped bytes with the old stamp go unnoticed, so nothing is read again
    assert set(read_checked(folder)) == {path.name for path in shards(folder)}


def test_a_writer_that_was_interrupted_sees_to_the_index_too(folder: Path) -> None:
    write_images(folder, ["a"])
    write_one(folder, "b", like="b")
    with h5py.File(folder / "index.h5") as index:
        assert sorted(index["images"]) == ["a", "b"]
    assert set(read_checked(folder)) == {path.name for path in shards(folder)}
    assert read_manifest(folder).completion.images == 2


def test_what_others_have_checked_is_believed_before_there_is_an_index(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = MaskWriter(folder, 0, 2).__enter__(), MaskWriter(folder, 1, 2).__enter__()
    first.write("a", make_mask("a"), image_digest=make_digest("a"), seconds=0.0)
    first.finish(["a"])
    first.close()
    assert list(read_checked(folder)) == [shards(folder)[0].name]
    (note,) = folder.glob("checked-0-of-2.json")
    note.write_text("[")
    assert read_checked(folder) == {}
    assert "is checked again" in caplog.text
    second.close()
    with MaskWriter(folder, 0, 2) as again:
        assert current(again, folder, ["a"]) == {"a"}
    assert list(read_checked(folder)) == [shards(folder)[0].name]
    assert not list(folder.glob("checked-*"))


def test_many_processes_may_make_the_same_set_at_the_same_moment(tmp_path: Path) -> None:
    """As the tasks of a SLURM array do."""
    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            cache = tmp_path / str(number)
            folders = list(pool.map(lambda _, cache=cache: open_mask_set(cache, MASK_SET), range(16)))
            assert len(set(folders)) == 1
            assert read_manifest(folders[0]).fingerprint == MASK_SET.fingerprint


def test_flushes_come_by_number_by_time_and_not_too_often(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, cost, writes = [1000.0], [1.0], []

    def write(path: Path, content: bytes, *, durable: bool) -> None:
        writes.append((path.name, durable))
        clock[0] += cost[0]

    monkeypatch.setattr(writer_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(writer_module, "IMAGES_PER_FLUSH", 4)
    with MaskWriter(folder) as writer:
        numbers = iter(range(100))

        def add(count: int) -> int:
            """Flushes so far, after so many images more."""
            for _ in range(count):
                name = f"image-{next(numbers)}"
                writer.write(name, make_mask(name), image_digest="0" * 64, seconds=0.0)
            return len(writes)

        monkeypatch.setattr(writer_module, "write_file", write)
        assert (add(3), add(1)) == (0, 1), "every four images"
        assert add(5) == 1, "but a flush that took a second is followed by twenty without one"
        clock[0] += 19.5
        assert add(1) == 1
        clock[0] += 0.5
        cost[0] = 0.0
        assert add(1) == 2
        clock[0] += 9.5
        assert add(1) == 2, "fewer than four images wait for ten seconds"
        clock[0] += 0.5
        assert add(1) == 3
        writer.flush()
        assert add(0) == 3, "nothing is unsaved"
        monkeypatch.undo()
    assert writes == [("shard-0of1-00001.h5.partial", False)] * 3


def test_what_failed_is_known_when_all_shares_have_run() -> None:
    one, other = ShareCompletion(expected=5, missing=2), ShareCompletion(expected=4, missing=0)
    assert Completion.of(3, {"0/2": one}, 2).failed == 0
    assert Completion.of(7, {"0/2": one, "1/2": other}, 2).failed == 2
    assert Completion.of(0, {}, 1).failed == 0
