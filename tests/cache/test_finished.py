"""What is believed without reading an image again, and what isn't."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cache_samples
import h5py
import pytest
from cache_samples import damage, make_digest, make_mask, shards, write_images
from PIL import Image

from wsss_pipeline.cache import FinishedImages, MaskWriter, finished
from wsss_pipeline.cache.index import read_checked, stamp
from wsss_pipeline.cache.inspection import Depth
from wsss_pipeline.cache.records import MaskRecords
from wsss_pipeline.data.image_files import file_status
from wsss_pipeline.data.images import file_digest
from wsss_pipeline.errors import ImageError, OutputError

LABELS = make_mask("image").labels
Write = Callable[..., None]


class Reads:
    """The image files that were read for their digest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[Path] = []
        monkeypatch.setattr(finished, "image_digest", self._digest)

    def _digest(self, file: Path) -> str:
        self.files.append(file)
        return file_digest(file)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image whose times all lie an hour back, as far as the code can see."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    file = tmp_path / "image.jpg"
    file.write_bytes(b"bytes of image")
    return file


@pytest.fixture
def write(folder: Path, image: Path) -> Write:
    """Writes the masks of some images, all with the status of one file."""

    def make(
        *image_ids: str, cams: bool = False, share: tuple[int, int] = (0, 1), labels_of: str = ""
    ) -> None:
        with MaskWriter(folder, *share) as writer:
            for name in image_ids:
                mask, digest = make_mask(labels_of or name, cams=cams), make_digest(name)
                writer.write(name, mask, image_digest=digest, seconds=0.0, status=file_status(image))
            writer.finish(image_ids)

    return make


def known_ids(folder: Path) -> list[str]:
    lines = (folder / "known-0-of-1.json").read_text().splitlines()
    return [image_id for line in lines if line for image_id in json.loads(line)["images"]]


def is_current(folder: Path, image: Path, *share: int, **how: bool) -> bool:
    return cache_samples.is_current(FinishedImages(folder, *share), "image", image, LABELS, **how)


def test_an_unchanged_image_is_current_and_not_read(
    folder: Path, image: Path, write: Write, reads: Reads
) -> None:
    assert not is_current(folder, image)
    write("image")
    assert is_current(folder, image)
    assert reads.files == []
    assert is_current(folder, image, check_bytes=True)
    assert reads.files == [image]
    assert is_current(folder, image, 1, 2)
    assert reads.files == [image], "another division of the work believes it as well"


