"""The only decoder of images and masks, with one stated rule for every kind of file.

Pillow decodes; OpenCV where colours of 16 bits are to keep them all, which Pillow has no mode for.

EXIF orientation is ignored: arrays come in the order in which the pixels are stored, so that image and
mask always fit together (``StoredImage`` tells whether a file carries the tag). TIFF alone has an
orientation of its own outside EXIF, which Pillow applies to size and pixels alike. Colour profiles are
ignored. Of an animation or a file with several pages the first one counts. What is transparent is blended
with white, as browsers and most viewers show it, and as img2dataset made the images of LAION, on which OpenCLIP's
models were trained.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from io import BufferedReader, BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from wsss_pipeline.config import PixelRange
from wsss_pipeline.data.class_lists import Color
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.few_warnings import FewWarnings
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.errors import ImageError, MaskError, WsssError
from wsss_pipeline.files import GIT_LFS_POINTER, check_machine, open_plain
from wsss_pipeline.runtime.output import one_line

# Nothing with more pixels is decoded; an RGB image of that size takes 400 MB. It lies under the number
# at which Pillow itself refuses.
MAX_DECODED_PIXELS = 2**27

# Nor is a larger file read: uncompressed, an image of that many pixels has at most 8 bytes for each.
MAX_FILE_BYTES = 2**30 + 2**20

# there only where this machine's Pillow has it, and where the optional package is installed
HAS_AVIF, HAS_HEIC = features.check("avif"), find_spec("pillow_heif") is not None

# Pillow's other readers are left out: some start external programs. TIFF and WebP aren't among those that
# Pillow registers by itself.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", TiffImageFile.format, WebPImageFile.format)
_ORIENTATION, _SUBFILE, _BITS, _BANDS, _SAMPLE_FORMAT = 0x0112, 0x00FE, 0x0102, 0x0115, 0x0153
_INDICES = "(0 background, 1.. classes, 255 ignore)"
_WIDE_INDICES = "(0 background, 1.. classes, 65535 ignore)"
_LONGEST_PATH = 200  # characters of one, in a message
_MOST_PAGES = 100  # that are looked at
_LONGEST_START = 140  # bytes of a file that tell its format
_LONGEST_HEADER = 2**16  # of netpbm's, bytes
_COMMENT = re.compile(rb"#[^\r\n]*")
_THUMBNAIL = 4  # times its pixels that another page has

# Changes the digest of the images alone whose pixels the rule changes: what was made before of the others stays.
_BLENDED = b"\0what is transparent is blended with white"

# what a file of a format that isn't read begins with, after so many bytes
_UNREAD = (
    (4, b"ftyp", (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    (4, b"ftyp", (b"avif", b"avis"), "AVIF"),
    (4, b"jP  ", (b"",), "JPEG 2000"),
    (4, b"JXL ", (b"",), "JPEG XL"),
    (0, b"\xff\x4f\xff\x51", (b"",), "JPEG 2000"),
    (0, b"\xff\x0a", (b"",), "JPEG XL"),
    (0, b"8BPS", (b"",), "PSD"),
    (0, b"%PDF", (b"",), "PDF"),
    (0, b"\x76\x2f\x31\x01", (b"",), "OpenEXR"),
    (128, b"DICM", (b"",), "DICOM"),
)

logger = logging.getLogger(__name__)

# where the file may be good, and the way to it isn't
_REMEDIES = {
    errno.EACCES: "have its permissions changed",
    errno.EPERM: "have its permissions changed",
    errno.EIO: "check the disk or the network that it lies on",
    errno.ESTALE: "check the network that it lies on",
    errno.ETIMEDOUT: "check the network that it lies on",
}


# what is worth a word about an image that was read
Remark = Literal["rotation", "range", "pages"]


class StoredImage(NamedTuple):
    """An image file, read once.

    Attributes:
        pixels: uint8 (H, W, 3) RGB, see ``read_image``.
        digest: see ``image_digest``.
        remarks: what is worth a word, each as a sentence about the file. ``rotation``: an EXIF orientation other than
            upright, which is ignored; a damaged EXIF block counts as none. ``range``: values that take up less than
            half of the range that they are taken for. ``pages``: further pages, which are ignored.
    """

    pixels: NDArray[np.uint8]
    digest: str
    remarks: dict[Remark, str]


class ImageWarnings:
    """Context manager that warns of the first images that have a remark, and at its end of how many others have."""

    def __init__(self) -> None:
        what: dict[Remark, str] = {
            "rotation": "images with an EXIF rotation tag",
            "range": "images that use less than half of their range of values",
            "pages": "files with several pages or frames",
        }
        self._kinds = {kind: FewWarnings(logger, items, most=3) for kind, items in what.items()}

    def __enter__(self) -> ImageWarnings:
        self._stack = ExitStack()
        for warnings_of_kind in self._kinds.values():
            self._stack.enter_context(warnings_of_kind)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def warn(self, file: ImageFile, remarks: dict[Remark, str]) -> None:
        """Warn of an image's remarks, or only count them."""
        for kind, remark in remarks.items():
            self._kinds[kind].warn("%s %s", _shown(file), remark)


