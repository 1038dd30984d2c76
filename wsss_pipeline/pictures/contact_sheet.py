"""Lays pictures out on one sheet: a title, column headers, one row per image, cells of one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from wsss_pipeline.pictures.overlays import coloured
from wsss_pipeline.pictures.rows import Cell, Colour, Label, Row
from wsss_pipeline.pictures.typeface import fitted

CELL_WIDTH, CELL_HEIGHT = 240, 180
MARGIN, GAP = 24, 12
TITLE_SIZE, HEADER_SIZE, ROW_SIZE, CAPTION_SIZE = 22, 15, 15, 13
TITLE_HEIGHT, HEADER_HEIGHT, ROW_TITLE_HEIGHT, CAPTION_HEIGHT, ROW_GAP = 40, 30, 24, 22, 16
PAPER, MAT, RULE = (255, 255, 255), (240, 241, 243), (214, 216, 220)
INK, FAINT_INK, ALARM, ALARM_MAT = (26, 28, 32), (98, 102, 110), (170, 30, 30), (252, 236, 234)
SWATCH = 11


def draw_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """The sheet as an RGB picture; a column's header is the title of its cells, the last one for all to the right.

    Args:
        rows: cells no larger than ``CELL_WIDTH`` x ``CELL_HEIGHT``.
    """
    headers = {cell.title: cell.colour_map for row in rows for cell in row.cells}
    columns = max(len(row.cells) for row in rows)
    row_height = ROW_TITLE_HEIGHT + CELL_HEIGHT + CAPTION_HEIGHT + ROW_GAP
    width = 2 * MARGIN + columns * (CELL_WIDTH + GAP) - GAP
    height = 2 * MARGIN + TITLE_HEIGHT + HEADER_HEIGHT + len(rows) * row_height - ROW_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (MARGIN, MARGIN), title, TITLE_SIZE, width - 2 * MARGIN)
    top = MARGIN + TITLE_HEIGHT
    for column, (header, colour_map) in enumerate(headers.items()):
        _draw_header(sheet, draw, (_left(column), top), header, colour_map)
    top += HEADER_HEIGHT
    for row in rows:
        draw.line((MARGIN, top - 5, width - MARGIN, top - 5), RULE)
        _draw_row_title(draw, top, row, width - 2 * MARGIN)
        for column, cell in enumerate(row.cells):
            _draw_cell(sheet, draw, (_left(column), top + ROW_TITLE_HEIGHT), cell)
        top += row_height
    return sheet


def _left(column: int) -> int:
    return MARGIN + column * (CELL_WIDTH + GAP)


def _draw_header(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    header: str,
    colour_map: int | None,
) -> None:
    """The header and, of a colour map, its scale from 0 to 1."""
    left, top = corner
    used = _text(draw, corner, header, HEADER_SIZE, CELL_WIDTH)
    if colour_map is None:
        return
    zero = left + max(used + 12, CELL_WIDTH - 110)
    scale = coloured(np.linspace(0, 1, left + CELL_WIDTH - 14 - (zero + 12))[None].repeat(10, 0), colour_map)
    _text(draw, (zero, top + 1), "0", CAPTION_SIZE, 10, FAINT_INK)
    sheet.paste(Image.fromarray(scale), (zero + 12, top + 5))
    _text(draw, (left + CELL_WIDTH - 9, top + 1), "1", CAPTION_SIZE, 10, FAINT_INK)


def _draw_row_title(draw: ImageDraw.ImageDraw, top: int, row: Row, width: int) -> None:
    used = _text(draw, (MARGIN, top), row.image_id, ROW_SIZE, width, keep_end=True)
    if used + 40 < width:
        _text(draw, (MARGIN + used + 14, top + 1), row.note, CAPTION_SIZE, width - used - 14, FAINT_INK)


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: Cell) -> None:
    left, top = corner
    box = (left, top, left + CELL_WIDTH - 1, top + CELL_HEIGHT - 1)
    if cell.pixels is None:
        draw.rectangle(box, ALARM_MAT, ALARM)
        _draw_lines(draw, corner, cell.problem)
    else:
        height, width = cell.pixels.shape[:2]
        draw.rectangle(box, MAT)
        place = (left + (CELL_WIDTH - width) // 2, top + (CELL_HEIGHT - height) // 2)
        sheet.paste(Image.fromarray(cell.pixels), place)
    x = left
    for label in cell.caption:
        room = left + CELL_WIDTH - x
        if room < 3 * SWATCH:
            break
        x = _draw_label(draw, (x, top + CELL_HEIGHT + 3), label, room)


def _draw_label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], label: Label, room: int) -> int:
    """Draws a piece of caption; the abscissa at which the next one may start."""
    x, y = corner
    if label.colour is not None:
        draw.rectangle((x, y + 3, x + SWATCH - 1, y + 2 + SWATCH), label.colour, FAINT_INK)
        x, room = x + SWATCH + 5, room - SWATCH - 5
    return x + _text(draw, (x, y), label.text, CAPTION_SIZE, room, FAINT_INK) + 10


def _draw_lines(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Text broken into lines inside a cell."""
    left, top = corner
    room, y = CELL_WIDTH - 24, top + 14
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        whole = fitted(longer, CAPTION_SIZE, room)[1] == fitted(longer, CAPTION_SIZE, 10**6)[1]
        if whole or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for line in lines[: (CELL_HEIGHT - 28) // 18]:
        _text(draw, (left + 12, y), line, CAPTION_SIZE, room, ALARM)
        y += 18


def _text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    colour: Colour = INK,
    keep_end: bool = False,
) -> int:
    """Draws one line, cut to ``width``; the width that it took."""
    font, drawable = fitted(text, size, width, keep_end)
    # A common baseline, so that texts of different fonts and sizes stand in line.
    draw.text((corner[0], corner[1] + size), drawable, colour, font, anchor="ls")
    return round(font.getlength(drawable))
