"""Pictures of mistakes by class: what was taken for what, and for several labels an image what was found and missed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.report.drawing import (
    FAINT,
    INK,
    LINE,
    MARGIN,
    PAPER,
    RIGHT,
    WRONG,
    blend,
    font,
    shorten,
    to_png,
    write_upwards,
)

CELL, NAME_PIXELS, HEAD_PIXELS = 44, 150, 64
ROW_PIXELS, COLUMN_PIXELS, BAR_PIXELS = 26, 84, 220
KINDS = {"found": RIGHT, "missed": blend(WRONG, 0.45), "invented": WRONG}


@dataclass(frozen=True)
class LabelCounts:
    """How often a label was found where it is, missed where it is, and invented where it is not."""

    name: str
    found: int
    missed: int
    invented: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """The three, in the order of KINDS."""
        return self.found, self.missed, self.invented


def draw_confusion(names: Sequence[str], counts: npt.NDArray[np.int64], title: str, note: str = "") -> bytes:
    """A PNG of counts (k, k): true classes down, answers across, each cell coloured by its share of the row."""
    face, small, head = font(13), font(12), font(15)
    name_width = int(min(NAME_PIXELS, max(face.getlength(name) for name in names))) + 12
    left, top = MARGIN + 20 + name_width, HEAD_PIXELS + 20 + name_width
    note = note or "each cell: number of images, coloured by its share of the row"
    width = max(left + len(names) * CELL, MARGIN + int(head.getlength(title)), MARGIN + int(small.getlength(note)))
    sheet = Image.new("RGB", (width + MARGIN, top + len(names) * CELL + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 12), title, fill=INK, font=head)
    draw.text((MARGIN, 36), note, fill=FAINT, font=small)
    draw.text((left, HEAD_PIXELS), "answer", fill=FAINT, font=small)
    write_upwards(sheet, (MARGIN + 8, top + draw.textlength("label", small)), "label", small, FAINT)
    for row, name in enumerate(names):
        middle = top + row * CELL + CELL // 2
        text = shorten(name, face, NAME_PIXELS)
        draw.text((left - 8, middle), text, fill=INK, font=face, anchor="rm")
        write_upwards(sheet, (left + row * CELL + CELL // 2, top - 8), text, face, INK)
        whole = max(1, int(counts[row].sum()))
        for column, count in enumerate(counts[row].tolist()):
            x = left + column * CELL
            _fill_cell(draw, (x, top + row * CELL), count, count / whole, is_right=row == column)
    return to_png(sheet)


def _fill_cell(draw: ImageDraw.ImageDraw, corner: tuple[int, int], count: int, share: float, *, is_right: bool) -> None:
    x, y = corner
    # A single mistake among many must be seen.
    strength = 0.0 if not count else share if is_right else min(1.0, 0.15 + 0.85 * share**0.5)
    colour = blend(RIGHT if is_right else WRONG, strength)
    draw.rectangle((x, y, x + CELL, y + CELL), fill=colour, outline=LINE)
    if count or is_right:
        ink = PAPER if strength > 0.5 else INK
        text = f"{count:,}" if count < 100_000 else f"{count / 1000:.0f}k"
        draw.text((x + CELL // 2, y + CELL // 2), text, fill=ink, font=font(13 if len(text) < 5 else 11), anchor="mm")


def draw_label_counts(rows: Sequence[LabelCounts], title: str, note: str = "") -> bytes:
    """A PNG of a table for several labels an image, with a bar in each row; the longest is as wide as there is room."""
    face, small, head = font(13), font(12), font(15)
    note = note or "found: given and true; missed: true and not given; invented: given and not true"
    left = MARGIN + int(min(NAME_PIXELS, max(face.getlength(row.name) for row in rows))) + 16
    bar_left = left + len(KINDS) * COLUMN_PIXELS + 16
    width = max(bar_left + BAR_PIXELS, MARGIN + int(head.getlength(title)), MARGIN + int(small.getlength(note))) + MARGIN
    top = HEAD_PIXELS + ROW_PIXELS
    sheet = Image.new("RGB", (width, top + len(rows) * ROW_PIXELS + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 12), title, fill=INK, font=head)
    draw.text((MARGIN, 36), note, fill=FAINT, font=small)
    for place, (kind, colour) in enumerate(KINDS.items(), start=1):
        x = left + place * COLUMN_PIXELS
        draw.text((x, top - 6), kind, fill=FAINT, font=small, anchor="rb")
        square = x - draw.textlength(kind, small) - 15
        draw.rectangle((square, top - 17, square + 10, top - 7), fill=colour)
    longest = max(1, *(sum(row.counts) for row in rows))
    for number, row in enumerate(rows):
        y = top + number * ROW_PIXELS
        draw.line((MARGIN, y, width - MARGIN, y), fill=LINE)
        draw.text((MARGIN, y + ROW_PIXELS // 2), shorten(row.name, face, NAME_PIXELS), fill=INK, font=face, anchor="lm")
        _draw_counts(draw, row.counts, (left, bar_left, y), longest)
    return to_png(sheet)


def _draw_counts(draw: ImageDraw.ImageDraw, counts: Sequence[int], corner: tuple[int, int, int], longest: int) -> None:
    """The numbers of a row, and its bar of one piece a number."""
    left, bar_left, y = corner
    x = float(bar_left)
    for place, (count, colour) in enumerate(zip(counts, KINDS.values(), strict=True), start=1):
        draw.text((left + place * COLUMN_PIXELS, y + ROW_PIXELS // 2), f"{count:,}", fill=INK, font=font(13), anchor="rm")
        wide = BAR_PIXELS * count / longest
        if count:
            draw.rectangle((x, y + 6, x + max(wide - 1, 1), y + ROW_PIXELS - 6), fill=colour)
        x += wide