def read_stored_image(path: ImageFile, pixel_range: PixelRange | None = None) -> StoredImage:
    """Pixels and digest out of the same bytes, so that they belong together; arguments, errors as ``read_image``."""
    with _opened(path) as (image, content):
        remarks: dict[Remark, str] = {}
        digest = _digest(image, content)
        # Pillow decodes a whole PNG in search of a late EXIF block, and applies TIFF's orientation itself.
        if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
            with suppress(Exception):  # Pillow lets errors of every kind out of a damaged block
                if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
                    remarks["rotation"] = (
                        "has an EXIF rotation tag, which is ignored: masks fit the stored pixels"
                    )
        if _has_more_pages(image, content, path):
            remarks["pages"] = "has several pages or frames, of which the first one counts"
        pixels, remark = _rgb(image, path, pixel_range, content)
        return StoredImage(pixels, digest, remarks | ({"range": remark} if remark else {}))


def read_image(path: ImageFile, pixel_range: PixelRange | None = None) -> NDArray[np.uint8]:
    """An image as uint8 (H, W, 3), RGB.

    ===========================  =====================================================================
    kind of file                 rule
    ===========================  =====================================================================
    RGB                          as it is; 16 bits a channel: the upper 8
    grey, 1-bit                  the value in all three channels; 1-bit as 0 and 255
    any with alpha               blended with white, rounded; refused where nothing at all can be seen
    palette                      the palette's colours; a transparent entry as alpha
    CMYK, YCbCr, LAB             Pillow's conversion, without colour profiles
    16-bit grey                  value / 257, rounded (65535 becomes 255)
    12-bit TIFF, PGM, PPM        the file says what the largest value is, which becomes 255
    32-bit integer grey          as 16-bit grey; values outside 0..65535 are refused
    float grey                   values within 0..1 times 255, else 0..255 as they are; rounded;
                                 anything else (NaN too) is refused
    other numbers of bands       refused; of four bands that say nothing of the fourth the first three
    ===========================  =====================================================================

    Args:
        path: the image.
        pixel_range: values that become 0 and 255, of files with more than 8 bits that don't say it themselves; what
            lies outside becomes 0 and 255 too.

    Raises:
        ImageError: missing, empty, truncated or damaged file, not an image, or more than
            ``MAX_DECODED_PIXELS`` pixels (judged by the header, before anything is decoded); or a first page that is
            the thumbnail of another.
    """
    with _opened(path) as (image, content):
        _has_more_pages(image, content, path)
        return _rgb(image, path, pixel_range, content)[0]


def _rgb(
    image: Image.Image, path: ImageFile, pixel_range: PixelRange | None, content: bytes = b""
) -> tuple[NDArray[np.uint8], str]:
    """uint8 (H, W, 3) RGB, and the remark on its values; ``content``: the file's bytes, where there is one."""
    depth, remark = _depth(image), ""
    has_alpha, key = image.has_transparency_data, image.info.get("transparency")
    alpha: NDArray[np.uint8] | None = None
    if image.mode.startswith("I") or image.mode == "F":
        # a netpbm file's largest value becomes 65535
        states_range = depth == 12 or any(tile[0].startswith("ppm") for tile in getattr(image, "tile", ()))
        values = np.array(image, np.float64)
        if key is not None:
            alpha = np.where(values == key, np.uint8(0), np.uint8(255))
        largest = None if image.mode == "F" else 2**depth - 1
        grey, remark = _eight_bits(values, path, None if states_range else pixel_range, largest)
        rgb, remark = np.repeat(grey[..., None], 3, axis=2), "" if states_range else remark
    # Pillow keeps the upper 8 bits, and compares 16 bits of a transparent colour with these
    elif (
        depth == 16
        and content
        and image.mode in ("RGB", "RGBA", "RGBX")
        and (pixel_range is not None or isinstance(key, tuple))
    ):
        image.load()  # whose errors are known, before another library sees the file
        stored = _sixteen_bits(content, image.size, path)
        levels = np.arange(2**16)
        table = (levels >> 8).astype(np.uint8) if pixel_range is None else _scaled(levels, pixel_range)
        rgb = table[stored[..., :3]]
        if has_alpha and stored.shape[2] == 4:
            alpha = (stored[..., 3] >> 8).astype(np.uint8)
    else:
        image.load()
        coloured = image.convert("RGBA") if has_alpha else image
        rgb = np.array(coloured.convert("RGB"))
        alpha = np.array(coloured.getchannel("A")) if has_alpha else None
        if depth == 16:
            remark = _range_remark(256 * int(rgb.min()), 256 * int(rgb.max()) + 255, 65535)
    if alpha is None:
        return rgb, remark
    if not alpha.any():
        raise ImageError(
            f"{_shown(path)}: every pixel is transparent, so there is nothing to see; save it without alpha"
        )
    blended = Image.new("RGB", (rgb.shape[1], rgb.shape[0]), "white")
    blended.paste(Image.fromarray(rgb), mask=Image.fromarray(alpha))
    return np.array(blended), remark


