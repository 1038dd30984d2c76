"""A mask set that somebody else made, and not in good faith: nothing is inflated, followed or printed unseen."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from cache_samples import MASK_SET, assert_equal, make_digest, make_mask, shards, write_images
from click.testing import CliRunner

from wsss_pipeline.cache import (
    FinishedImages,
    MaskCache,
    MaskSet,
    MaskWriter,
    PseudoMask,
    open_mask_set,
    verify,
)
from wsss_pipeline.cache.index import read_checked
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.records import MaskRecords, Parts
from wsss_pipeline.cli import main
from wsss_pipeline.errors import CacheFormatError, CacheRecordError

ESCAPE = "\x1b]0;owned\x07"
FILTERS = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}
QUARTER = 2**28  # of a gigabyte
Change = Callable[[h5py.Group, Path], None]


def zeros(count: int) -> bytes:
    """So many of them, compressed, without ever holding them."""
    stream, part = zlib.compressobj(9), bytes(2**16)
    return b"".join(stream.compress(part) for _ in range(count // len(part))) + stream.flush()


def replace(group: h5py.Group, name: str, *arguments: object, **options: object) -> h5py.Dataset:
    del group[name]
    return group.create_dataset(name, *arguments, **options)


def inflating(group: h5py.Group, folder: Path) -> None:
    """A chunk of 192 bytes whose gzip stream, of a quarter of a megabyte, unpacks to a quarter of a gigabyte."""
    dataset = replace(group, "mask", (12, 16), "u1", chunks=(12, 16), **FILTERS)
    dataset.id.write_direct_chunk((0, 0), zeros(QUARTER) + b"sum.")


def inflating_small(group: h5py.Group, folder: Path) -> None:
    dataset = replace(group, "mask", (12, 16), "u1", chunks=(12, 16), **FILTERS)
    dataset.id.write_direct_chunk((0, 0), zeros(2**18) + b"sum.")


def large_chunk(group: h5py.Group, folder: Path) -> None:
    dataset = replace(group, "mask", (12, 16), "u1", chunks=(2**15, 2**15), maxshape=(None, None), **FILTERS)
    dataset.id.write_direct_chunk((0, 0), zeros(QUARTER) + b"sum.")


def large_shape(group: h5py.Group, folder: Path) -> None:
    """Half a terabyte, of which nothing is stored."""
    for name in ("mask", "confidence"):
        replace(group, name, (2**20, 2**19), "u1", chunks=(2**20, 2**10), **FILTERS)
    group.attrs["height"], group.attrs["width"] = 2**20, 2**19


def never_stored(group: h5py.Group, folder: Path) -> None:
    replace(group, "mask", (12, 16), "u1", chunks=(12, 16), **FILTERS)


def plain(group: h5py.Group, folder: Path) -> None:
    replace(group, "mask", data=np.zeros((12, 16), np.uint8))


def external_file(group: h5py.Group, folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(192))
    replace(group, "mask", (12, 16), "u1", external=[(str(folder / "secret"), 0, 192)])


def virtual(group: h5py.Group, folder: Path) -> None:
    del group["mask"]
    layout = h5py.VirtualLayout((12, 16), "u1")
    layout[...] = h5py.VirtualSource(folder / "elsewhere.h5", "mask", (12, 16))
    group.create_virtual_dataset("mask", layout)


def wrong_rank(group: h5py.Group, folder: Path) -> None:
    replace(group, "mask", data=np.zeros((1, 12, 16), np.uint8), chunks=(1, 12, 16), **FILTERS)


def wrong_type(group: h5py.Group, folder: Path) -> None:
    replace(group, "mask", data=np.zeros((12, 16), np.int64), chunks=(12, 16), **FILTERS)


def texts(group: h5py.Group, folder: Path) -> None:
    replace(
        group, "mask", data=np.full((12, 16), "x" * 9, object), chunks=(12, 16), dtype=h5py.string_dtype()
    )


def soft_link(group: h5py.Group, folder: Path) -> None:
    group.file["elsewhere"] = group["mask"]
    del group["mask"]
    group["mask"] = h5py.SoftLink("/elsewhere")


def external_link(group: h5py.Group, folder: Path) -> None:
    with h5py.File(folder / "elsewhere.h5", "w") as file:
        group.copy("mask", file)
    del group["mask"]
    group["mask"] = h5py.ExternalLink(str(folder / "elsewhere.h5"), "/mask")


def linked_record(group: h5py.Group, folder: Path) -> None:
    images = group.parent
    with h5py.File(folder / "elsewhere.h5", "w") as file:
        images.copy("image", file)
    del images["image"]
    images["image"] = h5py.ExternalLink(str(folder / "elsewhere.h5"), "/image")


def no_group(group: h5py.Group, folder: Path) -> None:
    images = group.parent
    del images["image"]
    images["image"] = np.zeros(3)


def long_label(group: h5py.Group, folder: Path) -> None:
    group.attrs.create("labels", np.array(["x" * 5000], object), dtype=h5py.string_dtype())


def many_labels(group: h5py.Group, folder: Path) -> None:
    group.attrs.create("labels", np.array(["x"] * 9000, object), dtype=h5py.string_dtype())


def too_many_cams(group: h5py.Group, folder: Path) -> None:
    group.attrs["height"], group.attrs["width"] = 2**13, 2**14
    group.attrs.create("labels", np.array(["cat"] * 100, object), dtype=h5py.string_dtype())
    for name in ("mask", "confidence"):
        replace(group, name, (2**13, 2**14), "u1", chunks=(2**13, 2**14), **FILTERS)
    group.create_dataset("cams", (100, 2**13, 2**14), "<f2", chunks=(1, 2**13, 2**14), **FILTERS)


CHANGES = {
    inflating_small: "doesn't inflate to 192 bytes",
    inflating: "has 26.* bytes",
    large_chunk: "chunks",
    large_shape: "524288 x 1048576 pixels",
    never_stored: "is missing",
    plain: "chunks",
    external_file: "chunks",
    virtual: "chunks",
    wrong_rank: "chunks",
    wrong_type: "int64",
    texts: "chunks",
    soft_link: "link to somewhere else",
    external_link: "link to somewhere else",
    linked_record: "link to somewhere else",
    no_group: "isn't a group",
    long_label: "5000 characters",
    many_labels: "attribute 'labels' has more than 65536 bytes",
    too_many_cams: "with 100 CAMs",
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_what_this_program_never_writes_is_a_damaged_record(
    folder: Path, change: Change, reason: str
) -> None:
    write_images(folder, ["image", "other"])
    (shard,) = shards(folder)
    with h5py.File(shard, "r+", libver=("v110", "v110")) as file:
        change(file["images/image"], folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with MaskCache.open(folder) as cache, pytest.raises(CacheRecordError, match=reason) as caught:
        cache["image"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"
    assert len(str(caught.value)) < 1000
    assert list(verify(folder).damaged) == ["image"]
    assert FinishedImages(folder).record("image") is None
    assert_equal(MaskCache.open(folder)["other"], make_mask("other"))


def test_a_chunk_that_compression_would_have_made_larger_is_read(folder: Path) -> None:
    """HDF5 stores such a chunk as it is, and says so in the chunk's filter mask."""
    write_images(folder, ["a"], cams=True)
    expected = make_mask("a", cams=True)
    with h5py.File(shards(folder)[0], "r+", libver=("v110", "v110")) as file:
        for name, array in (("mask", expected.mask), ("cams", expected.cams)):
            dataset = file["images/a"][name]
            for number in range(len(array) if array.ndim == 3 else 1):
                part, offset = (array, (0, 0)) if array.ndim == 2 else (array[number], (number, 0, 0))
                shuffled = part.reshape(-1).view(np.uint8).reshape(-1, part.itemsize).T.tobytes()
                dataset.id.write_direct_chunk(offset, shuffled + b"sum.", filter_mask=0b010)
    assert_equal(MaskCache.open(folder)["a"], expected)