def test_the_dry_run_writes_nothing_and_needs_no_lock(folder: Path, image: Path, write: Write) -> None:
    write("image")
    (folder / "known-0-of-1.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    with MaskWriter(folder, 0, 2):
        pass
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert is_current(folder, image)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before


@pytest.mark.parametrize("change", ["bytes", "size", "gone", "shard", "labels", "order", "cams", "id"])
def test_anything_that_changed_is_looked_at_again(
    folder: Path, image: Path, write: Write, reads: Reads, change: str
) -> None:
    write("image")
    time.sleep(0.02)  # so that the file system's clock ticks
    labels, need_cams, image_id = LABELS, False, "image"
    if change == "bytes":
        before = image.stat()
        image.write_bytes(b"bytes_of_image")
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of change still tells
    elif change == "size":
        image.write_bytes(b"more bytes of image")
    elif change == "gone":
        image.unlink()
    elif change == "shard":
        (shard,) = shards(folder)
        with h5py.File(shard, "r+") as file:
            file["images/image"].attrs["image_digest"] = "0" * 64
    elif change == "labels":
        labels = (*LABELS, "sofa")
    elif change == "order":
        labels = LABELS[::-1]
    elif change == "cams":
        need_cams = True
    else:
        image_id = "other"
    found = cache_samples.is_current(FinishedImages(folder), image_id, image, labels, need_cams=need_cams)
    assert found == (change == "order" and labels == LABELS)
    assert bool(reads.files) == (change in ("bytes", "size"))


def test_stored_cams_are_known(folder: Path, image: Path, write: Write, reads: Reads) -> None:
    write("image", cams=True)
    assert is_current(folder, image, need_cams=True)
    assert reads.files == []


def test_a_file_that_cannot_be_read_is_not_current(
    folder: Path, image: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> str:
        raise ImageError("no")

    write("image")
    monkeypatch.setattr(finished, "image_digest", refuse)
    assert not is_current(folder, image, check_bytes=True)


def test_a_file_that_has_just_changed_is_not_believed(folder: Path, tmp_path: Path, reads: Reads) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(b"bytes of image")
    with MaskWriter(folder) as writer:
        mask, digest = make_mask("image"), make_digest("image")
        writer.write("image", mask, image_digest=digest, seconds=0.0, status=file_status(file))
        writer.finish(["image"])
    assert is_current(folder, file)
    assert reads.files == [file]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"images": {"image": [1]}}',
        b'{"images": 3}',
        b"\xff",
        b"[" * 100_000,
        b'{"images": {"image": [[1], [1, 2, 3], ["cat"], true]}}',
        b'{"images": {"image": ["s", "now", ["cat"], true]}}',
    ],
)
def test_a_damaged_file_costs_only_time(
    folder: Path, image: Path, write: Write, reads: Reads, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write("image")
    (folder / "known-0-of-1.json").write_bytes(content)
    with MaskWriter(folder) as writer:
        assert cache_samples.is_current(writer, "image", image, LABELS)
        writer.finish(["image"])
    assert ("the images are looked at again" in caplog.text) == bool(content)
    assert reads.files == [image]
    assert is_current(folder, image)
    assert reads.files == [image], "and is written anew"


def test_the_lists_of_earlier_versions_are_read(
    folder: Path, image: Path, write: Write, reads: Reads
) -> None:
    write("image")
    path = folder / "known-0-of-1.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"shards": {shards(folder)[0].name: [1, 2]}, **content}))
    assert is_current(folder, image)
    assert reads.files == []


def test_a_shard_is_looked_into_once_and_only_for_the_images_in_question(
    folder: Path, image: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"image-{number}" for number in range(12)]
    write(*names)
    for file in folder.glob("known-*.json"):
        file.unlink()
    asked: list[tuple[str, Sequence[str] | None]] = []
    inspect = finished.inspect

    def count(
        path: Path, fingerprint: str, kind: MaskRecords, depth: Depth, only: list[str] | None
    ) -> object:
        asked.append((depth, only))
        return inspect(path, fingerprint, kind, depth, only)

    monkeypatch.setattr(finished, "inspect", count)
    labels = {name: make_mask(name).labels for name in names}
    wanted = [names[7], "elsewhere", names[2]]
    found = FinishedImages(folder).unfinished(
        wanted, dict.fromkeys(wanted, image), {**labels, "elsewhere": ()}
    )
    assert asked == [("infos", [names[7], names[2]])]
    assert found == wanted, "their records are of other bytes"


def test_what_a_killed_run_had_finished_is_known_and_not_checked_again(
    folder: Path, image: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MaskWriter(folder, images_per_shard=1).__enter__()
    for name in ("image", "other"):
        mask, digest = make_mask(name), make_digest(name)
        writer.write(name, mask, image_digest=digest, seconds=0.0, status=file_status(image))
    writer._lock.release()  # as the system does for a process that is gone
    assert set(read_checked(folder)) == {path.name for path in shards(folder)}
    assert known_ids(folder) == ["image", "other"]
    monkeypatch.setattr(finished, "inspect", None)
    assert is_current(folder, image)
    assert reads.files == []


def test_a_line_that_a_killed_process_did_not_finish_costs_its_own_images_alone(
    folder: Path, image: Path, write: Write, reads: Reads
) -> None:
    write("image")
    path = folder / "known-0-of-1.json"
    with path.open("a") as file:
        file.write('{"digests":2,"images":{"half')
    write("other")
    assert known_ids(folder) == ["image", "other"]
    path.write_text(f'{path.read_text()}{{"digests":2,"images":{{"half')
    assert is_current(folder, image)
    assert reads.files == []


def test_a_list_of_images_that_are_known_already_does_not_grow(
    folder: Path, image: Path, write: Write, reads: Reads
) -> None:
    write("image", "other")
    size = (folder / "known-0-of-1.json").stat().st_size
    for _ in range(3):
        write("image", "other")
    assert known_ids(folder) == ["image", "other"]
    assert (folder / "known-0-of-1.json").stat().st_size == size


def test_nor_does_one_of_images_that_were_only_looked_at_again(
    folder: Path, image: Path, write: Write, reads: Reads
) -> None:
    write("image")
    os.utime(image, (1, 1))
    with MaskWriter(folder) as writer:
        assert cache_samples.is_current(writer, "image", image, LABELS)
        writer.finish(["image"])
    assert reads.files == [image]
    assert known_ids(folder) == ["image"]
    assert is_current(folder, image)
    assert reads.files == [image]


def test_what_was_known_stays_known(folder: Path, image: Path, write: Write, reads: Reads) -> None:
    write("image")
    write("other")
    again = FinishedImages(folder)
    assert cache_samples.is_current(again, "image", image, LABELS)
    assert cache_samples.is_current(again, "other", image, make_mask("other").labels)
    assert reads.files == []
    text = (folder / "known-0-of-1.json").read_text()
    assert " " not in text, "a million of them are read at a start"


def test_another_share_that_made_the_mask_anew_is_noticed(folder: Path, image: Path, write: Write) -> None:
    """The file is as it was, but the labels were others in between, and so the mask is."""
    other = next(name for name in "abcdef" if make_mask(name).labels != LABELS)
    write("image")
    write("image", share=(0, 2), labels_of=other)
    assert not is_current(folder, image)
    write("unrelated")
    assert not is_current(folder, image)
    assert known_ids(folder) == ["unrelated"]


def test_a_shard_is_checked_once_and_one_that_is_damaged_each_time(
    folder: Path, image: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("image", "bad")
    checked: list[int] = []
    inspect = finished.inspect

    def count(
        path: Path, fingerprint: str, kind: MaskRecords, depth: Depth, only: list[str] | None
    ) -> object:
        checked.extend([1] * (depth == "records"))
        return inspect(path, fingerprint, kind, depth, only)

    monkeypatch.setattr(finished, "inspect", count)
    assert is_current(folder, image, check_bytes=True)
    assert checked == [], "the writer vouches for it"
    (shard,) = shards(folder)
    os.utime(shard)
    for _ in range(2):
        with MaskWriter(folder) as writer:
            assert cache_samples.is_current(writer, "image", image, LABELS)
        assert checked == [1], "and then whoever has checked it"
    damage(shard, "bad")
    for times in (2, 3):
        with MaskWriter(folder) as writer:
            assert cache_samples.is_current(writer, "image", image, LABELS)
        assert len(checked) == times
        assert read_checked(folder)[shard.name].stamp != stamp(shard)


@pytest.mark.parametrize("at", [1, 2])
def test_either_time_may_tell_that_a_file_is_young(folder: Path, image: Path, at: int) -> None:
    old = list(file_status(image))
    old[1], old[2] = 10**18, 10**18
    young = list(old)
    young[at] = time.time_ns()
    with MaskWriter(folder) as writer:
        for name, status in {"old": old, "young": young}.items():
            writer.write(name, make_mask(name), image_digest="0" * 64, seconds=0.0, status=tuple(status))
        writer.finish(["old", "young"])
    assert known_ids(folder) == ["old"]


def test_a_finish_after_a_failed_write_notes_nothing(
    folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_images(folder, ["image"])
    mask, status = make_mask("image"), file_status(image)
    with MaskWriter(folder, images_per_shard=1) as writer:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="No space left"):
            writer.write("image", mask, image_digest="1" * 64, seconds=0.0, status=status)
        monkeypatch.undo()
        with pytest.raises(OutputError, match="earlier write failed"):
            writer.finish(["image"])
    assert not (folder / "known-0-of-1.json").exists()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_what_was_known_before_transparency_had_its_rule_holds_for_other_images_alone(
    folder: Path, image: Path, mode: str
) -> None:
    Image.new(mode, (8, 6), "red").save(image, "PNG")
    with MaskWriter(folder) as writer:
        mask, digest = make_mask("image"), file_digest(image)
        writer.write("image", mask, image_digest=digest, seconds=0.0, status=file_status(image))
        writer.finish(["image"])
    assert is_current(folder, image), "what this version has noted is believed"
    (known,) = folder.glob("known-*.json")
    content = json.loads(known.read_text())
    del content["digests"]
    known.write_text(json.dumps(content))
    assert is_current(folder, image) == (mode == "RGB")