def _eight_bits(
    values: NDArray[np.float64], path: ImageFile, pixel_range: PixelRange | None, largest: int | None
) -> tuple[NDArray[np.uint8], str]:
    """Values of one band in 8 bits, and the remark on them; ``largest``: value that becomes 255, None for floats."""
    low, high = float(np.min(values)), float(np.max(values))
    if not np.isfinite((low, high)).all():
        raise ImageError(
            f"{_shown(path)}: holds values that aren't numbers (NaN or infinite); give them a value"
        )
    if pixel_range is not None:
        return _scaled(values, pixel_range), ""
    if low < 0 or high > (255 if largest is None else 65535):
        raise ImageError(
            f"{_shown(path)}: values run from {low:g} to {high:g}; say what becomes black and white, "
            "--pixel-range LOW:HIGH, or save them as 8 or 16 bits"
        )
    top = float(largest or (255 if high > 1 else 1))
    return np.rint(values * (255 / top)).astype(np.uint8), _range_remark(low, high, top)


def _scaled(values: NDArray[Any], pixel_range: PixelRange) -> NDArray[np.uint8]:
    low, high = pixel_range
    return np.asarray(np.rint(((values - low) / (high - low) * 255).clip(0, 255)), np.uint8)


def _range_remark(low: float, high: float, top: float) -> str:
    """A remark where values take up less than half of 0 to ``top``."""
    if high - low >= top / 2:
        return ""
    return (
        f"has values from {low:g} to {high:g}, less than half of 0 to {top:g}, for which they are taken; where they "
        "are of another range, give it: --pixel-range LOW:HIGH"
    )