def test_the_images_of_a_shard_are_in_that_shard(folder: Path, tmp_path: Path) -> None:
    write_images(folder, ["a"])
    (shard,) = shards(folder)
    shutil.copy(shard, tmp_path / "elsewhere.h5")
    for link in (h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "/images"), h5py.SoftLink("/other")):
        with h5py.File(shard, "r+", libver=("v110", "v110")) as file:
            if "other" not in file:
                file["other"] = file["images"]
            del file["images"]
            file["images"] = link
        cache = MaskCache.open(folder)
        assert list(cache) == []
        assert "link to somewhere else" in cache.unreadable[shard.name]


def test_a_pipe_instead_of_a_file_is_not_waited_for(folder: Path) -> None:
    write_images(folder, ["a"])
    os.mkfifo(folder / "shard-0of1-00009.h5")
    (folder / "index.h5").unlink()
    os.mkfifo(folder / "index.h5")
    cache = MaskCache.open(folder)
    assert list(cache) == ["a"]
    assert "not a plain file" in cache.unreadable["shard-0of1-00009.h5"]
    assert list(read_checked(folder)) == ["shard-0of1-00001.h5"]


def test_nobody_reads_the_index(folder: Path, tmp_path: Path) -> None:
    """It is for other tools; what this program goes by lies beside it."""
    write_images(folder, ["a"])
    (folder / "index.h5").write_bytes(b"no HDF5")
    assert list(MaskCache.open(folder)) == ["a"]
    assert list(read_checked(folder)) == [shards(folder)[0].name]


