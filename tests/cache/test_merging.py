from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cache_samples import (
    MASK_SET,
    assert_equal,
    current,
    damage,
    make_mask,
    shards,
    write_images,
    write_one,
)

from wsss_pipeline.cache import (
    MaskCache,
    MaskSet,
    MaskWriter,
    merge,
    open_mask_set,
    status,
    verify,
)
from wsss_pipeline.errors import CacheError, ConfigError

IDS = [f"image-{number}" for number in range(30)]


def test_merge_of_two_machines_is_complete(folder: Path, tmp_path: Path) -> None:
    other = open_mask_set(tmp_path / "other machine", MASK_SET)
    write_images(folder, IDS[:20], share="0/2")
    write_images(other, IDS[20:], share="1/2")
    report = merge([folder, other.parent], tmp_path / "merged")
    assert report.path == tmp_path / "merged" / folder.name
    assert (report.images, report.copied, report.already_there, report.unreadable) == (30, 2, 0, 0)
    assert status(report.path).complete
    assert verify(report.path).ok
    cache = MaskCache.open(tmp_path / "merged")
    for image_id in IDS:
        assert_equal(cache[image_id], make_mask(image_id))
    again = merge([folder, other], report.path)
    assert (again.copied, again.already_there, again.images) == (0, 2, 30)


def test_merge_into_one_of_the_sources(folder: Path, tmp_path: Path) -> None:
    other = open_mask_set(tmp_path / "other", MASK_SET)
    write_images(folder, ["a", "b"])
    write_images(other, ["b", "c"])
    write_one(other, "b", like="newer b")
    report = merge([folder, other], folder)
    assert (report.images, report.copied) == (3, 2)
    assert_equal(MaskCache.open(folder)["b"], make_mask("newer b"))


def test_merge_reports_what_it_leaves_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = open_mask_set(tmp_path / "other", MASK_SET)
    write_images(other, ["a"])
    write_images(other, ["b"])
    shards(other)[0].write_bytes(b"garbage")
    (other / "shard-0of1-00005.h5.partial").write_bytes(b"")
    report = merge([other], folder)
    assert (report.images, report.copied, report.unreadable) == (1, 1, 1)
    assert "unfinished work" in caplog.text


def test_merge_refuses_other_settings_and_touches_nothing(folder: Path, tmp_path: Path) -> None:
    other = open_mask_set(
        tmp_path / "other", MaskSet(name="voc12", determinants={"threshold": 0.7}, class_names=("cat", "dog"))
    )
    write_images(folder, ["a"])
    write_images(other, ["b"])
    for sources, destination in (([folder, other], tmp_path / "new"), ([folder], other)):
        with pytest.raises(CacheError, match="made with other settings"):
            merge(sources, destination)
    assert not (tmp_path / "new").exists()
    assert list(MaskCache.open(other)) == ["b"]
    with pytest.raises(CacheError, match="nothing to merge"):
        merge([], folder)


def test_a_copied_set_is_checked_once_and_believed_then(folder: Path, tmp_path: Path) -> None:
    write_images(folder, IDS)
    copy = tmp_path / "copy" / folder.name
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # new modification times
    with MaskWriter(copy) as writer:
        assert current(writer, copy, IDS) == set(IDS)
    damage(shards(copy)[0], "image-1")
    with MaskWriter(copy) as writer:
        assert current(writer, copy, IDS) == set(IDS) - {"image-1"}


def test_messages_name_both_sets(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = open_mask_set(
        tmp_path / "other", MaskSet(name="voc12", determinants={"threshold": 0.7}, class_names=("cat", "dog"))
    )
    write_images(folder, ["a"])
    write_images(other, ["b"])
    mine, theirs = (path.name.removeprefix("voc12-") for path in (folder, other))
    with pytest.raises(CacheError) as caught:
        merge([folder, other], tmp_path / "new")
    assert str(caught.value) == (
        f"{other} and {folder} were made with other settings (fingerprints {theirs} and {mine}); merge only what "
        "the same command made"
    )
    with pytest.raises(CacheError) as caught:
        merge([folder], other)
    assert str(caught.value).startswith(f"{other} and {folder} were made")
    third = open_mask_set(tmp_path / "third", MASK_SET)
    (third / "shard-0of1-00005.h5.partial").write_bytes(b"")
    merge([third], folder)
    assert f"{third} holds unfinished work" in caplog.text


def test_several_unreadable_shards_are_counted_and_the_rest_is_copied(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = open_mask_set(tmp_path / "other", MASK_SET)
    for name in "abcd":
        write_images(other, [name])
    for path in (shards(other)[0], shards(other)[2]):
        path.write_bytes(b"garbage")
    report = merge([other], folder)
    assert (report.copied, report.unreadable, report.images) == (2, 2, 2)
    assert sorted(MaskCache.open(folder)) == ["b", "d"]
    assert caplog.text.count("left out: ") == 2
    assert "shard-0of1-00001.h5 can't be opened" in caplog.text
    # into a set that has unreadable shards of its own
    shards(folder)[0].write_bytes(b"garbage")
    again = merge([other], folder)
    assert (again.copied, again.already_there) == (1, 1)


def test_shards_that_were_copied_before_are_known_when_the_next_source_has_them(
    folder: Path, tmp_path: Path
) -> None:
    sources = [open_mask_set(tmp_path / name, MASK_SET) for name in "xyz"]
    write_images(sources[0], ["a"])
    write_images(sources[1], ["b"])
    write_images(sources[2], ["a"])
    write_images(sources[2], ["b"])
    report = merge(sources, folder)
    assert (report.copied, report.already_there) == (2, 2)
    assert [path.name for path in shards(folder)] == ["shard-0of1-00001.h5", "shard-0of1-00002.h5"]


def test_merged_shares_are_complete_only_together(folder: Path, tmp_path: Path) -> None:
    empty = open_mask_set(tmp_path / "empty", MASK_SET)
    assert merge([empty], folder).images == 0
    assert not status(folder).complete
    first = open_mask_set(tmp_path / "first", MASK_SET)
    write_images(first, ["a"], share="0/2")
    merge([first], folder)
    assert not status(folder).complete, "the other share is missing"
    assert status(folder).manifest.completion.images == 1
    second = open_mask_set(tmp_path / "second", MASK_SET)
    with MaskWriter(second, 1, 2) as writer:
        writer.finish(["b"])
    merge([second], folder)
    assert not status(folder).complete, "an image of it is missing"


def test_a_source_is_no_place_to_merge_into(folder: Path) -> None:
    write_images(folder, ["a"])
    with pytest.raises(ConfigError, match=r"--into .* lies in the mask set"):
        merge([folder], folder / "sub")
    assert not (folder / "sub").exists()
