"""What a mask, a CAM and a confidence map look like: arrays in, RGB arrays or files' bytes out."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss_pipeline.data.classes import voc_palette

Rgb = NDArray[np.uint8]
Colour = tuple[int, int, int]

MASK_OPACITY = 0.6
BACKGROUND_DIMMING = 0.55  # how much of the image stays where the mask says background
CAM_OPACITY = 0.55
HEAT_MAP = cv2.COLORMAP_TURBO
CONFIDENCE_MAP = cv2.COLORMAP_VIRIDIS


def class_colour(value: int) -> Colour:
    """Colour of a mask value, that of PASCAL VOC."""
    red, green, blue = voc_palette()[value].tolist()
    return red, green, blue


def mask_over_image(image: Rgb, mask: NDArray[np.uint8]) -> Rgb:
    """The mask's colours over the image, white lines between the regions.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W) class indices, 0 background; background stays image, but dimmed.
    """
    grey = image.mean(axis=2, keepdims=True)
    background = BACKGROUND_DIMMING * (0.5 * image + 0.5 * grey)
    foreground = (1 - MASK_OPACITY) * image + MASK_OPACITY * voc_palette()[mask]
    blended = np.where(mask[..., None] == 0, background, foreground)
    # the last pixel of a region before the next one, to the right or below
    blended[:, :-1][mask[:, :-1] != mask[:, 1:]] = 255
    blended[:-1][mask[:-1] != mask[1:]] = 255
    return np.rint(blended).astype(np.uint8)


def heat_over_image(image: Rgb, cam: NDArray[np.floating]) -> Rgb:
    """A CAM, (H, W) in [0, 1], as a heat map over the image, uint8 (H, W, 3) RGB."""
    heat = coloured(cam, HEAT_MAP)
    return np.rint((1 - CAM_OPACITY) * image + CAM_OPACITY * heat).astype(np.uint8)


def coloured(values: NDArray[np.floating], colour_map: int) -> Rgb:
    """``values`` (H, W) in [0, 1] through one of OpenCV's colour maps: uint8 (H, W, 3) RGB."""
    levels = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, colour_map)[..., ::-1], dtype=np.uint8)


def index_png(mask: NDArray[np.uint8], with_palette: bool) -> bytes:
    """A PNG of class indices (H, W): mode L, or mode P with PASCAL VOC's colours."""
    image = Image.fromarray(mask)
    if with_palette:
        image.putpalette(voc_palette().tobytes(), "RGB")  # makes mode P of mode L, values as they are
    return encoded(image, "PNG")


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    """The bytes of a file of that kind, ``PNG`` or ``JPEG``; options such as ``quality`` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
