"""What is believed without reading an image again, and what isn't."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wsss_pipeline.cache import KnownImages
from wsss_pipeline.data.image_files import file_status

LABELS = ("cat", "dog")
SHARD = "shard-a.h5"
LONG_AGO = time.time() - 3600


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image whose times all lie an hour back, as far as the code can see."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    file = tmp_path / "image.jpg"
    file.write_bytes(b"pixels")
    (tmp_path / SHARD).write_bytes(b"masks")
    return file


Saved = Callable[..., KnownImages]


@pytest.fixture
def saved(image: Path) -> Saved:
    def make(labels: tuple[str, ...] = LABELS, has_cams: bool = False) -> KnownImages:
        known = KnownImages(image.parent, 0, 1)
        known.note("image", file_status(image), labels, has_cams)
        known.save({"image": SHARD})
        return KnownImages(image.parent, 0, 1)

    return make


def test_an_unchanged_image_is_done(image: Path, saved: Saved) -> None:
    assert not KnownImages(image.parent, 0, 1).is_done("image", image, LABELS, False)
    assert saved().is_done("image", image, LABELS, False)
    assert not KnownImages(image.parent, 1, 2).is_done("image", image, LABELS, False), "another share"


@pytest.mark.parametrize("change", ["bytes", "size", "gone", "shard", "shard gone", "labels", "cams", "id"])
def test_anything_that_changed_is_looked_at_again(image: Path, saved: Saved, change: str) -> None:
    saved()
    time.sleep(0.02)  # so that the file system's clock ticks
    labels, need_cams, image_id = LABELS, False, "image"
    if change == "bytes":
        before = image.stat()
        image.write_bytes(b"others")
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of change still tells
    elif change == "size":
        image.write_bytes(b"more pixels")
    elif change == "gone":
        image.unlink()
    elif change == "shard":
        (image.parent / SHARD).write_bytes(b"other masks")
    elif change == "shard gone":
        (image.parent / SHARD).unlink()
    elif change == "labels":
        labels = ("dog", "cat")
    elif change == "cams":
        need_cams = True
    else:
        image_id = "other"
    assert not KnownImages(image.parent, 0, 1).is_done(image_id, image, labels, need_cams)


def test_stored_cams_are_known(image: Path, saved: Saved) -> None:
    assert saved(has_cams=True).is_done("image", image, LABELS, True)


def test_a_file_that_has_just_changed_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(b"pixels")
    known = KnownImages(tmp_path, 0, 1)
    known.note("image", file_status(file), LABELS, False)
    known.save({"image": SHARD})
    assert not KnownImages(tmp_path, 0, 1).is_done("image", file, LABELS, False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"images": {"image": [1]}, "shards": {}}',
        b'{"images": 3, "shards": 4}',
        b"\xff",
        b"[" * 100_000,
        b'{"images": {"image": [[1], [1, 2, 3], ["cat"], true]}, "shards": {}}',
        b'{"images": {"image": ["s", "now", ["cat"], true]}, "shards": {"s": [1, 2]}}',
        b'{"images": {}, "shards": {"s": 1}}',
    ],
)
def test_a_damaged_file_costs_only_time(
    image: Path, saved: Saved, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    saved()
    (image.parent / "known-0-of-1.json").write_bytes(content)
    assert not KnownImages(image.parent, 0, 1).is_done("image", image, LABELS, False)
    assert "the images are looked at again" in caplog.text
    assert saved().is_done("image", image, LABELS, False), "and is written anew"


def test_what_was_known_stays_known(image: Path, saved: Saved) -> None:
    known = saved()
    other = image.with_name("other.jpg")
    other.write_bytes(b"pixels")
    known.note("other", file_status(other), (), False)
    known.save({"image": SHARD, "other": SHARD})
    again = KnownImages(image.parent, 0, 1)
    assert again.is_done("image", image, LABELS, False)
    assert again.is_done("other", other, (), False)


@pytest.mark.parametrize("at", [1, 2])
def test_either_time_may_tell_that_a_file_is_young(image: Path, at: int) -> None:
    known = KnownImages(image.parent, 0, 1)
    old = list(file_status(image))
    old[1], old[2] = 10**18, 10**18
    young = list(old)
    young[at] = time.time_ns()
    known.note("old", tuple(old), LABELS, False)
    known.note("young", tuple(young), LABELS, False)
    known.save({"old": "s", "young": "s"})
    assert list(json.loads((image.parent / "known-0-of-1.json").read_text())["images"]) == ["old"]
    text = (image.parent / "known-0-of-1.json").read_text()
    assert " " not in text, "a million of them are read at a start"
