"""Lays rows out on one sheet: a title, column headers, one row per image, cells of one size."""

from __future__ import annotations

import logging
import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsss_pipeline.pictures.overlays import Colour, coloured
from wsss_pipeline.pictures.rows import Row

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL_WIDTH, CELL_HEIGHT = 240, 180
MARGIN, GAP = 24, 12
TITLE_SIZE, HEADER_SIZE, ROW_SIZE, CAPTION_SIZE = 22, 15, 15, 13
TITLE_HEIGHT, HEADER_HEIGHT, ROW_TITLE_HEIGHT, CAPTION_HEIGHT, ROW_GAP = 40, 30, 24, 22, 16
PAPER, MAT, RULE = (255, 255, 255), (240, 241, 243), (214, 216, 220)
INK, FAINT_INK, ALARM, ALARM_MAT = (26, 28, 32), (98, 102, 110), (170, 30, 30), (252, 236, 234)
SWATCH = 11
PROBLEM_LETTERS, PROBLEM_LINES, LINE_HEIGHT = 32, 8, 18  # of the text in a cell without an image

# Pillow brings a Latin font; these are looked for, in this order, when a text needs more than that.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc"),
    *("Arial Unicode.ttf", "Hiragino Sans GB.ttc", "segoeui.ttf", "arial.ttf", "msyh.ttc"),
    *("YuGothM.ttc", "malgun.ttf"),
)
NO_CHARACTER = "\uffff"  # a noncharacter: what a font draws for it stands for "I have no such glyph"


def draw_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """The sheet in RGB; a column's header is the title of its cells, the last one for all to the right.

    Args:
        rows: cells no larger than ``CELL_WIDTH`` x ``CELL_HEIGHT``.
    """
    headers = {cell.title: cell.colour_map for row in rows for cell in row.cells}
    columns = max(len(row.cells) for row in rows)
    row_height = ROW_TITLE_HEIGHT + CELL_HEIGHT + CAPTION_HEIGHT + ROW_GAP
    width = columns * (CELL_WIDTH + GAP) - GAP
    height = TITLE_HEIGHT + HEADER_HEIGHT + len(rows) * row_height - ROW_GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = range(MARGIN, MARGIN + width, CELL_WIDTH + GAP)
    draw_text(draw, (MARGIN, MARGIN), title, TITLE_SIZE, width)
    top = MARGIN + TITLE_HEIGHT
    for left, (header, colour_map) in zip(lefts, headers.items(), strict=False):
        end = draw_text(draw, (left, top), header, HEADER_SIZE, CELL_WIDTH)
        if colour_map is not None:  # its scale from 0 to 1
            zero, one = max(end + 12, left + CELL_WIDTH - 110), left + CELL_WIDTH - 9
            scale = coloured(np.linspace(0, 1, one - zero - 17)[None].repeat(10, 0), colour_map)
            draw_text(draw, (zero, top + 1), "0", CAPTION_SIZE, 10, FAINT_INK)
            sheet.paste(Image.fromarray(scale), (zero + 12, top + 5))
            draw_text(draw, (one, top + 1), "1", CAPTION_SIZE, 10, FAINT_INK)
    top += HEADER_HEIGHT
    for row in rows:
        draw.line((MARGIN, top - 5, MARGIN + width, top - 5), RULE)
        end = draw_text(draw, (MARGIN, top), row.image_id, ROW_SIZE, width, keep_end=True)
        if (room := MARGIN + width - end - 14) > 26:
            draw_text(draw, (end + 14, top + 1), row.note, CAPTION_SIZE, room, FAINT_INK)
        upper = top + ROW_TITLE_HEIGHT
        for left, cell in zip(lefts, row.cells, strict=False):
            box = (left, upper, left + CELL_WIDTH - 1, upper + CELL_HEIGHT - 1)
            if cell.pixels is None:
                draw.rectangle(box, ALARM_MAT, ALARM)
                for number, line in enumerate(textwrap.wrap(cell.problem, PROBLEM_LETTERS)[:PROBLEM_LINES]):
                    corner = (left + 12, upper + 14 + number * LINE_HEIGHT)
                    draw_text(draw, corner, line, CAPTION_SIZE, CELL_WIDTH - 24, ALARM)
            else:
                draw.rectangle(box, MAT)
                cell_height, cell_width = cell.pixels.shape[:2]
                corner = (left + (CELL_WIDTH - cell_width) // 2, upper + (CELL_HEIGHT - cell_height) // 2)
                sheet.paste(Image.fromarray(cell.pixels), corner)
            x, y = left, upper + CELL_HEIGHT + 3
            for label in cell.caption:
                if left + CELL_WIDTH - x < 3 * SWATCH:
                    break
                if label.colour is not None:
                    draw.rectangle((x, y + 3, x + SWATCH - 1, y + 2 + SWATCH), label.colour, FAINT_INK)
                    x += SWATCH + 5
                x = draw_text(draw, (x, y), label.text, CAPTION_SIZE, left + CELL_WIDTH - x, FAINT_INK) + 10
        top += row_height
    return sheet


def draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    colour: Colour = INK,
    keep_end: bool = False,
) -> int:
    """Draws one line, cut to ``width`` (at its front with ``keep_end``), and returns the abscissa of its end."""
    font, text = font_and_text(text, size)

    def cut(length: int) -> str:
        return f"...{text[len(text) - length :]}" if keep_end else f"{text[:length].rstrip()}..."

    if font.getlength(text) > width:
        lengths = range(1, len(text) + 1)
        text = cut(bisect_right(lengths, width, key=lambda length: math.ceil(font.getlength(cut(length)))))
    # a common baseline, so that texts of different fonts and sizes stand in line
    draw.text((corner[0], corner[1] + size), text, colour, font, anchor="ls")
    return corner[0] + round(font.getlength(text))


def font_and_text(text: str, size: int) -> tuple[Font, str]:
    """The first font of ``size`` pixels that has most of the characters, and the text as it can be drawn with it.

    Characters that it lacks, and control characters, are written as escapes such as ``\\u732b``.
    """
    text = _escaped(text, {char for char in text if not char.isprintable()})
    best, missing = _font("", size), set(text)
    for name in ("", *SYSTEM_FONTS):
        font = _font(name, size)
        lacks = {char for char in set(text) if font is None or not _draws(font, char)}
        if len(lacks) < len(missing):
            best, missing = font, lacks
        if not missing:
            break
    if missing:
        _warn_once("".join(sorted(missing)))
    assert best is not None  # Pillow's own
    return best, _escaped(text, missing)


def _escaped(text: str, characters: set[str]) -> str:
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode("ascii") if char in characters else char
        for char in text
    )


@lru_cache(maxsize=4096)
def _draws(font: Font, char: str) -> bool:
    if char.isspace():
        return True
    glyph, nothing = font.getmask(char), font.getmask(NO_CHARACTER)
    return glyph.size != nothing.size or bytes(glyph) != bytes(nothing)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    """A font of the system, None where it isn't there; Pillow's own for the empty name."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _warn_once(characters: str) -> None:
    logger.warning("no font found here draws %s; install one that does, such as Noto Sans CJK", characters)