def _depth(image: Image.Image) -> int:
    """Bits a channel in the file, where they are more than 8; else 8."""
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS, (8,))
        return 12 if bits == (12,) else 16 if image.mode.startswith("I") or set(bits) == {16} else 8
    if image.format == "PNG" and any("16B" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return 16
    return 16 if image.mode.startswith("I") else 8


def _sixteen_bits(content: bytes, size: tuple[int, int], path: ImageFile) -> NDArray[np.uint16]:
    """uint16 (H, W, 3) RGB or (H, W, 4) RGBA, by OpenCV."""
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.ndim != 3 or found.shape[:2] != size[::-1]:
        raise ImageError(
            f"{_shown(path)}: its colours of 16 bits can't be read; save it as an 8-bit or 16-bit PNG"
        )
    order = cv2.COLOR_BGR2RGB if found.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    return np.asarray(cv2.cvtColor(found, order), np.uint16)


def _has_more_pages(image: Image.Image, content: bytes, path: ImageFile) -> bool:
    """Whether there are more pages or frames than one. Views of a page at other scales aren't pages, nor are the
    pictures that a phone keeps beside a photograph (MPO).

    Raises:
        ImageError: the first page is the thumbnail of another.
    """
    if image.format != "TIFF":
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    pixels, several = image.width * image.height, False
    with Image.open(BytesIO(content), formats=("TIFF",)) as pages:
        assert isinstance(pages, TiffImageFile)
        for page in range(1, _MOST_PAGES):
            try:
                pages.seek(page)
            except EOFError:
                break
            except Exception:  # a page that can't be read does the first one no harm
                return True
            is_view = bool(pages.tag_v2.get(_SUBFILE, 0) & 5)  # of smaller scale, or a mask
            several = several or not is_view
            if not is_view and pages.width * pages.height >= _THUMBNAIL * pixels:
                raise ImageError(
                    f"{_shown(path)}: page 1 has {image.width} x {image.height} pixels, page {page + 1} "
                    f"{pages.width} x {pages.height}: the first looks like a thumbnail; save the page that is meant "
                    "as a file of its own"
                )
    return several


AnyImage = NDArray[np.uint8] | Image.Image | Path | str


def as_pixels(image: AnyImage, pixel_range: PixelRange | None = None) -> NDArray[np.uint8]:
    """An image in any of the forms in which a library's user has it, as uint8 (H, W, 3) RGB.

    Args:
        image: a path, a PIL image of any mode, or an array: uint8 (H, W, 3) RGB or (H, W) grey.
        pixel_range: see ``read_image``.

    Raises:
        ImageError: the file can't be used, or the array is none of these.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image), pixel_range)
    if isinstance(image, Image.Image):
        given = Path("the image given")
        try:
            return _rgb(image.copy(), given, pixel_range)[0]
        except (WsssError, MemoryError):
            raise
        except Exception as error:  # it may be read only now, and Pillow raises errors of many kinds
            raise _unusable(given, error) from error
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or image.size == 0:
        given_as = f"{image.dtype} {image.shape}"
        raise ImageError(f"an image is a uint8 array (H, W, 3) RGB or (H, W), not {given_as}")
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)


def read_mask(
    path: ImageFile, colors: Mapping[Color, int | str] | None = None, *, wide: bool = False
) -> NDArray[np.unsignedinteger[Any]]:
    """A mask as uint8 (H, W): 0 background, class indices from 1 on, 255 ignore.


    Grey files of 8, 16 and 32 bits give their values, 1-bit files 0 and 1, RGB files with three equal channels
    that value. Palette files give their indices, whatever the palette. Where colours are known, RGB files and
    palettes give the values of their colours; a palette that holds others gives its indices if it is PASCAL VOC's.

    Args:
        path: the file.
        colors: RGB colour to mask value, or to the name of what is no class.
        wide: whether it is of more than 254 classes: uint16 comes out, 65,535 is ignore. A file of 8 bits may then
            hold classes up to 254; what its 255 means nobody can tell.

    Raises:
        ImageError: as ``read_image``; also colours where none are known, values outside 0..255 (0..65,535), or JPEG.
        MaskError: a colour that isn't among the known ones, or that of what is no class.
    """
    with _opened(path) as (image, content):
        if image.format == "PNG":
            # Pillow decodes pixels without a look at their check sum, and another class index can't be seen
            with Image.open(BytesIO(content), formats=("PNG",)) as again:
                again.verify()
        if image.format in ("JPEG", "MPO"):
            raise ImageError(f"{_shown(path)}: JPEG changes the values of a mask; save it as an 8-bit PNG")
        if colors and image.mode in ("P", "RGB", "RGBA"):
            found = _of_colors(image, colors, path, wide)
            if found is not None:
                return found
        if image.mode in ("RGB", "RGBA"):
            channels = np.array(image)
            values = channels[..., 0]
            if (channels[..., 1:3] != values[..., None]).any():
                raise ImageError(
                    f"{_shown(path)}: a mask holds one class index a pixel, but this holds colours; save the indices "
                    f"{_INDICES} as an 8-bit PNG, put CVAT's labelmap.txt beside it, or give a class set with a "
                    "'color' for each class"
                )
        elif _has_indices(image):
            values = np.array(image)
        else:
            raise ImageError(
                f"{_shown(path)}: a mask holds one class index a pixel, but this is a {image.mode} image; save the "
                f"indices {_INDICES} as an 8-bit PNG"
            )
        if wide and values.dtype.itemsize == 1 and values.max() == 255:
            raise ImageError(
                f"{_shown(path)}: 255 in 8 bits is class 255 or no label; with more than 254 classes save masks as "
                f"16-bit PNGs {_WIDE_INDICES}"
            )
        if values.dtype.itemsize > 1 and (values.min() < 0 or values.max() > (65_535 if wide else 255)):
            raise ImageError(
                f"{_shown(path)}: values run from {values.min()} to {values.max()}; "
                f"a mask holds class indices {_WIDE_INDICES if wide else _INDICES}"
            )
        kind: type[np.unsignedinteger[Any]] = np.uint16 if wide else np.uint8
        return values.astype(kind)


def _of_colors(
    image: Image.Image, colors: Mapping[Color, int | str], path: ImageFile, wide: bool
) -> NDArray[np.unsignedinteger[Any]] | None:
    """Mask values of an image's colours; None for a palette of PASCAL VOC's with others, which stand for indices."""
    pixels = np.array(image.convert("RGB"), np.int32)
    codes, places = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_inverse=True)
    values: list[int] = []
    for code in codes.tolist():
        color = (code >> 16, code >> 8 & 255, code & 255)
        value = colors.get(color)
        if isinstance(value, int):
            values.append(value)
            continue
        if image.mode == "P" and (voc_palette()[np.array(image)] == pixels).all():
            return None
        shown = ",".join(map(str, color))
        if value is not None:
            raise MaskError(
                f"{_shown(path)}: the colour {shown} is '{one_line(value, 60)}', which is no class of the class set; "
                "add it, or give the class set that the masks were made with"
            )
        known = "; ".join(",".join(map(str, known)) for known in list(colors)[:8])
        raise MaskError(
            f"{_shown(path)}: the colour {shown} is no class's ({known}{'; ...' if len(colors) > 8 else ''}); give "
            "the colours that the masks were made with, and masks without soft edges"
        )
    kind: type[np.unsignedinteger[Any]] = np.uint16 if wide else np.uint8
    return np.array(values, kind)[places].reshape(pixels.shape[:2])


def read_label_image(path: ImageFile) -> NDArray[np.int64]:
    """An image of region numbers as int64 (H, W), as stored; of palette files the indices.

    Raises:
        ImageError: as ``read_image``; also a colour image, or JPEG.
    """
    with _opened(path) as (image, _):
        if image.format in ("JPEG", "MPO") or not _has_indices(image):
            raise ImageError(
                f"{_shown(path)}: a label image holds one number a pixel, but this is a {image.format} of mode "
                f"{image.mode}; save the numbers of the regions as a PNG of 8 or 16 bits"
            )
        return np.array(image).astype(np.int64)


def _has_indices(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "P") or image.mode.startswith("I")


def image_size(path: ImageFile) -> tuple[int, int]:
    """(width, height) from the header alone, of what ``read_image`` would give; a damaged body isn't noticed."""
    with _opened(path, header=True) as (image, _):
        return image.size


def file_digest(path: ImageFile) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits; an ImageError where it can't be read."""
    try:
        _check_file(path)
        with _source(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error


def image_digest(path: ImageFile) -> str:
    """What tells an image from others, 64 hexadecimal digits: SHA-256 of the file's bytes; where its pixels hang on
    transparency, of these and the rule. An ImageError where it can't be read."""
    with suppress(ImageError), _opened(path) as (image, content):
        return _digest(image, content)
    return file_digest(path)  # of what is no image, no longer or yet


def _digest(image: Image.Image, content: bytes) -> str:
    digest = hashlib.sha256(content)
    if image.has_transparency_data:
        digest.update(_BLENDED)
    return digest.hexdigest()


def _check_file(file: ImageFile) -> None:
    """Refuses what isn't a regular file, is empty or too large, before any of it is read."""
    if isinstance(file, TarMember):
        size = file.size
    else:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{_shown(file)}: not a file; name an image file")
    if size == 0:
        raise ImageError(f"{_shown(file)}: the file is empty; replace or remove it")
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"{_shown(file)}: {size:,} bytes are too many for an image; scale it down or remove it"
        )


def _source(file: ImageFile) -> BufferedReader | BytesIO:
    """The file, open; of an archive's member its bytes."""
    return open_plain(file, MAX_FILE_BYTES) if isinstance(file, Path) else BytesIO(file.read_bytes())


_pillow_log = logging.getLogger("PIL")


class _QuietPillow:
    """Keeps Pillow's warnings about damaged or large files, and its log, from the terminal while images are read.

    The interpreter's warning filters and loggers belong to all threads. So the first reader saves them and the last
    one restores them; readers that each did both could restore them in the wrong order.
    """

    def __init__(self) -> None:
        self._lock, self._readers = threading.Lock(), 0
        self._nothing = logging.NullHandler()

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                # not its level: to set one takes a look at every logger there is, a millisecond an image
                self._propagates, _pillow_log.propagate = _pillow_log.propagate, False
                _pillow_log.addHandler(self._nothing)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)
                _pillow_log.propagate = self._propagates
                _pillow_log.removeHandler(self._nothing)


