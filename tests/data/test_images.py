from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss_pipeline.data.images import (
    HAS_AVIF,
    HAS_HEIC,
    MAX_DECODED_PIXELS,
    ImageWarnings,
    as_pixels,
    file_digest,
    image_digest,
    image_size,
    read_image,
    read_mask,
    read_stored_image,
)
from wsss_pipeline.errors import ImageError, ResourceError

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def png16(values: np.ndarray, transparency: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel: (H, W, 1) grey, 2 with alpha, 3 RGB, 4 RGBA; ``transparency``: of its tRNS."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparency) if transparency else b""]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "pnm"])
def test_rgb_comes_as_stored(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(COLOURS), **options))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.array_equal(image, COLOURS)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    assert np.array_equal(
        read_image(save(tmp_path / "a.jpg", Image.fromarray(COLOURS), format="PNG")), COLOURS
    )


def test_what_is_transparent_is_blended_with_white(tmp_path: Path) -> None:
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:3], alpha[3] = 255, 51
    expected = COLOURS.copy()
    expected[3] = np.rint(COLOURS[3] * 0.2 + 255 * 0.8)
    expected[4:] = 255
    rgba = Image.fromarray(np.dstack([COLOURS, alpha]))
    for suffix, options in (("png", {}), ("tiff", {}), ("webp", {"lossless": True, "exact": True})):
        assert np.array_equal(read_image(save(tmp_path / f"rgba.{suffix}", rgba, **options)), expected)
    grey = Image.merge("LA", [Image.fromarray(COLOURS[..., 0]), Image.fromarray(alpha)])
    assert np.array_equal(read_image(save(tmp_path / "la.png", grey)), expected[..., [0, 0, 0]])


def test_the_colour_under_what_is_transparent_makes_no_difference(tmp_path: Path) -> None:
    alpha = np.where(COLOURS[..., 0] > 90, 255, 0).astype(np.uint8)[..., None]
    seen = []
    for number, hidden in enumerate((0, 255, np.random.default_rng(1).integers(0, 256, (6, 9, 3)))):
        colours = np.where(alpha > 0, COLOURS, np.asarray(hidden)).astype(np.uint8)
        seen.append(
            read_image(save(tmp_path / f"{number}.png", Image.fromarray(np.dstack([colours, alpha]))))
        )
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])
    assert np.array_equal(seen[0], np.where(alpha > 0, COLOURS, 255))


def test_an_image_of_which_nothing_can_be_seen_is_refused(tmp_path: Path) -> None:
    hidden = Image.fromarray(np.dstack([COLOURS, np.zeros((6, 9), np.uint8)]))
    with pytest.raises(ImageError, match=r"a\.png: every pixel is transparent.*save it without alpha"):
        read_image(save(tmp_path / "a.png", hidden))


def test_one_colour_that_is_transparent_is_white(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read_image(save(tmp_path / "l.png", grey, transparency=7))[0, :, 0].tolist() == [255, 8]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    path = save(tmp_path / "rgb.png", colour, transparency=(1, 2, 3))
    assert read_image(path).tolist() == [[[255, 255, 255], [1, 2, 4]]]
    path.write_bytes(png16(np.array([[[1, 2, 3], [65535, 0, 300]]]), struct.pack(">HHH", 1, 2, 3)))
    assert read_image(path).tolist() == [[[255, 255, 255], [255, 0, 1]]]
    path.write_bytes(png16(np.array([[[5], [65535]]]), struct.pack(">H", 5)))
    assert read_image(path)[0, :, 1].tolist() == [255, 255]


def test_alpha_of_sixteen_bits_is_blended(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png16(np.array([[[0, 0, 0, 0], [0, 65535, 0, 65535]]])))
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 255, 255], [0, 255, 0]]]
    (tmp_path / "la.png").write_bytes(png16(np.array([[[0, 65535], [0, 0]]])))
    assert read_image(tmp_path / "la.png")[0, :, 2].tolist() == [0, 255]


