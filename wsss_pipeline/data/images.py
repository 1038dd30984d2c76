"""The only decoder of images and masks, through Pillow, with one stated rule for every kind of file.

EXIF orientation is ignored: arrays come in the order in which the pixels are stored, so that image and
mask always fit together (``StoredImage`` tells whether a file carries the tag). TIFF alone has an
orientation of its own outside EXIF, which Pillow applies to size and pixels alike. Colour profiles are
ignored. Of an animation or a file with several pages the first one counts.
"""

from __future__ import annotations

import errno
import hashlib
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from wsss_pipeline.data.class_lists import Color
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.image_files import ImageFile, TarMember
from wsss_pipeline.errors import ImageError, MaskError, WsssError
from wsss_pipeline.files import check_machine, open_plain
from wsss_pipeline.runtime.output import one_line

# Nothing with more pixels is decoded; an RGB image of that size takes 400 MB. It lies under the number
# at which Pillow itself refuses.
MAX_DECODED_PIXELS = 2**27

# Nor is a larger file read: uncompressed, an image of that many pixels has at most 8 bytes for each.
MAX_FILE_BYTES = 2**30 + 2**20

# Pillow's other readers are left out: some start external programs. The last two aren't among those that
# Pillow registers by itself.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", TiffImageFile.format, WebPImageFile.format)
_ORIENTATION = 0x0112
_INDICES = "(0 background, 1.. classes, 255 ignore)"
_WIDE_INDICES = "(0 background, 1.. classes, 65535 ignore)"
_LONGEST_PATH = 200  # characters of one, in a message

# where the file may be good, and the way to it isn't
_REMEDIES = {
    errno.EACCES: "have its permissions changed",
    errno.EPERM: "have its permissions changed",
    errno.EIO: "check the disk or the network that it lies on",
    errno.ESTALE: "check the network that it lies on",
    errno.ETIMEDOUT: "check the network that it lies on",
}


class StoredImage(NamedTuple):
    """An image file, read once.

    Attributes:
        pixels: uint8 (H, W, 3) RGB, see ``read_image``.
        digest: SHA-256 of the file's bytes, 64 hexadecimal digits.
        has_rotation: an EXIF orientation other than upright is present, which is ignored; a damaged EXIF block
            counts as none.
    """

    pixels: NDArray[np.uint8]
    digest: str
    has_rotation: bool


def read_stored_image(path: ImageFile) -> StoredImage:
    """Pixels and digest out of the same bytes, so that they belong together; an ImageError as ``read_image``."""
    with _opened(path) as (image, content):
        has_rotation = False
        # Pillow decodes a whole PNG in search of a late EXIF block, and applies TIFF's orientation itself.
        if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
            with suppress(Exception):  # Pillow lets errors of every kind out of a damaged block
                has_rotation = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        return StoredImage(_rgb(image, path), hashlib.sha256(content).hexdigest(), has_rotation)


def read_image(path: ImageFile) -> NDArray[np.uint8]:
    """An image as uint8 (H, W, 3), RGB.

    ===========================  =====================================================================
    kind of file                 rule
    ===========================  =====================================================================
    RGB                          as it is; 16 bits a channel: the upper 8
    grey, 1-bit                  the value in all three channels; 1-bit as 0 and 255
    any with alpha               alpha dropped; the colour stored under it stays, nothing is blended
    palette                      the palette's colours; a transparent entry keeps its colour
    CMYK, YCbCr, LAB             Pillow's conversion, without colour profiles
    16-bit grey                  value / 257, rounded (65535 becomes 255)
    32-bit integer grey          as 16-bit grey; values outside 0..65535 are refused
    float grey                   values within 0..1 times 255, else 0..255 as they are; rounded;
                                 anything else (NaN too) is refused
    ===========================  =====================================================================

    Raises:
        ImageError: missing, empty, truncated or damaged file, not an image, or more than
            ``MAX_DECODED_PIXELS`` pixels (judged by the header, before anything is decoded).
    """
    with _opened(path) as (image, _):
        return _rgb(image, path)


def _rgb(image: Image.Image, path: ImageFile) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.array(image, np.float64)
        low, high = np.min(levels), np.max(levels)
        if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):  # so written, NaN is refused too
            raise ImageError(
                f"{_shown(path)}: values run from {low:g} to {high:g}; save them as 8 or 16 bits"
            )
        factor = 1 / 257 if image.mode != "F" else 255 if high <= 1 else 1
        return np.repeat(np.rint(levels * factor).astype(np.uint8)[..., None], 3, axis=2)
    # Pillow would look at the transparency on conversion and warn about some forms of it.
    image.load()
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


AnyImage = NDArray[np.uint8] | Image.Image | Path | str


def as_pixels(image: AnyImage) -> NDArray[np.uint8]:
    """An image in any of the forms in which a library's user has it, as uint8 (H, W, 3) RGB.

    Args:
        image: a path, a PIL image of any mode, or an array: uint8 (H, W, 3) RGB or (H, W) grey.

    Raises:
        ImageError: the file can't be used, or the array is none of these.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        given = Path("the image given")
        try:
            return _rgb(image.copy(), given)
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
    with _opened(path) as (image, _):
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


class _QuietPillow:
    """Keeps Pillow's warnings about damaged or large files from the terminal while images are read.

    The interpreter's warning filters belong to all threads. So the first reader saves them and the last
    one restores them; readers that each did both could restore them in the wrong order.
    """

    def __init__(self) -> None:
        self._lock, self._readers = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


@contextmanager
def _opened(path: ImageFile, *, header: bool = False) -> Iterator[tuple[Image.Image, bytes]]:
    """The file's first image, header read and size checked, and its bytes, where not the header alone is wanted.

    Whatever is wrong with it is an ImageError. What is wrong with the machine isn't: a ResourceError, a MemoryError.
    """
    pixels = "too many pixels"  # where Pillow refuses before it tells how many
    try:
        _check_file(path)
        with _source(path) as file:
            content = b"" if header else file.read()
            with _quiet_pillow, Image.open(BytesIO(content) if content else file, formats=_FORMATS) as image:
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
    except Exception as error:
        raise _unusable(path, error) from error


def _unusable(path: ImageFile, error: Exception) -> ImageError:
    check_machine(error)
    remedy = "replace or remove it"
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image (JPEG, PNG, BMP, GIF, TIFF, WebP), or its header is damaged"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        remedy = _REMEDIES.get(error.errno or 0, remedy)
    else:
        reason = one_line(error, _LONGEST_PATH) or type(error).__name__
    return ImageError(f"{_shown(path)}: can't be read: {reason}; {remedy}")


def _shown(path: ImageFile) -> str:
    return one_line(path, _LONGEST_PATH)
