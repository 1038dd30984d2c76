"""The only decoder of pictures and masks, through Pillow, with one stated rule for every kind of file.

EXIF orientation is ignored: arrays come in the order in which the pixels are stored, so that picture and
mask always fit together (``has_rotation`` tells whether a file carries the tag). TIFF alone has an
orientation of its own outside EXIF, which Pillow applies to size and pixels alike. Colour profiles are
ignored. Of an animation or a file with several pages the first one counts.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from wsss_pipeline.data.image_files import ImageFile, check_file, open_file
from wsss_pipeline.errors import ImageError

# Nothing with more pixels is decoded; an RGB picture of that size takes 400 MB. It lies under the number
# at which Pillow itself refuses.
MAX_DECODED_PIXELS = 2**27

# Pillow's other readers are left out: some start external programs. The last two aren't among those that
# Pillow registers by itself.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", TiffImageFile.format, WebPImageFile.format)
_ORIENTATION = 0x0112


def read_image(path: ImageFile) -> NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3), RGB.

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
        ImageError: missing, empty, truncated or damaged file, not a picture, or more than
            ``MAX_DECODED_PIXELS`` pixels (judged by the header, before anything is decoded).
    """
    with _opened(path) as picture:
        if picture.mode.startswith("I") or picture.mode == "F":
            grey = _eight_bit(np.array(picture), path)
            return np.repeat(grey[..., None], 3, axis=2)
        # Pillow would look at the transparency on conversion and warn about some forms of it.
        picture.load()
        picture.info.pop("transparency", None)
        return np.array(picture.convert("RGB"))


def read_mask(path: ImageFile) -> NDArray[np.uint8]:
    """An index mask as uint8 (H, W): class indices as stored, 0 background, 255 ignore.

    Palette files give their indices, whatever the palette; 1-bit files 0 and 1; 16- and 32-bit integer
    files their values.

    Raises:
        ImageError: as ``read_image``; also a colour mask, values outside 0..255, or JPEG.
    """
    with _opened(path) as picture:
        if picture.format in ("JPEG", "MPO"):
            raise ImageError(f"{path}: JPEG changes the values of a mask; save it as an 8-bit PNG")
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise ImageError(
                f"{path}: a mask holds one class index a pixel, but this is a {picture.mode} picture, "
                "probably saved with the colours of the classes; turn each colour into its index "
                "(0 background, 1.. classes, 255 ignore) and save it as an 8-bit PNG"
            )
        values = np.array(picture)
        if values.dtype.itemsize > 1 and (values.min() < 0 or values.max() > 255):
            raise ImageError(
                f"{path}: mask values run from {values.min()} to {values.max()}; only 0..255 can be class "
                "indices (0 background, 1.. classes, 255 ignore)"
            )
        return values.astype(np.uint8)


def image_size(path: ImageFile) -> tuple[int, int]:
    """(width, height) from the header alone, of the array that ``read_image`` would give.

    Raises:
        ImageError: as ``read_image``, except that a damaged body isn't noticed.
    """
    with _opened(path) as picture:
        return picture.size


def has_rotation(path: ImageFile) -> bool:
    """Whether an EXIF orientation other than upright is present, which ``read_image`` ignores.

    Reads the header only; a damaged EXIF block counts as none.

    Raises:
        ImageError: as ``image_size``.
    """
    with _opened(path) as picture:
        # Pillow decodes a whole PNG in search of a late EXIF block, and applies TIFF's orientation itself.
        if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
            return False
        try:
            orientation = picture.getexif().get(_ORIENTATION, 1)
        except Exception:  # Pillow lets errors of every kind out of a damaged block
            return False
    return orientation in range(2, 9)


def file_digest(path: ImageFile) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        ImageError: the file can't be read.
    """
    try:
        check_file(path)
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error


def _eight_bit(values: NDArray[np.generic], path: ImageFile) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits (H, W) as uint8."""
    if values.dtype.kind == "f":
        levels = values.astype(np.float64)
        low, high = float(np.min(levels)), float(np.max(levels))
        if not (low >= 0 and high <= 255):  # so written, NaN is refused too
            raise ImageError(f"{path}: float values run from {low:g} to {high:g}; save them as 8 or 16 bits")
        return np.rint(levels * (255 if high <= 1 else 1)).astype(np.uint8)
    wide = values.astype(np.int64)
    if np.min(wide) < 0 or np.max(wide) > 65535:
        raise ImageError(
            f"{path}: values run from {np.min(wide)} to {np.max(wide)}, beyond 16 bits; save them as 8 or 16 bits"
        )
    return ((wide + 128) // 257).astype(np.uint8)


@contextmanager
def _opened(path: ImageFile) -> Iterator[Image.Image]:
    """The file's first picture, header read and size checked; whatever goes wrong is an ImageError."""
    try:
        with ExitStack() as stack:
            stack.enter_context(_quiet_pillow)
            check_file(path)
            source = path if isinstance(path, Path) else BytesIO(path.read_bytes())
            picture = stack.enter_context(Image.open(source, formats=_FORMATS))
            width, height = picture.size
            if width < 1 or height < 1:
                raise ImageError(f"{path}: its header says {width} x {height} pixels; the file is damaged")
            if width * height > MAX_DECODED_PIXELS:
                raise _too_large(path, f"{width} x {height} pixels")
            yield picture
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, "too many pixels") from error
    # Damaged files make Pillow raise OSError, SyntaxError, struct.error, zlib.error, TypeError and more.
    except Exception as error:
        raise _unusable(path, error) from error


def _too_large(path: ImageFile, size: str) -> ImageError:
    return ImageError(
        f"{path}: its header says {size}, the limit is {MAX_DECODED_PIXELS}; scale it down or remove it"
    )


def _unusable(path: ImageFile, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not a picture (JPEG, PNG, BMP, GIF, TIFF, WebP), or its header is damaged"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{path}: can't be read: {reason}; replace or remove it")


class _QuietPillow:
    """Keeps Pillow's warnings about damaged or large files from the terminal while pictures are read.

    The interpreter's warning filters belong to all threads. So the first reader saves them and the last
    one restores them; readers that each did both could restore them in the wrong order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()
