"""A page to look through the masks of thousands of images; its pictures lie in files beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from PIL import Image

from wsss_pipeline.data.datasets import split_line
from wsss_pipeline.data.masks import Mask
from wsss_pipeline.pictures.overlays import Rgb, class_colour, encoded, mask_layer
from wsss_pipeline.pictures.templates import read, render
from wsss_pipeline.runtime.output import printable

PICTURES = "pictures"  # folder of the pictures, beside the page
_BOX = (320, 320)  # largest width and height of a picture
_JPEG_QUALITY = 80


@dataclass
class PreviewImage:
    """What the page shows of an image.

    Attributes:
        image_id: id of the image.
        image: file name of its thumbnail; empty where it couldn't be drawn.
        layer: file name of its mask's layer; empty where it couldn't be drawn.
        doubt: class name to doubt, 0 to 1, of the classes that it is labelled with or that its mask has.
        share: class name to share of the pixels, 0 to 1, of the same classes.
        problem: reason where anything couldn't be read; empty where all is well.
    """

    image_id: str
    image: str = ""
    layer: str = ""
    doubt: Mapping[str, float] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


def picture_name(content: bytes, suffix: str) -> str:
    """The file name of a picture that is drawn of ``content``: other bytes, or drawn in another way, another name."""
    return hashlib.sha256(f"{_BOX} {_JPEG_QUALITY} ".encode() + content).hexdigest()[:32] + suffix


def thumbnail(image: Rgb) -> bytes:
    """The JPEG of an image, uint8 (H, W, 3) RGB, no larger than the page shows it."""
    picture = Image.fromarray(image)
    picture.thumbnail(_BOX, Image.Resampling.LANCZOS)
    return encoded(picture, "JPEG", quality=_JPEG_QUALITY)


def layer(mask: Mask) -> bytes:
    """The transparent PNG of a mask, uint8 or uint16 (H, W) class indices, of the size of its image's thumbnail."""
    small = Image.fromarray(mask)
    small.thumbnail(_BOX, Image.Resampling.NEAREST)
    return encoded(Image.fromarray(mask_layer(np.asarray(small))), "PNG")


def preview_page(
    images: Sequence[PreviewImage],
    class_names: Sequence[str],
    *,
    identity: str,
    summary: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> str:
    """The page, one file of HTML without anything from elsewhere but the pictures beside it.

    What it shows stands in the page itself: no browser lets a page from a disk read another file. A policy of
    the page's own allows no other script and style than its own two, and no address but files' for pictures.

    Args:
        images: images in the order that they have without doubt.
        class_names: names of mask values 1..C.
        identity: text that tells these masks from others; marks are remembered under it.
        summary: what is shown, heading to text.
        warnings: texts to be read before anything else.
    """
    position = {name: number for number, name in enumerate(class_names)}
    data = {
        "identity": identity,
        "classes": [
            {"name": printable(name), "colour": f"rgb{class_colour(value)}"}
            for value, name in enumerate(class_names, start=1)
        ],
        "images": [
            {
                "shown": printable(entry.image_id),
                "line": split_line(entry.image_id),
                "image": entry.image and f"{PICTURES}/{entry.image}",
                "layer": entry.layer and f"{PICTURES}/{entry.layer}",
                "classes": [
                    [position[name], round(doubt, 4), round(entry.share[name], 4)]
                    for name, doubt in sorted(entry.doubt.items(), key=lambda item: -item[1])
                ],
                "problem": printable(entry.problem),
            }
            for entry in images
        ],
    }
    script, style = read("preview.js"), read("preview.css")
    return render(
        "preview.html.j2",
        data=data,
        script=Markup(script),
        style=Markup(style),
        script_digest=_digest(script),
        style_digest=_digest(style),
        summary=summary,
        warnings=warnings,
    )


def _digest(text: str) -> str:
    """As a content security policy has it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