def test_a_mask_with_255_is_neither_written_nor_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = PseudoMask(np.full((2, 3), 255, np.uint8), np.zeros((2, 3), np.uint8))
    with MaskWriter(folder) as writer:
        with pytest.raises(CacheRecordError, match="image 'bad' can't be stored: the mask holds 255"):
            writer.write("bad", bad, image_digest="0" * 64, seconds=0.0)
        writer.write("good", make_mask("good"), image_digest="0" * 64, seconds=0.0)
    assert list(MaskCache.open(folder)) == ["good"]
    with MaskWriter(folder) as writer:
        parts = Parts(bad.mask.shape, (), {"mask": bad.mask, "confidence": bad.confidence})
        monkeypatch.setattr(MaskRecords, "parts", lambda kind, content: parts)
        writer.write("bad", bad, image_digest="0" * 64, seconds=0.0)
    with pytest.raises(CacheRecordError, match="holds the value 255"):
        MaskCache.open(folder)["bad"]


def test_what_fits_no_class_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = np.zeros((2, 3), np.uint8)
    with MaskWriter(folder) as writer:
        for number, (value, labels) in enumerate([(3, ()), (0, ("wolf",))]):
            mask = PseudoMask(np.full((2, 3), value, np.uint8), confidence, labels)
            with pytest.raises(CacheRecordError, match="can't be stored"):
                writer.write(f"{number}", mask, image_digest="0" * 64, seconds=0.0)
        monkeypatch.setattr(writer, "_kind", MaskRecords(("cat", "dog", "wolf")))
        for value in (2, 3):
            mask = PseudoMask(np.full((2, 3), value, np.uint8), confidence)
            writer.write(f"{value}", mask, image_digest="0" * 64, seconds=0.0)
        mask = PseudoMask(np.zeros((2, 3), np.uint8), confidence, ("wolf",))
        writer.write("label", mask, image_digest="0" * 64, seconds=0.0)
    cache = MaskCache.open(folder)
    assert cache["2"].mask.max() == 2
    with pytest.raises(CacheRecordError, match=r"'3' in .* holds the value 3, and there are 2 classes"):
        cache["3"]
    with pytest.raises(CacheRecordError, match=r"'wolf' is none of the mask set's classes"):
        cache["label"]
    assert set(verify(folder).damaged) == {"3", "label"}


@pytest.mark.parametrize(
    "determinants", [{"classes": ["cat", "dog"]}, {"classes": [{"name": "cat"}, {"name": "dog"}]}]
)
@pytest.mark.parametrize("names", [["dog", "cat"], ["cat"], ["cat", "dog", "cow"], ["cat", ESCAPE]])
def test_class_names_are_held_against_the_fingerprint(
    tmp_path: Path, determinants: dict[str, object], names: list[str]
) -> None:
    mask_set = MaskSet(
        name="x", determinants=determinants, class_names=("cat", "dog"), category_ids={"cat": 17, "dog": 18}
    )
    path = open_mask_set(tmp_path, mask_set)
    assert read_manifest(path).mask_set == mask_set
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "class_names": names}))
    with pytest.raises(CacheFormatError, match="class_names aren't the classes that the fingerprint covers"):
        MaskCache.open(path)
    (path / "manifest.json").write_text(json.dumps({**values, "category_ids": {"cat": 17}}))
    with pytest.raises(CacheFormatError, match="category_ids leave a class out"):
        MaskCache.open(path)
    assert open_mask_set(tmp_path, mask_set) == path, "it is written anew"
    assert MaskCache.open(path).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", [f"class {number}" for number in range(65_535)]),
        ("class_names", ["cat"] * 2),
        ("class_names", ["cat", f"dog{ESCAPE}"]),
        ("class_names", ["cat", "  "]),
        ("class_names", ["cat", "\N{RIGHT-TO-LEFT OVERRIDE}god"]),
        ("category_ids", {"cat": 17, "dog": 17}),
        ("category_ids", {"cat": 17, "dog": 10**30}),
        ("category_ids", {"cat": 17, "dog": -1}),
        ("category_ids", {"cat": 17, "dog": 18, "cow": 19}),
        ("format_version", True),
        ("format_version", 1.0),
        ("format_version", "1"),
        ("versions", {"torch": "2" * 10_000}),
        ("created", "x" * 10_000),
        ("name", ["x"]),
    ],
)
def test_what_no_manifest_of_this_program_says_is_refused(tmp_path: Path, key: str, value: object) -> None:
    mask_set = MaskSet(name="x", determinants={"a": 1}, class_names=("cat", "dog"))
    path = open_mask_set(tmp_path, mask_set)
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, key: value}))
    for command in (["cache", "ls"], ["cache", "gc"], ["export-masks", "--out", str(tmp_path / "out")]):
        result = CliRunner().invoke(main, [*command, "--cache", str(path)])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert len(result.stderr) < 1000
        assert result.stderr.strip().isprintable()


