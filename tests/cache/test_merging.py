from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cache_samples import (
    MASK_SET,
    assert_equal,
    damage,
    make_mask,
    shards,
    wanted,
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
from wsss_pipeline.errors import CacheError

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
    other = open_mask_set(tmp_path / "other", MaskSet("voc12", {"threshold": 0.7}, ("cat", "dog")))
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
        assert writer.done(wanted(IDS)) == set(IDS)
    damage(shards(copy)[0], "image-1")
    with MaskWriter(copy) as writer:
        assert writer.done(wanted(IDS)) == set(IDS) - {"image-1"}
