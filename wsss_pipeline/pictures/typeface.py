"""Text on pictures, in whatever script the class names and file names are written."""

from __future__ import annotations

import logging
from functools import lru_cache

from PIL import ImageFont

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow brings a Latin font; these are looked for, in this order, when a text needs more than that.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "Hiragino Sans GB.ttc",
    "segoeui.ttf",
    "arial.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
)
NO_CHARACTER = "\uffff"  # a noncharacter: what a font draws for it stands for "I have no such glyph"


def font_and_text(text: str, size: int) -> tuple[Font, str]:
    """A font of ``size`` pixels and ``text`` as it can be drawn with it.

    The first font that has all characters wins, otherwise the one that has most of them; characters
    that it lacks, and control characters, are written as escapes such as ``\\u732b``.
    """
    printable = "".join(char if char.isprintable() else _escape(char) for char in text)
    default = ImageFont.load_default(size)
    missing = _missing(default, printable)
    if not missing:
        return default, printable
    best: Font = default
    for name in SYSTEM_FONTS:
        font = _system_font(name, size)
        if font is None:
            continue
        lacks = _missing(font, printable)
        if len(lacks) < len(missing):
            best, missing = font, lacks
        if not missing:
            return best, printable
    _warn_once("".join(sorted(missing)))
    return best, "".join(_escape(char) if char in missing else char for char in printable)


def fitted(text: str, size: int, width: int, keep_end: bool = False) -> tuple[Font, str]:
    """Like ``font_and_text``, cut with ``...`` so that it is at most ``width`` pixels wide.

    ``keep_end`` cuts at the front, as suits paths.
    """
    font, drawable = font_and_text(text, size)
    if font.getlength(drawable) <= width:
        return font, drawable
    low, high = 0, len(drawable)  # the longest part that fits lies in low..high
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(_cut(drawable, middle, keep_end)) <= width:
            low = middle
        else:
            high = middle - 1
    return font, _cut(drawable, low, keep_end)


def _cut(text: str, length: int, keep_end: bool) -> str:
    return f"...{text[len(text) - length :]}" if keep_end else f"{text[:length].rstrip()}..."


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _missing(font: Font, text: str) -> set[str]:
    return {char for char in set(text) if not _draws(font, char)}


@lru_cache(maxsize=4096)
def _draws(font: Font, char: str) -> bool:
    if char.isspace():
        return True
    glyph, nothing = font.getmask(char), font.getmask(NO_CHARACTER)
    return glyph.size != nothing.size or bytes(glyph) != bytes(nothing)


@lru_cache(maxsize=64)
def _system_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _warn_once(characters: str) -> None:
    logger.warning("no font found here draws %s; install one that does, such as Noto Sans CJK", characters)