def test_the_digest_of_an_image_with_alpha_says_by_which_rule_it_was_read(tmp_path: Path) -> None:
    """So that a mask that was made by another rule isn't taken for current, and those of other images stay."""
    alpha = np.full((6, 9), 255, np.uint8)
    rgba = save(tmp_path / "rgba.png", Image.fromarray(np.dstack([COLOURS, alpha])))
    palette = save(tmp_path / "p.png", Image.fromarray(COLOURS).convert("P"), transparency=3)
    for path in (rgba, palette):
        assert image_digest(path) == read_stored_image(path).digest != file_digest(path)
    for suffix in ("png", "jpg", "gif", "tiff", "webp", "bmp", "ppm"):
        plain = save(tmp_path / f"plain.{suffix}", Image.fromarray(COLOURS))
        assert image_digest(plain) == read_stored_image(plain).digest == file_digest(plain)
    (tmp_path / "text.png").write_bytes(b"abc")
    assert image_digest(tmp_path / "text.png") == file_digest(tmp_path / "text.png")


def test_grey_and_one_bit_fill_three_channels(tmp_path: Path) -> None:
    grey = COLOURS[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "l.png", Image.fromarray(grey))), np.dstack([grey] * 3))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(
        read_image(save(tmp_path / "1.png", bits)), np.dstack([(grey > 127) * np.uint8(255)] * 3)
    )


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_a_palette_gives_its_colours_and_white_for_what_is_transparent(
    tmp_path: Path, transparency: int | bytes | None
) -> None:
    indexed = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    indexed.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(save(tmp_path / "p.png", indexed, **options))
    second = [200, 0, 0] if transparency is None else [255, 255, 255]
    third = [127, 127, 252] if isinstance(transparency, bytes) else [0, 0, 250]
    assert image.tolist() == [[[10, 20, 30], second, third]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image = read_image(save(tmp_path / "a.jpg", inks, quality=100))
    assert image.shape == (8, 8, 3)
    assert np.abs(image.astype(int) - [0, 255, 255]).max() <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 4, 128, 255]
    for name in ("a.png", "a.tiff"):
        assert read_image(save(tmp_path / name, Image.fromarray(values)))[0, :, 0].tolist() == expected
    assert (
        read_image(save(tmp_path / "i.tiff", Image.fromarray(values.astype(np.int32))))[0, :, 1].tolist()
        == expected
    )


TWELVE = np.array([[[0, 2048, 4095], [1, 1000, 5000]]], np.uint16)
TWELVE_SEEN = [[[0, 128, 255], [0, 62, 255]]]


def test_a_pixel_range_says_what_is_black_and_white_of_more_than_eight_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(TWELVE))
    assert read_image(path, (0, 4095)).tolist() == TWELVE_SEEN
    assert np.array_equal(read_stored_image(path, (0, 4095)).pixels, read_image(path, (0, 4095)))
    path.write_bytes(png16(TWELVE[..., :1]))
    assert read_image(path, (0, 4095))[0, :, 0].tolist() == [0, 0]
    for values in (TWELVE[..., 1], TWELVE[..., 1].astype(np.int32)):
        tiff = save(tmp_path / "a.tiff", Image.fromarray(values))
        assert as_pixels(tiff, (0, 4095))[0, :, 2].tolist() == [128, 62]
        with Image.open(tiff) as opened:
            assert as_pixels(opened, (0, 4095))[0, :, 2].tolist() == [128, 62]
    floats = save(tmp_path / "f.tiff", Image.fromarray(np.array([[-1000, 0, 1000, 3000]], np.float32)))
    assert read_image(floats, (-1000, 1000))[0, :, 0].tolist() == [0, 128, 255, 255]
    signed = save(tmp_path / "i.tiff", Image.fromarray(np.array([[-1000, 0, 2000]], np.int32)))
    assert read_image(signed, (-1000, 1000))[0, :, 0].tolist() == [0, 128, 255]


