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
    MAX_DECODED_PIXELS,
    as_pixels,
    file_digest,
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


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
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


def test_alpha_is_dropped_and_hidden_colour_stays(tmp_path: Path) -> None:
    rgba = np.dstack([COLOURS, np.zeros((6, 9), np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", Image.fromarray(rgba))), COLOURS)
    grey = Image.merge("LA", [Image.fromarray(COLOURS[..., 0]), Image.new("L", (9, 6), 0)])
    assert np.array_equal(read_image(save(tmp_path / "la.png", grey)), COLOURS[..., [0, 0, 0]])


def test_grey_and_one_bit_fill_three_channels(tmp_path: Path) -> None:
    grey = COLOURS[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "l.png", Image.fromarray(grey))), np.dstack([grey] * 3))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(
        read_image(save(tmp_path / "1.png", bits)), np.dstack([(grey > 127) * np.uint8(255)] * 3)
    )


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette_gives_its_colours_transparent_or_not(
    tmp_path: Path, transparency: int | bytes | None
) -> None:
    indexed = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    indexed.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(save(tmp_path / "p.png", indexed, **options))
    assert image.tolist() == [[[10, 20, 30], [200, 0, 0], [0, 0, 250]]]


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
        np.array([[0, np.nan]], np.float32),
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
    assert read_stored_image(rotated).has_rotation
    assert not read_stored_image(upright).has_rotation


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
    assert not stored.has_rotation


def test_an_endless_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    for read in (read_stored_image, read_image, read_mask, image_size, file_digest):
        with pytest.raises(ImageError, match=r"a\.png: 1,099,511,627,776 bytes are too many"):
            read(tmp_path / "a.png")


def test_a_damaged_exif_block_counts_as_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert not read_stored_image(path).has_rotation


def test_a_tiff_is_turned_by_its_own_orientation_which_is_no_rotation_left(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(COLOURS), tiffinfo={0x0112: 6})
    stored = read_stored_image(path)
    assert np.array_equal(stored.pixels, np.rot90(COLOURS, -1))
    assert image_size(path) == stored.pixels.shape[1::-1]
    assert not stored.has_rotation


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
    hidden = Image.fromarray(np.dstack([COLOURS, np.zeros((6, 9), np.uint8)]))
    assert np.array_equal(as_pixels(hidden), COLOURS)
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
