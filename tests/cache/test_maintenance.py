from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cache_samples import (
    MASK_SET,
    damage,
    make_mask,
    shards,
    write_images,
    write_one,
)

from wsss_pipeline.cache import (
    MaskSet,
    gc,
    list_mask_sets,
    maintenance,
    open_mask_set,
    status,
    verify,
)
from wsss_pipeline.cache.inspection import inspect
from wsss_pipeline.errors import CacheFormatError

IDS = [f"image-{number}" for number in range(30)]


def test_mask_sets_are_listed_by_name(folder: Path) -> None:
    other = open_mask_set(
        folder.parent, MaskSet(name="coco14", determinants={"other": True}, class_names=("cat",))
    )
    (folder.parent / "something else").mkdir()
    assert list_mask_sets(folder.parent) == [other, folder]
    assert list_mask_sets(folder) == [folder]
    with pytest.raises(CacheFormatError, match="doesn't exist"):
        list_mask_sets(folder / "nowhere")


def test_status_counts(folder: Path) -> None:
    empty = status(folder)
    assert (empty.images, empty.shards, empty.bytes, empty.bytes_per_image, empty.complete) == (
        0,
        0,
        0,
        0,
        False,
    )
    write_images(folder, IDS)
    write_one(folder, IDS[0], like="another")
    (folder / "shard-0of1-00009.h5.partial").write_bytes(b"")
    (folder / "shard-0of1-00008.h5.damaged").write_bytes(b"")
    found = status(folder)
    assert (found.images, found.shards, found.superseded) == (30, 2, 1)
    without = [image_id for image_id in ("another", *IDS[1:]) if not make_mask(image_id).labels]
    assert found.images_without_labels == len(without) > 0
    assert found.bytes == sum(path.stat().st_size for path in shards(folder))
    assert found.bytes_per_image == found.bytes / 30
    assert found.partial == ("shard-0of1-00009.h5.partial",)
    assert found.damaged == ("shard-0of1-00008.h5.damaged",)
    assert found.manifest.fingerprint == MASK_SET.fingerprint


def test_a_complete_set_is_so_until_a_shard_is_unreadable(folder: Path) -> None:
    write_images(folder, IDS)
    assert status(folder).complete
    shards(folder)[0].write_bytes(b"")
    found = status(folder)
    assert not found.complete
    assert list(found.unreadable) == [shards(folder)[0].name]


def test_verify_lists_what_is_damaged(folder: Path) -> None:
    write_images(folder, IDS)
    write_images(folder, ["late", "later"])
    assert verify(folder).ok
    assert verify(folder).sound == 32
    first, second = shards(folder)
    damage(first, "image-1")
    damage(first, "image-2")
    write_one(folder, "image-2", like="image-2")
    second.write_bytes(second.read_bytes()[:-50])
    report = verify(folder)
    assert not report.ok
    assert list(report.damaged) == ["image-1"]
    assert first.name in report.damaged["image-1"]
    assert (report.sound, report.damaged_superseded) == (29, 1)
    assert list(report.unreadable) == [second.name]


def test_status_and_verify_name_their_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_images(folder, [f"{number}-a", f"{number}-b"])
    for number in range(2):
        damage(shards(folder)[number], f"{number}-a")
        write_one(folder, f"{number}-a", like="new")
    assert verify(folder).damaged_superseded == 2
    damage(shards(folder)[2], "2-a")
    report = verify(folder)
    (reason,) = report.damaged.values()
    assert str(shards(folder)[2]) in reason
    assert status(folder).path == folder


def test_verify_follows_a_gc_that_runs_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had still to look at it looks at then, whether it is in a new shard or in one that stays."""
    monkeypatch.setattr(maintenance, "SMALL_SHARD", 2)
    for names in ("a", "b", "c", "xy"):
        write_images(folder, [*names])
    *before, stays = shards(folder)

    def gc_first(*arguments: Any) -> Any:
        monkeypatch.setattr(maintenance, "inspect", inspect)
        gc(folder)
        return inspect(*arguments)

    monkeypatch.setattr(maintenance, "inspect", gc_first)
    report = verify(folder)
    assert report.ok
    assert report.sound == 5
    assert stays.exists()
    assert not any(path.exists() for path in before)


def test_verify_shows_its_progress_in_shards(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in "abc":
        write_images(folder, [name])
    monkeypatch.setattr("wsss_pipeline.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        verify(folder)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{done}/3 shards" for done in (1, 2, 3)
    ]