def test_a_pixel_range_leaves_alpha_and_eight_bits_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(np.array([[[4095, 0, 4095, 65535], [0, 0, 0, 0], [0, 4095, 0, 32768]]])))
    assert read_image(path, (0, 4095)).tolist() == [[[255, 0, 255], [255, 255, 255], [127, 255, 127]]]
    for suffix in ("png", "tiff", "bmp"):
        plain = save(tmp_path / f"b.{suffix}", Image.fromarray(COLOURS))
        assert np.array_equal(read_image(plain, (0, 4095)), COLOURS)


def test_a_file_that_states_its_largest_value_needs_no_range(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    for content in (
        b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes(),
        b"P2 3 1 4095 0 2048 4095\n",
    ):
        path.write_bytes(content)
        for pixel_range in (None, (0, 1000)):
            stored = read_stored_image(path, pixel_range)
            assert stored.pixels[0, :, 0].tolist() == [0, 128, 255]
            assert not stored.remarks
    path.write_bytes(b"P5 3 1 65535\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert read_image(path, (0, 4095))[0, :, 0].tolist() == [0, 128, 255]
    # 12 bits a value, packed
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags)
    packed = bytes([0x80, 0x0F, 0xFF, 0])
    (tmp_path / "a.tiff").write_bytes(
        b"II*\0" + struct.pack("<I", 12) + packed + directory + struct.pack("<I", 0)
    )
    assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (TWELVE[..., :1], "has values from 0 to 1, less than half of 0 to 65535"),
        (TWELVE, "has values from 0 to 5119, less than half of 0 to 65535"),
        (np.array([[[40000], [60000]]]), "has values from 40000 to 60000"),
        (np.array([[[4095, 0, 0, 65535], [0, 0, 0, 0]]]), "has values from 0 to 4095, less than half"),
    ],
)
def test_values_that_use_little_of_their_range_are_worth_a_word(
    tmp_path: Path, values: np.ndarray, said: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(values))
    remark = read_stored_image(path).remarks["range"]
    assert remark.startswith(said)
    assert "--pixel-range LOW:HIGH" in remark
    assert not read_stored_image(path, (0, 4095)).remarks


def test_values_that_use_their_range_and_eight_bits_are_not_worth_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for values in (np.array([[[0], [40000]]]), np.array([[[0, 0, 40000], [9, 9, 9]]])):
        path.write_bytes(png16(values))
        assert not read_stored_image(path).remarks
    assert not read_stored_image(save(path, Image.new("L", (5, 5), 3))).remarks


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(np.array([[0, np.nan]], np.float32)))
    for pixel_range in (None, (0.0, 1.0)):
        with pytest.raises(ImageError, match=r"a\.tiff: holds values that aren't numbers"):
            read_image(path, pixel_range)


def test_of_many_images_with_a_remark_few_are_named_and_all_counted(caplog: pytest.LogCaptureFixture) -> None:
    with ImageWarnings() as warnings_:
        for number in range(10):
            warnings_.warn(
                Path(f"{number}.png"), {"range": "is dark", **({"pages": "is long"} if number else {})}
            )
    assert [record.getMessage() for record in caplog.records if "dark" in record.getMessage()] == [
        "0.png is dark",
        "1.png is dark",
        "2.png is dark",
    ]
    assert "and 7 more images that use less than half of their range" in caplog.text
    assert "and 6 more files with several pages or frames" in caplog.text


def pages(path: Path, *sizes: tuple[int, int, dict[int, int]]) -> Path:
    first, *others = (Image.new("RGB", (width, height)) for width, height, _ in sizes)
    for image, (_, _, tags) in zip((first, *others), sizes, strict=True):
        image.encoderinfo = {"tiffinfo": tags}
    return save(path, first, save_all=True, append_images=others)