_quiet_pillow = _QuietPillow()


@contextmanager
def _opened(path: ImageFile, *, header: bool = False) -> Iterator[tuple[Image.Image, bytes]]:
    """The file's first image, header read and size checked, and its bytes, where not the header alone is wanted.

    Whatever is wrong with it is an ImageError. What is wrong with the machine isn't: a ResourceError, a MemoryError.
    """
    pixels = "too many pixels"  # where Pillow refuses before it tells how many
    start = b""
    try:
        _check_file(path)
        with _source(path) as file:
            start = file.read(_LONGEST_START)
            if start[:1] == b"P":
                # of netpbm's, whose header Pillow reads byte by byte, whatever the length of its comments
                words = _COMMENT.sub(b"", start + file.read(_LONGEST_HEADER)).split(maxsplit=3)
                if len(words) < 3:
                    raise UnidentifiedImageError
            file.seek(0)
            content = b"" if header else file.read()
            source = BytesIO(content) if content else file
            with _quiet_pillow, Image.open(source, formats=_formats()) as image:
                width, height = image.size
                pixels = f"{width} x {height} pixels"
                if width < 1 or height < 1:
                    raise ImageError(f"{_shown(path)}: its header says {pixels}; the file is damaged")
                if width * height > MAX_DECODED_PIXELS:
                    raise Image.DecompressionBombError
                yield image, content
    except (WsssError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{_shown(path)}: its header says {pixels}, the limit is {MAX_DECODED_PIXELS}; scale it down or remove it"
        ) from error
    # Damaged files make Pillow raise OSError, SyntaxError, struct.error, zlib.error, TypeError and more.
    except UnidentifiedImageError as error:
        known = _known_but_unread(path, start)
        raise ImageError(f"{_shown(path)}: {known}") if known else _unusable(path, error) from error
    except Exception as error:
        raise _unusable(path, error) from error


