"""WebDataset shards as a source of images and labels."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tarfile
from contextlib import suppress
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


def header(
    name: str, size: int, kind: bytes = b"0", *, magic: bytes = b"ustar\x0000", raw_size: bytes | None = None
) -> bytes:
    """A header by hand, for what ``tarfile`` wouldn't write."""
    number = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + size.to_bytes(11, "big", signed=False)
    if raw_size is not None:
        number = raw_size
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        number,
        b"0" * 11 + b"\0",
    )
    block = b"".join((*fields, b" " * 8, kind, b"\0" * 100, magic)).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str, content: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + padded(content)


def padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 512)


def pax(**said: str) -> bytes:
    """A header of type x that says something about the next one."""
    records = b""
    for key, value in said.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + len(str(len(record) + 2))
        records += b"%d%s" % (length, record)
    return member("pax", records, b"x")


END = b"\0" * 1024
A, C = member("a.png", png(1)), member("c.png", png(3))
NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512 as tar writes numbers that aren't octal

# what stands between two sound members, what is found beside them, a part of the warning
DAMAGE: dict[str, tuple[bytes, list[str], str]] = {
    "nothing": (b"", [], ""),
    "a negative size": (header("b.png", 0, raw_size=NEGATIVE), [], "is damaged behind a.png"),
    "another negative size": (header("b.png", 0, raw_size=b"\xff" * 12), [], "is damaged behind a.png"),
    "a negative size in a pax header": (
        pax(size="-512") + header("b.png", 0, raw_size=NEGATIVE),
        [],
        "is damaged",
    ),
    "a size that is no number": (header("b.png", 0, raw_size=b"abcdefghijkl"), [], "is damaged"),
    "a wrong checksum": (b"x" + member("b.png", png(2))[1:], [], "is damaged behind a.png"),
    "garbage": (padded(b"garbage" * 5000), [], "is damaged"),
    "one block of zeros": (b"\0" * 512, [], "is damaged"),
    "a size beyond the end": (header("b.png", 2**40), ["b"], "is damaged behind a.png"),
    "a size of 88 bits": (header("b.png", 0, raw_size=b"\x80" + b"\xff" * 11), ["b"], "is damaged"),
    "labels beyond the end": (header("a.json", 2**40), [], "is damaged behind a.png"),
    "a link": (header("b.png", 0, b"2"), [], "links, devices and sparse files, such as b.png, 1 in all"),
    "a hard link": (header("b.png", 77, b"1"), [], "links, devices"),
    "a device": (header("b.png", 0, b"3"), [], "links, devices"),
    "a block device": (header("b.png", 0, b"4"), [], "links, devices"),
    "a FIFO": (header("b.png", 0, b"6"), [], "links, devices"),
    "an unknown kind": (member("b.png", png(2), b"Q"), [], "links, devices"),
    "a link that is no image": (header("b.txt", 0, b"2"), [], ""),
    "a sparse file": (member("b.png", png(2), b"S"), [], "links, devices and sparse"),
    "a sparse file with further blocks": (
        header("b.png", 512, b"S") + b"\x01" * 512 + b"x" * 512,
        [],
        "links, devices and sparse",
    ),
    "a sparse file of pax": (
        pax(GNU__sparse__name="b.png", GNU__sparse__major="1") + member("GNUSparseFile.0/b.png", png(2)),
        [],
        "links, devices and sparse files, such as b.png",
    ),
    "a folder": (header("b.png/", 0, b"5"), [], ""),
    "an old folder": (header("b.png/", 0, b"\0"), [], ""),
    "an old header": (header("b.png", len(png(2)), magic=b"\0" * 8) + padded(png(2)), ["b"], ""),
    "a long name": (member("@", b"x" * 300 + b".png\0", b"L") + member("b", png(2)), ["x" * 300], ""),
    "a long name beyond the end": (header("@", 2**40, b"L") + member("b.png", png(2)), [], "is damaged"),
    "a long name of 2 MiB": (member("@", b"x" * 2**21, b"L") + member("b.png", png(2)), [], "is damaged"),
    "a name of pax": (pax(path="b/b.png") + member("?", png(2)), ["b/b"], ""),
    "a pax header of 2 MiB": (member("@", b"9" * 2**21, b"x") + member("b.png", png(2)), [], "is damaged"),
    "a pax header without sense": (
        member("@", b"99 a=b\n7 =\n0 a=" + b"1" * 9999, b"x") + member("b.png", png(2)),
        ["b"],
        "",
    ),
    "a pax header for all": (member("@", b"12 path=z.z\n", b"g") + member("b.png", png(2)), ["b"], ""),
    "one name twice": (
        member("b.png", b"old") + member("b.png", png(2)),
        ["b"],
        "the later counts, such as b.png",
    ),
    "one id twice": (
        member("b.jpg", png(2)) + member("b.png", png(2)) + member("b.gif", png(2)),
        [],
        "b.jpg and",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_in_an_archive_costs_itself_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    between, found, warning = DAMAGE[case]
    (tmp_path / "a.tar").write_bytes(A + between + C + END)
    with caplog.at_level(logging.WARNING):
        images = find_images(tmp_path / "a.tar")
    assert list(images) == ["a", *found, "c"]
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.records)
    assert np.array_equal(read_image(images["c"]), np.asarray(Image.open(io.BytesIO(png(3)))))
    for image_id in found:
        if "beyond" in case or "88" in case:
            with pytest.raises(ImageError, match=r"bytes are too many|ends in the midst"):
                read_image(images[image_id])
        else:
            assert np.array_equal(read_image(images[image_id]), np.asarray(Image.open(io.BytesIO(png(2)))))


@pytest.mark.parametrize("case", DAMAGE)
def test_an_archive_of_nothing_but_that_ends(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.tar").write_bytes(DAMAGE[case][0])
    with suppress(ImageError):
        find_images(tmp_path / "a.tar")


STARTS = {
    "zeros": b"",
    "garbage": b"\1" * 512,
    "a member of 6 GiB": header("x.png", 6 * 2**30),
    "a member without end": header("x.png", 2**50),
    "a long name": header("@", 2**38, b"L"),
    "a pax header": header("@", 2**38, b"x"),
    "a pax header without end": header("@", 2**50, b"g"),
    "a sparse file": header("x.png", 2**38, b"S"),
    "garbage behind a member": A + b"\1" * 512,
}


@pytest.mark.parametrize("start", STARTS)
def test_an_archive_of_300_gib_takes_no_time_and_no_memory(tmp_path: Path, start: str) -> None:
    """It is all holes but for its beginning, and takes no room on the disk either."""
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(STARTS[start])
        file.truncate(300 * 2**30)
    code = f"""
import resource, time
from pathlib import Path
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ImageError
began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for file in find_images(Path({str(tmp_path / "a.tar")!r})).values():
        read_image(file)
except ImageError as error:
    assert len(str(error)) < 500
assert time.process_time() - began < 5
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_thousand_ids_in_two_archives_bring_a_few_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{number}.png": b"" for number in range(1000)}
    write_tar(tmp_path / "a.tar", files | {"alone.png": b""})
    write_tar(tmp_path / "b.tar", files)
    with caplog.at_level(logging.WARNING):
        assert list(find_images(tmp_path / "{a,b}.tar")) == ["alone"]
    assert len(caplog.records) == 21
    assert "and 980 more files that share an image id" in caplog.text


@pytest.mark.parametrize("kind", ["a FIFO", "a device"])
def test_what_is_named_like_an_archive_and_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    if kind == "a FIFO":
        os.mkfifo(tmp_path / "a.tar")
    else:
        (tmp_path / "a.tar").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=r"a\.tar: can't be read .*: not a plain file"):
        find_images(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "pattern",
    [
        "{a,b}" * 60 + ".tar",
        "{" + "{a,b}" * 60 + ",c}.tar",
        "{0..99999999999999}.tar",
        "{0.." + "9" * 5000 + "}.tar",
        "{" * 3000 + "a,b" + "}" * 3000 + ".tar",
        "{a,b}{" * 100 + ".tar",
        "x" * 100_000 + ".tar",
    ],
)
def test_patterns_without_end_are_refused_in_one_short_line(pattern: str) -> None:
    with pytest.raises(ImageError) as caught:
        find_images(Path(pattern))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_thousands_of_archives_that_are_not_there_bring_a_few_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "0000.tar", {"a.png": png()})
    with caplog.at_level(logging.WARNING):
        assert list(find_images(tmp_path / "{0000..3000}.tar")) == ["a"]
    assert len(caplog.records) == 21
    assert "and 2980 more archives that can't be read" in caplog.text