def test_further_pages_are_told_of_but_not_views_of_the_same(tmp_path: Path) -> None:
    several = pages(tmp_path / "a.tiff", (40, 30, {}), (40, 30, {}))
    assert "first one counts" in read_stored_image(several).remarks["pages"]
    overview = pages(tmp_path / "b.tiff", (40, 30, {}), (20, 15, {254: 1}))
    assert not read_stored_image(overview).remarks
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        moving = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
        assert list(read_stored_image(moving).remarks) == ["pages"]
    phone = save(tmp_path / "a.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert not read_stored_image(phone).remarks


def test_a_first_page_that_is_a_thumbnail_is_refused(tmp_path: Path) -> None:
    path = pages(tmp_path / "a.tiff", (40, 30, {}), (400, 300, {}))
    for read in (read_image, read_stored_image):
        with pytest.raises(
            ImageError, match=r"a\.tiff: page 1 has 40 x 30 pixels, page 2 400 x 300: .*thumbnail"
        ):
            read(path)


def test_a_header_of_endless_comments_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    with path.open("wb") as file:
        file.write(b"P6 #")
        file.truncate(2**29)  # takes no space on the disk
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"a\.ppm: can't be read: not an image"):
            read(path)
    path.write_bytes(b"P6 # made by hand\n1 1 # a pixel\n255\n\1\2\3")
    assert read_image(path).tolist() == [[[1, 2, 3]]]


def test_bands_that_make_no_picture_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def tiff(bands: int, bits: int, kind: int = 1) -> bytes:
        size = 4 * bands * bits // 8
        tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, 1), (273, 8), (277, bands), (278, 2)]
        tags += [(279, size), (339, kind)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        start = struct.pack("<4sI", b"II*\0", 8 + size) + bytes(size)
        return start + struct.pack("<H", len(tags)) + entries + bytes(4)

    path = tmp_path / "a.tif"
    for content, said in (
        (tiff(5, 16), "a TIFF with 5 bands of 16-bit integers"),
        (tiff(2, 16), "a TIFF with 2 bands of 16-bit integers"),
        (tiff(3, 32, 3), "a TIFF with 3 bands of 32-bit floating point"),
        (tiff(1000, 8), "a TIFF with 1000 bands of 8-bit integers"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=rf"a\.tif: {said}.*save three of the bands as RGB"):
            read_image(path)
    assert not caplog.text + capfd.readouterr().err, "Pillow says nothing of its own"


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            r"HEIC, which isn't read; install wsss-pipeline\[heic\], or convert",
        ),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000, which isn't read; convert to JPEG or PNG"),
        (b"\xff\x0a\x10", "JPEG XL"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.4", "PDF"),
        (bytes(128) + b"DICM", "DICOM"),
    ],
)
def test_content_of_a_format_that_is_not_read_is_named_whatever_the_suffix(
    tmp_path: Path, without_heic: None, start: bytes, said: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(start + bytes(300))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=rf"a\.jpg: its content is {said}"):
            read(tmp_path / "a.jpg")


def test_a_mask_whose_pixels_have_changed_is_refused(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 3, (12, 16)).astype(np.uint8)
    content = bytearray(save(tmp_path / "a.png", Image.fromarray(mask)).read_bytes())
    start = content.find(b"IDAT") + 6
    for place in range(start, start + 40):
        content[place] ^= 4
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png"):
            read_mask(tmp_path / "a.png")
        content[place] ^= 4


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no reader of AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 24), (200, 30, 60))
    path = save(tmp_path / "a.jpg", image, format="AVIF", quality=100)
    assert np.abs(read_image(path).astype(int) - np.array(image)).max() <= 4


def test_what_git_lfs_is_yet_to_fetch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        ImageError, match="a pointer of Git LFS in place of the image; fetch it with git lfs pull"
    ):
        read_image(path)