@cache
def _formats() -> tuple[str, ...]:
    """Names of Pillow's readers that may look at a file."""
    formats = [*_FORMATS, *(("AVIF",) if HAS_AVIF else ())]
    if HAS_HEIC:
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    return tuple(formats)


def _known_but_unread(path: ImageFile, start: bytes) -> str:
    """What a file is that no reader takes, and what to do about it; empty where that isn't known."""
    if start.startswith(GIT_LFS_POINTER.encode()):
        return "a pointer of Git LFS in place of the image; fetch it with git lfs pull"
    read = {"HEIC": HAS_HEIC, "AVIF": HAS_AVIF}
    for offset, mark, brands, name in _UNREAD:
        if read.get(name):
            continue
        if start[offset:].startswith(mark) and start[offset + len(mark) :].startswith(brands):
            return f"its content is {name}, which isn't read; {remedy_of(name)}"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with suppress(Exception), _quiet_pillow, _source(path) as file:
            tags = _first_tags(file)
            bands, bits = int(tags.get(_BANDS, 1)), max(tags.get(_BITS, (1,)))
            kind = "floating point" if 3 in tags.get(_SAMPLE_FORMAT, (1,)) else "integers"
            return (
                f"a TIFF with {bands} bands of {bits}-bit {kind}, which isn't read; images have grey or RGB of 8 or "
                "16 bits, with or without alpha, or one band of 32 bits: save three of the bands as RGB"
            )
    return ""


def remedy_of(name: str) -> str:
    """What to do about images of a format that isn't read."""
    return f"{'install wsss-pipeline[heic], or ' if name == 'HEIC' else ''}convert to JPEG or PNG"


def _first_tags(file: BinaryIO) -> dict[int, Any]:
    """Tags of a TIFF's first page."""
    header = file.read(8)
    if header[2] == 43 or header[3] == 43:  # BigTIFF
        header += file.read(8)
    directory = ImageFileDirectory_v2(header)
    file.seek(directory.next)
    directory.load(file)
    return dict(directory)


def _unusable(path: ImageFile, error: Exception) -> ImageError:
    check_machine(error)
    remedy = "replace or remove it"
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image (JPEG, PNG, BMP, GIF, TIFF, WebP, PNM, AVIF), or its header is damaged"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        remedy = _REMEDIES.get(error.errno or 0, remedy)
    else:
        reason = one_line(error, _LONGEST_PATH) or type(error).__name__
    return ImageError(f"{_shown(path)}: can't be read: {reason}; {remedy}")


def _shown(path: ImageFile) -> str:
    return one_line(path, _LONGEST_PATH)