@pytest.mark.parametrize("share", ["0/many", "-1/2", "", "0/99999999999"])
def test_a_share_that_is_none_is_refused(folder: Path, share: str) -> None:
    write_images(folder, ["a"])
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"0/1"', json.dumps(share)))
    with pytest.raises(CacheFormatError, match=r"completion\.shares\..*pattern"):
        MaskCache.open(folder)


def test_settings_nested_without_end_are_refused(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    for depth in (*range(100, 1000, 50), 10**5):
        nested = "[" * depth + "]" * depth
        text = json.dumps({**values, "determinants": {"a": 0}}).replace('{"a": 0}', f'{{"a": {nested}}}')
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CacheFormatError, match="isn't a whole manifest"):
            MaskCache.open(folder)


def test_a_manifest_of_any_size_is_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(2**40)  # takes no disk
    with pytest.raises(CacheFormatError, match="at most 16,777,216 are read"):
        MaskCache.open(folder)


@pytest.fixture
def hostile(folder: Path) -> Path:
    """A mask set whose every name speaks to the terminal."""
    with MaskWriter(folder) as writer:
        for image_id in (f"a{ESCAPE}", "sound", "\N{RIGHT-TO-LEFT OVERRIDE}b"):
            writer.write(image_id, make_mask(image_id), image_digest=make_digest(image_id), seconds=0.0)
    with h5py.File(shards(folder)[0], "r+") as file:
        for name in list(file["images"])[:2]:
            file["images"][name].attrs["record_digest"] = ESCAPE
    (folder / f"shard-0of1-00009.h5.{ESCAPE}").write_bytes(b"")
    values = json.loads((folder / "manifest.json").read_text())
    values = {**values, "created": ESCAPE, "versions": {"torch": f"2\n{ESCAPE}\x9b31m"}}
    (folder / "manifest.json").write_text(json.dumps(values))
    other = folder.with_name(f"other{ESCAPE}")
    shutil.copytree(folder, other)
    return folder.parent


@pytest.mark.parametrize("command", ["ls", "status", "verify", "gc", "export-masks"])
def test_names_are_not_printed_raw(hostile: Path, command: str, tmp_path: Path) -> None:
    if command == "export-masks":
        sets = sorted(path for path in hostile.iterdir() if "other" in path.name)
        arguments = [command, "--cache", str(sets[0]), "--out", str(tmp_path / "out")]
    else:
        arguments = ["cache", command, str(hostile)]
    result = CliRunner().invoke(main, arguments)
    text = result.stdout + result.stderr
    assert "\\x1b" in text
    assert {c for c in text if not c.isprintable()} <= {"\n"}


def test_paths_are_given_as_one_types_them(folder: Path, tmp_path: Path) -> None:
    write_images(folder, ["a"])
    other = open_mask_set(tmp_path / "other", MASK_SET)
    write_images(other, ["b", "c"])
    for form in ([folder], ["--cache", folder], [folder, "--cache", folder], [folder.parent]):
        result = CliRunner().invoke(main, ["cache", "verify", *map(str, form)])
        assert (result.exit_code, result.stdout) == (
            0,
            f"{folder}: 1 images sound, 0 damaged, 0 shards unreadable\n",
        )
    result = CliRunner().invoke(main, ["cache", "ls", str(folder), str(other), str(folder)])
    assert [line.split("  ")[1] for line in result.stdout.splitlines()] == ["1 images", "2 images"]
    result = CliRunner().invoke(main, ["cache", "gc", str(folder), "--cache", str(other)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {folder} and --cache {other} are both given; leave one of them away\n"
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["cache", "status", str(tmp_path / "empty"), "--json"])
    assert (result.exit_code, result.stdout) == (0, "[]\n")
    assert result.stderr == f"no mask set in {tmp_path / 'empty'}\n"


def test_the_default_is_a_folder_called_cache(folder: Path) -> None:
    command = [sys.executable, "-m", "wsss_pipeline", "cache", "ls"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=folder.parent.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"cache/{folder.name}  0 images")