@pytest.mark.skipif(not HAS_HEIC, reason="the optional package pillow-heif isn't installed")
def test_heic_is_read(tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    image = Image.new("RGB", (64, 48), (200, 30, 60))
    path = save(tmp_path / "a.heic", image, quality=100)
    assert np.abs(read_image(path).astype(int) - np.array(image)).max() <= 4


def test_float_grey_is_a_fraction_or_a_byte(tmp_path: Path) -> None:
    def read(values: list[float]) -> list[int]:
        grey = Image.fromarray(np.array([values], np.float32))
        return list(read_image(save(tmp_path / "f.tiff", grey))[0, :, 2].tolist())

    assert read([0, 0.5, 1]) == [0, 128, 255]
    assert read([0, 1, 200.4, 255]) == [0, 1, 200, 255]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1, 5]], np.int32),
        np.array([[0, 65536]], np.int32),
        np.array([[-0.5, 1]], np.float32),
        np.array([[0, 300]], np.float32),
    ],
)
def test_grey_values_without_a_rule_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"a\.tiff: .*save them as 8 or 16 bits"):
        read_image(save(tmp_path / "a.tiff", Image.fromarray(values)))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read_image(path), np.array(frames[0]))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_rotation_is_told_but_not_applied(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = save(tmp_path / f"upright.{suffix}", Image.fromarray(COLOURS))
    rotated = save(tmp_path / f"rotated.{suffix}", Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(read_image(rotated), read_image(upright))
    assert image_size(rotated) == (9, 6)
    assert list(read_stored_image(rotated).remarks) == ["rotation"]
    assert not read_stored_image(upright).remarks


def test_size_comes_from_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(1234, 567))
    assert image_size(tmp_path / "a.png") == (1234, 567)


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (MAX_DECODED_PIXELS + 1, 1), (12_000, 12_000)])
def test_absurd_sizes_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    for read in (read_image, read_mask, image_size, read_stored_image):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match=r"a\.png: its header says .* the limit is 134217728"):
                read(tmp_path / "a.png")


def test_large_sizes_under_the_limit_bring_no_warning(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "a.png") == (10_000, 10_000)


def test_warning_filters_are_as_before_after_reading_in_threads(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read_image(path), range(200)))
    assert list(warnings.filters) == before


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.jpg: ") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_damaged_files_raise_nothing_but_image_errors(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(1)
    messages = []
    path = tmp_path / "damaged.png"
    for _ in range(60):
        data = np.frombuffer(encoded(kind), np.uint8).copy()
        data[generator.integers(0, min(len(data), 300), 4)] = generator.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        for read in (read_image, read_mask, image_size, read_stored_image):
            try:
                read(path)
            except ImageError as error:
                messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    "content", [b"hello, not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "a.png")


def test_missing_empty_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [("gone.png", "No such file"), ("empty.png", "empty"), ("pipe.png", "not a file")]:
        for read in (read_image, read_mask, image_size, read_stored_image, file_digest):
            with pytest.raises(ImageError, match=rf"{name}: .*{reason}"):
                read(tmp_path / name)
    with pytest.raises(ImageError, match="not a file"):
        read_image(tmp_path)


def test_palette_masks_give_indices_whatever_the_palette(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1, 255]], np.uint8)).convert("P")
    indexed.putpalette([0, 0, 0, 128, 0, 0] + [7] * 762)
    mask = read_mask(save(tmp_path / "m.png", indexed, transparency=0))
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_integer_masks_keep_their_values(tmp_path: Path, dtype: type) -> None:
    values: np.ndarray = np.array([[0, 1, 20], [21, 254, 255]], dtype)
    assert read_mask(save(tmp_path / "m.tiff", Image.fromarray(values))).tolist() == values.tolist()


def test_one_bit_masks_are_0_and_1(tmp_path: Path) -> None:
    assert read_mask(save(tmp_path / "m.png", Image.fromarray(np.array([[False, True]])))).tolist() == [
        [0, 1]
    ]


@pytest.mark.parametrize("values", [np.array([[0, 256]], np.uint16), np.array([[-1, 3]], np.int32)])
def test_masks_beyond_a_byte_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(ImageError, match=f"run from {values.min()} to {values.max()}"):
        read_mask(save(tmp_path / "m.tiff", Image.fromarray(values)))


def test_colour_and_jpeg_masks_are_refused_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"m\.png: .*one class index a pixel, but this holds colours; save"):
        read_mask(save(tmp_path / "m.png", Image.fromarray(COLOURS)))
    with pytest.raises(ImageError, match="JPEG changes the values of a mask"):
        read_mask(save(tmp_path / "m.jpg", Image.fromarray(COLOURS[..., 0])))


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_stored_image_is_pixels_and_digest_of_the_same_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    stored = read_stored_image(path)
    assert np.array_equal(stored.pixels, read_image(path))
    assert stored.digest == file_digest(path)
    assert not stored.remarks


