"""WebDataset shards as a source of images and labels."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_files import TarMember, file_status
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import file_digest, image_size, read_image
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import ImageError, LabelError

VOC = load_class_set("voc12")


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def test_images_of_several_archives_are_read_in_place(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(
            tmp_path / f"{number:03}.tar", {f"s{number}/b.png": png(number), f"s{number}/a.PNG": png(9)}
        )
    images = find_images(tmp_path / "{000..002}.tar")
    assert list(images) == ["s0/b", "s0/a", "s1/b", "s1/a", "s2/b", "s2/a"]
    file = tmp_path / "alone.png"
    file.write_bytes(png(1))
    assert np.array_equal(read_image(images["s1/b"]), read_image(file))
    assert image_size(images["s1/b"]) == (7, 5)
    assert file_digest(images["s1/b"]) == file_digest(file)
    assert list(find_images(tmp_path / "*.tar")) == list(images)
    assert list(find_images(tmp_path / "{002,000}.tar")) == ["s2/b", "s2/a", "s0/b", "s0/a"]


def test_the_status_changes_with_the_archive_and_with_the_place(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"x.png": png(1), "y.png": png(1)})
    first, second = (file_status(file) for file in find_images(archive).values())
    assert first != second
    write_tar(archive, {"x.png": png(1), "y.png": png(1)})
    assert file_status(find_images(archive)["x"]) != first


def test_links_hidden_files_and_unsafe_names_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = write_tar(
        tmp_path / "a.tar",
        {
            "good.png": png(),
            "../up.png": png(),
            "/etc/passwd.png": png(),
            "._good.png": b"",
            "__x__/a.png": b"",
        },
    )
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with caplog.at_level(logging.WARNING):
        assert list(find_images(archive)) == ["good"]
    assert "../up" in caplog.text
    assert "/etc/passwd" in caplog.text


def test_labels_lie_beside_the_images(tmp_path: Path) -> None:
    archive = write_tar(
        tmp_path / "a.tar",
        {
            **{f"{name}.png": png() for name in ("json", "object", "cls", "number", "none", "empty")},
            "json.json": b'["cat", "sofa"]',
            "object.json": b'{"caption": "x", "labels": ["dog"]}',
            "cls.cls": b"potted plant\ncat\n",
            "number.cls": b"7",
            "empty.cls": b"",
        },
    )
    assert read_labels(None, find_images(archive), VOC) == {
        "json": ("cat", "sofa"),
        "object": ("dog",),
        "cls": ("pottedplant", "cat"),
        "number": ("cat",),
        "empty": (),
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"labels": "cat"}', "expected"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b'["unicorn"]', "unicorn"),
        ("a.cls", b"99", "class index 99"),
        ("a.cls", b"\xff\xfe", "UTF-8"),
        ("a.cls", b"cat\n" * 300_000, "too many"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    archive = write_tar(tmp_path / "s.tar", {"a.png": png(), name: content})
    with pytest.raises(LabelError, match=message) as caught:
        read_labels(None, find_images(archive), VOC)
    assert f"s.tar/{name}" in str(caught.value)


def test_an_archive_that_ends_early_gives_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = write_tar(tmp_path / "a.tar", {f"{number}.png": png(number) for number in range(4)})
    content = archive.read_bytes()
    member = find_images(archive)["2"]
    assert isinstance(member, TarMember)
    archive.write_bytes(content[: member.offset + 10])
    with caplog.at_level(logging.WARNING):
        images = find_images(archive)
    assert list(images)[:2] == ["0", "1"]
    assert "is damaged behind" in caplog.text
    assert read_image(images["1"]).shape == (5, 7, 3)
    with pytest.raises(ImageError, match="ends in the midst"):
        read_image(member)


@pytest.mark.parametrize("content", [b"", b"no archive" * 100])
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.tar: can't be read as an uncompressed tar"):
        find_images(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("*.tar", "no such archives"), ("{0..9.tar", "write it like"), ("{1..2000000}.tar", "over 1,000,000")],
)
def test_patterns_that_stand_for_nothing(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        find_images(tmp_path / pattern)


def test_an_id_in_two_archives_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"x.png": png()})
    with pytest.raises(ImageError, match="same image id 'x'"):
        find_images(tmp_path / "{a,b}.tar")


def test_one_bad_archive_among_many_costs_its_own_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ac":
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png()})
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    with caplog.at_level(logging.WARNING):
        assert list(find_images(tmp_path / "{a,b,c,d}.tar")) == ["a", "c"]
    assert "b.tar: can't be read" in caplog.text
    assert "d.tar: can't be read" in caplog.text
    with pytest.raises(ImageError, match=r"d\.tar"):
        find_images(tmp_path / "{b,d}.tar")
