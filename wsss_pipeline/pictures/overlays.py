"""What a mask, a CAM and a confidence map look like: arrays in, RGB arrays or files' bytes out."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.masks import WIDE_IGNORE, Mask
from wsss_pipeline.runtime.output import MARK

Rgb = NDArray[np.uint8]
Colour = tuple[int, int, int]

MASK_OPACITY = 0.6
BACKGROUND_DIMMING = 0.55  # how much of the image stays where the mask says background
CAM_OPACITY = 0.55
HEAT_MAP = cv2.COLORMAP_TURBO
CONFIDENCE_MAP = cv2.COLORMAP_VIRIDIS
LONGEST_JPEG = 65_500  # pixels of a side, by libjpeg
_PIXELS_AT_A_TIME = 2**20  # in floating point, some 150 bytes each


def class_colour(value: int) -> Colour:
    """Colour of a mask value, that of PASCAL VOC."""
    red, green, blue = voc_palette(1 + WIDE_IGNORE)[value].tolist()
    return red, green, blue


def mask_over_image(image: Rgb, mask: Mask) -> Rgb:
    """The mask's colours over the image, white lines between the regions.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 or uint16 (H, W) class indices, 0 background; background stays image, but dimmed.
    """
    result, palette = np.empty_like(image), voc_palette(1 + np.iinfo(mask.dtype).max)
    rows = max(1, _PIXELS_AT_A_TIME // image.shape[1])
    for part in (slice(top, top + rows) for top in range(0, len(image), rows)):
        pixels, values = image[part], mask[part]
        grey = pixels.mean(axis=2, keepdims=True)
        background = BACKGROUND_DIMMING * (0.5 * pixels + 0.5 * grey)
        foreground = (1 - MASK_OPACITY) * pixels + MASK_OPACITY * palette[values]
        result[part] = np.rint(np.where(values[..., None] == 0, background, foreground))
    _outline(result, mask)
    return result


def mask_layer(mask: Mask) -> NDArray[np.uint8]:
    """What ``mask_over_image`` lays over an image, to be laid over it elsewhere: uint8 (H, W, 4) RGBA.

    Args:
        mask: uint8 or uint16 (H, W) class indices; background darkens what lies below it.
    """
    result = np.empty((*mask.shape, 4), np.uint8)
    result[..., :3] = voc_palette(1 + np.iinfo(mask.dtype).max)[mask]  # of background: black
    result[..., 3] = np.where(mask == 0, round(255 * (1 - BACKGROUND_DIMMING)), round(255 * MASK_OPACITY))
    _outline(result, mask)
    return result


def _outline(pixels: NDArray[np.uint8], mask: Mask) -> None:
    """Whitens the last pixel of a region before the next one, to the right or below."""
    pixels[:, :-1][mask[:, :-1] != mask[:, 1:]] = 255
    pixels[:-1][mask[:-1] != mask[1:]] = 255


def heat_over_image(image: Rgb, cam: NDArray[np.floating]) -> Rgb:
    """A CAM, (H, W) in [0, 1], as a heat map over the image, uint8 (H, W, 3) RGB."""
    heat = coloured(cam, HEAT_MAP)
    return np.rint((1 - CAM_OPACITY) * image + CAM_OPACITY * heat).astype(np.uint8)


def coloured(values: NDArray[np.floating], colour_map: int) -> Rgb:
    """``values`` (H, W) in [0, 1] through one of OpenCV's colour maps: uint8 (H, W, 3) RGB."""
    levels = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, colour_map)[..., ::-1], dtype=np.uint8)


def index_png(mask: Mask, with_palette: bool) -> bytes:
    """A PNG of class indices (H, W): mode L, or mode P with PASCAL VOC's colours; of 16 bits, grey in any case."""
    image = Image.fromarray(mask)
    if with_palette and mask.dtype == np.uint8:
        image.putpalette(voc_palette().tobytes(), "RGB")  # makes mode P of mode L, values as they are
    return encoded(image, "PNG")


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    """The bytes of a file of that kind, ``PNG`` or ``JPEG``, with the program's mark; options are Pillow's.

    A picture that is too long for a JPEG file is scaled down.
    """
    buffer, marked = io.BytesIO(), PngInfo()
    if kind == "JPEG" and max(image.size) > LONGEST_JPEG:
        image = image.copy()
        image.thumbnail((LONGEST_JPEG, LONGEST_JPEG))
    marked.add_text("Software", MARK)
    image.save(buffer, kind, pnginfo=marked, comment=MARK, **options)  # each kind takes its own
    return buffer.getvalue()