def test_an_endless_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    for read in (read_stored_image, read_image, read_mask, image_size, file_digest):
        with pytest.raises(ImageError, match=r"a\.png: 1,099,511,627,776 bytes are too many"):
            read(tmp_path / "a.png")


def test_a_damaged_exif_block_counts_as_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert not read_stored_image(path).remarks


def test_a_tiff_is_turned_by_its_own_orientation_which_is_no_rotation_left(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(COLOURS), tiffinfo={0x0112: 6})
    stored = read_stored_image(path)
    assert np.array_equal(stored.pixels, np.rot90(COLOURS, -1))
    assert image_size(path) == stored.pixels.shape[1::-1]
    assert not stored.remarks


def test_an_image_in_any_form_gives_the_same_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    with Image.open(path) as opened:
        forms = [path, str(path), opened, Image.fromarray(COLOURS), COLOURS, np.asfortranarray(COLOURS)]
        for form in forms:
            pixels = as_pixels(form)
            assert np.array_equal(pixels, COLOURS)
            assert pixels.flags.c_contiguous
    grey = COLOURS[..., 0]
    for form in (grey, Image.fromarray(grey), save(tmp_path / "grey.png", Image.fromarray(grey))):
        assert np.array_equal(as_pixels(form), np.dstack([grey] * 3))
    alpha = np.zeros((6, 9), np.uint8)
    alpha[0] = 255
    hidden = Image.fromarray(np.dstack([COLOURS, alpha]))
    assert np.array_equal(as_pixels(hidden), np.vstack([COLOURS[:1], np.full((5, 9, 3), 255)]))
    assert hidden.mode == "RGBA", "the caller's image stays as it is"


@pytest.mark.parametrize(
    "image",
    [
        COLOURS.astype(np.float32),
        COLOURS[None],
        COLOURS[..., :2],
        np.zeros((0, 4, 3), np.uint8),
        COLOURS[0, 0],
    ],
)
def test_arrays_that_are_no_image_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"an image is a uint8 array \(H, W, 3\) RGB or \(H, W\), not"):
        as_pixels(image)


def test_an_opened_image_that_is_cut_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encoded("JPEG")[:900])
    with (
        Image.open(tmp_path / "cut.jpg") as opened,
        pytest.raises(ImageError, match="the image given: can't be"),
    ):
        as_pixels(opened)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_machine_ran_out_of_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    for read in (read_stored_image, read_image, read_mask, image_size, file_digest):
        with pytest.raises(ResourceError, match=f"{os.strerror(number)}; .*--workers") as caught:
            read(path)
        assert "replace" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_an_image_that_cannot_be_reached_is_not_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png: can't be read: ") as caught:
        read_image(path)
    assert "replace" not in str(caught.value)


def test_a_lack_of_memory_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", refuse)
    for image in (path, Image.fromarray(COLOURS)):
        with pytest.raises(MemoryError):
            as_pixels(image)


def test_a_message_is_short_however_long_the_path_is(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path.joinpath(*["d" * 200] * 15, "\u202e\x1b[2J.png"))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_limit_on_open_files_is_told_from_bad_images_and_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", Image.fromarray(COLOURS))
    (tmp_path / "l.json").write_text("{}")
    code = f"""
import os, resource
from pathlib import Path
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import file_digest, image_size, read_image
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import ResourceError
folder = Path({str(tmp_path)!r})
classes = load_class_set("voc12")
read_image(folder / "a.png")
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
for read, argument in (
    *((read, folder / "a.png") for read in (file_digest, image_size, read_image)),
    (find_images, folder),
    (find_images, folder / "a.tar"),
    (lambda path: read_labels(path, {{}}, classes), folder / "l.json"),
):
    try:
        read(argument)
    except ResourceError as error:
        assert "ulimit -n" in str(error)
    else:
        raise AssertionError(read)
"""
    (tmp_path / "a.tar").write_bytes(b"")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
