from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pytest
from cache_samples import assert_equal, make_digest, make_mask, write_images

from wsss_pipeline.cache import MaskCache, MaskWriter, PseudoMask
from wsss_pipeline.cache.records import Parts, escape_id, record_digest
from wsss_pipeline.errors import CacheRecordError

NASTY_IDS = [
    "a/b",
    "a%2Fb",
    "ü",
    "猫",
    "%2F",
    "%",
    "%25",
    ".",
    "..",
    "...",
    "x" * 300,
    "a b",
    " a ",
    "-",
    "images",
]


@pytest.mark.parametrize("cams", [False, True])
def test_nasty_ids_come_back_with_their_own_masks(folder: Path, cams: bool) -> None:
    write_images(folder, NASTY_IDS, cams=cams)
    cache = MaskCache.open(folder)
    assert list(cache) == sorted(NASTY_IDS)
    for image_id in NASTY_IDS:
        assert_equal(cache[image_id], make_mask(image_id, cams=cams))
    assert any(not make_mask(image_id).labels for image_id in NASTY_IDS), (
        "an image without labels is among them"
    )


@pytest.mark.parametrize("image_id", NASTY_IDS)
def test_escaped_ids_are_one_component_and_unescape(image_id: str) -> None:
    escaped = escape_id(image_id)
    assert "/" not in escaped
    assert escaped != "."
    assert unquote(escaped) == image_id


def test_the_escape_is_that_of_the_contract() -> None:
    assert escape_id("a/b%c.d") == "a%2Fb%25c.d"


@pytest.mark.parametrize("image_id", ["", "a\0b", "a\udcffb"])
def test_ids_that_hdf5_cannot_hold_are_refused_and_the_writer_goes_on(folder: Path, image_id: str) -> None:
    with MaskWriter(folder) as writer:
        with pytest.raises(CacheRecordError, match="rename"):
            writer.write(image_id, make_mask("a"), image_digest="0" * 64, seconds=0.0)
        writer.write("good", make_mask("good"), image_digest="0" * 64, seconds=0.0)
    assert list(MaskCache.open(folder)) == ["good"]


def test_layout_is_readable_with_plain_h5py(folder: Path) -> None:
    write_images(folder, ["a/b", "c"], cams=True)
    expected = make_mask("a/b", cams=True)
    (shard,) = folder.glob("shard-*.h5")
    for path in (shard, folder / "index.h5"):
        with h5py.File(path) as file:
            group = file["images/a%2Fb"]
            np.testing.assert_array_equal(group["mask"][()], expected.mask)
            np.testing.assert_array_equal(group["confidence"][()], expected.confidence)
            np.testing.assert_array_equal(group["cams"][()], expected.cams)
            assert tuple(group.attrs["labels"]) == expected.labels
            assert group.attrs["image_digest"] == make_digest("a/b")
            assert group.attrs["seconds"] == 0.5
            assert group.attrs["scale"] == 1.0
            assert (group.attrs["width"], group.attrs["height"]) == (16, 12)
            for name in ("mask", "confidence"):
                dataset = group[name]
                assert (dataset.compression, dataset.compression_opts) == ("gzip", 4)
                assert dataset.shuffle
                assert dataset.fletcher32


def test_everything_in_a_record_is_under_its_digest(folder: Path) -> None:
    write_images(folder, ["a"])
    (shard,) = folder.glob("shard-*.h5")
    for name, value in {
        "image_digest": "f" * 64,
        "scale": 0.5,
        "width": 17,
        "record_digest": "0" * 64,
    }.items():
        with h5py.File(shard, "r+") as file:
            kept = file["images/a"].attrs[name]
            file["images/a"].attrs[name] = value
        with (
            MaskCache.open(folder) as cache,
            pytest.raises(CacheRecordError, match=rf"'a' in .*{shard.name} is damaged .*cache verify"),
        ):
            cache["a"]
        with h5py.File(shard, "r+") as file:
            file["images/a"].attrs[name] = kept
    assert_equal(MaskCache.open(folder)["a"], make_mask("a"))


def test_a_record_under_the_name_of_another_image_is_damaged(folder: Path) -> None:
    write_images(folder, ["a"])
    (shard,) = folder.glob("shard-*.h5")
    with h5py.File(shard, "r+") as file:
        file.move("images/a", "images/b")
    with pytest.raises(CacheRecordError, match="image 'b'"):
        MaskCache.open(folder)["b"]


def test_a_large_image_is_stored(folder: Path) -> None:
    large = PseudoMask(np.zeros((2000, 1500), np.uint8), np.full((2000, 1500), 200, np.uint8), ("cat",))
    with MaskWriter(folder) as writer:
        writer.write("large", large, image_digest="0" * 64, seconds=9.0, scale=0.25)
    cache = MaskCache.open(folder)
    assert_equal(cache["large"], large)
    info = cache.record_info("large")
    assert (info.scale, info.seconds, info.width, info.height, info.has_cams) == (
        0.25,
        9.0,
        1500,
        2000,
        False,
    )


def test_the_digest_of_a_record_is_the_same_for_ever() -> None:
    mask, confidence = np.arange(6, dtype=np.uint8).reshape(2, 3), np.full((2, 3), 200, np.uint8)
    cams = np.full((2, 2, 3), 0.5, np.float16)
    parts = Parts((2, 3), ("cat", "d\u00f6g"), {"mask": mask, "confidence": confidence, "cams": cams})
    expected = "32f42af03d306e2b510ebfbacd04aff9e0681d51b79d47343068dedb891a2b34"
    assert record_digest("a/b", parts, "0" * 64, 0.5) == expected
