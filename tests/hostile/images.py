"""A thousand damaged, strange and hostile images out of good ones, the same from every seed.

python -m tests.hostile.images FOLDER [--count 1000]
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsss_pipeline.data.images import HAS_AVIF

FORMATS = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "WEBP": "webp",
    "PPM": "ppm",
}
FORMATS |= {"AVIF": "avif"} if HAS_AVIF else {}

# id -> (file name's suffix, content, whether it must be usable: None where either will do)
Sample = tuple[str, bytes, bool | None]


def build(
    folder: Path, count: int = 1000, seed: int = 0, *, has_bombs: bool = True
) -> dict[str, bool | None]:
    """Write ``count`` images; their ids, and whether each must be usable (None: either will do)."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    expected: dict[str, bool | None] = {}
    rounds = 0 if has_bombs else 1
    while len(expected) < count:
        for name, (suffix, content, is_usable) in _samples(chance, rounds):
            if len(expected) < count:
                image_id = f"{len(expected):04}-{name}"
                (folder / f"{image_id}.{suffix}").write_bytes(content)
                expected[image_id] = is_usable
        rounds += 1
    return expected


def _samples(chance: random.Random, rounds: int) -> Iterator[tuple[str, Sample]]:
    good = _photograph(chance.randrange(10**6))
    yield from _kinds(good)
    for kind, suffix in FORMATS.items():
        content = _encoded(good, kind)
        for tenth in range(10):
            # some formats keep the image whole without their last bytes
            yield f"cut-{kind}-{tenth}", (suffix, content[: len(content) * tenth // 10], None)
        for number in range(4):
            yield f"flipped-{kind}-{number}", (suffix, _flipped(content, chance, 1 + 8 * number), None)
        other = chance.choice([ending for ending in FORMATS.values() if ending != suffix])
        yield f"suffix-{kind}", (other, content, True)
        yield f"appended-{kind}", (suffix, content + chance.randbytes(500), True)
        yield f"prefixed-{kind}", (suffix, chance.randbytes(20) + content, False)
    if rounds == 0:
        yield from _bombs(good)
    yield "empty", ("png", b"", False)
    yield "noise", ("jpg", chance.randbytes(3000), False)
    yield "text", ("png", b"<html><script>alert(1)</script></html>", False)
    yield "pickle", ("png", b"\x80\x04\x95\x1e\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.", False)
    yield "shell", ("gif", b"#!/bin/sh\ntouch /tmp/owned\n", False)


def _photograph(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _flipped(content: bytes, chance: random.Random, count: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(count):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _kinds(good: Image.Image) -> Iterator[tuple[str, Sample]]:
    """Kinds of images that are unusual and usable."""
    grey16 = Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257)
    transparent = good.convert("RGBA")
    transparent.putalpha(good.convert("L"))
    frames = [good.rotate(angle) for angle in (90, 180)]
    make: dict[str, tuple[str, Callable[[], bytes]]] = {
        "cmyk": ("jpg", lambda: _encoded(good.convert("CMYK"), "JPEG")),
        "grey": ("png", lambda: _encoded(good.convert("L"), "PNG")),
        "one-bit": ("png", lambda: _encoded(good.convert("1"), "PNG")),
        "grey-16": ("png", lambda: _encoded(grey16, "PNG")),
        "palette": ("png", lambda: _encoded(good.convert("P"), "PNG")),
        "palette-transparent": ("png", lambda: _encoded(good.convert("P"), "PNG", transparency=3)),
        "alpha": ("png", lambda: _encoded(transparent, "PNG")),
        "animated-gif": ("gif", lambda: _encoded(good, "GIF", save_all=True, append_images=frames)),
        "animated-webp": ("webp", lambda: _encoded(good, "WEBP", save_all=True, append_images=frames)),
        "animated-png": ("png", lambda: _encoded(good, "PNG", save_all=True, append_images=frames)),
        "progressive": ("jpg", lambda: _encoded(good, "JPEG", progressive=True)),
        "rotated-by-exif": ("jpg", lambda: _encoded(good, "JPEG", exif=_exif({0x0112: 6}))),
        "one-pixel": ("png", lambda: _encoded(good.resize((1, 1)), "PNG")),
        "one-row": ("png", lambda: _encoded(good.resize((300, 1)), "PNG")),
        "one-column": ("png", lambda: _encoded(good.resize((1, 300)), "PNG")),
        "capital-suffix": ("PNG", lambda: _encoded(good, "PNG")),
        "jfif": ("jfif", lambda: _encoded(good, "JPEG")),
        "jpe": ("JPE", lambda: _encoded(good, "JPEG")),
        "grey-alpha": ("png", lambda: _encoded(transparent.convert("LA"), "PNG")),
        "grey-12": ("tiff", lambda: _encoded(Image.fromarray(np.asarray(grey16) // 16), "TIFF")),
        "rgb-16": ("png", lambda: _png(2, 1, b"\0" + bytes(range(12)), depth=16)),
        "rgba-16": ("png", lambda: _png(1, 1, b"\0" + b"\xff" * 8, depth=16, colour=6)),
        "pgm-12": ("pgm", lambda: b"P5 2 1 4095\n\x0f\xff\x00\x01"),
        "pgm-text": ("pnm", lambda: b"P2 # of 10 bits\n2 1 1023\n1023 0\n"),
        "pages": ("tif", lambda: _encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])),
    }
    for name, (suffix, encode) in make.items():
        yield name, (suffix, encode(), True)


def _exif(entries: dict[int, Any]) -> bytes:
    exif = Image.Exif()
    for tag, value in entries.items():
        exif[tag] = value
    return exif.tobytes()


def _bombs(good: Image.Image) -> Iterator[tuple[str, Sample]]:
    """Small files that ask for much memory or time."""
    for width, height in ((2**31 - 1, 2**31 - 1), (65_000, 65_000), (0, 10), (10**6, 10**6), (2**27 + 1, 1)):
        yield f"png-of-{width}x{height}", ("png", _png(width, height, b"\0" * 100), False)
    # under the limit on pixels, and Pillow fills up the rows that a whole stream lacks
    yield "zip-bomb", ("png", _png(11_000, 11_000, b"\0" * (11_000 * 3 + 1) * 300), None)
    yield "bmp-of-2g", ("bmp", _bmp(2**31 - 1, 1), False)
    yield "gif-of-65535", ("gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;", False)
    text = zlib.compress(b"a" * 50_000_000)
    whole = _encoded(good, "PNG")
    bomb = whole[:33] + _chunk(b"zTXt", b"Comment\0\0" + text) + whole[33:]
    yield "png-text-bomb", ("png", bomb, None)
    yield "png-profile-bomb", ("png", whole[:33] + _chunk(b"iCCP", b"p\0\0" + text) + whole[33:], None)
    yield (
        "exif-bomb",
        ("jpg", _encoded(good, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 60_000), None),
    )
    loop = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    yield "exif-loop", ("jpg", _encoded(good, "JPEG", exif=loop), True)
    for size in (b"999999999 999999999", b"9999999999999999999999 1", b"-1 5", b"0 5"):
        yield "ppm-sizes", ("ppm", b"P6 " + size + b" 255\n" + bytes(99), False)
    yield "ppm-maximum", ("pgm", b"P5 2 1 99999999\n" + bytes(99), False)
    yield "ppm-endless-comment", ("ppm", b"P6 #" + b"a" * 5_000_000, False)
    yield "ppm-endless-number", ("pgm", b"P2 2 1 255 " + b"1" * 5_000_000, None)
    hidden = good.convert("RGBA")
    hidden.putalpha(0)
    yield "all-transparent", ("png", _encoded(hidden, "PNG"), False)
    yield "tiff-of-pages", ("tif", _tiff_of_pages(50_000), None)
    yield "tiff-of-one-page-for-ever", ("tif", _tiff_of_pages(3, loop=True), None)
    for bands in (2, 5, 1000, 65_535):
        yield f"tiff-of-{bands}-bands", ("tif", _tiff_of_pages(1, bands=bands), None if bands == 2 else False)
    thumbnail, large = good.resize((4, 4)), good.resize((64, 64))
    content = _encoded(thumbnail, "TIFF", save_all=True, append_images=[large])
    yield "thumbnail-first", ("tif", content, False)
    for brand in (b"heic", b"avif", b"mif1", b"jp2 ", b"xxxx"):
        box = struct.pack(">I", 2**31 - 1) + b"ftyp" + brand + bytes(8)
        yield f"brand-{brand.decode().strip()}", ("jpg", box + bytes(300), False)
    many = b"".join(struct.pack("<HHII", 0x0112, 3, 2**31, 0) for _ in range(5000))
    entries = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + many
    yield "exif-many", ("jpg", _encoded(good, "JPEG", exif=entries), None)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _tiff_of_pages(count: int, *, bands: int = 3, loop: bool = False) -> bytes:
    """Black pages of 2 x 2 pixels that all have the same strip; with ``loop`` the last leads to the first."""
    tags = [(256, 2), (257, 2), (258, 8), (259, 1), (262, 2 if bands == 3 else 1), (273, 8), (277, bands)]
    tags += [(278, 2), (279, 4 * bands)]
    start, length = 8 + 4 * bands, 2 + 12 * len(tags) + 4
    entries = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, n) for t, n in tags)
    followers = [start + (page + 1) * length for page in range(count - 1)] + [start if loop else 0]
    directories = b"".join(entries + struct.pack("<I", follower) for follower in followers)
    return b"II*\0" + struct.pack("<I", start) + bytes(4 * bands) + directories


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    print(len(build(options.folder, options.count)), "images in", options.folder)
