"""A picture of numbers from 0 to 1: a row for each image, a column for each moment; marks say what was wrong."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.report.drawing import INK, PAPER, RIGHT, WRONG, Colour, blend, font, shorten, to_png

CELL, THUMBNAIL, NAME_PIXELS, HEAD_PIXELS = 20, 40, 96, 20
MAX_COLUMNS = 48


def draw_heatmap(
    images: npt.NDArray[np.uint8],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    marks: Sequence[Sequence[str]],
    heads: Sequence[str],
    title: str = "",
) -> bytes:
    """A PNG. Images (N, H, W, 3) with their names; `values[column][row]`, `marks[column][row]`, and a head over each column.

    Of more columns than fit, the first and last and some between are drawn. Each line of the title stands above.
    """
    shown = sorted({round(place) for place in np.linspace(0, len(values) - 1, min(len(values), MAX_COLUMNS))})
    left = THUMBNAIL + NAME_PIXELS
    small, lines = font(11), title.splitlines()
    above = HEAD_PIXELS + 16 * len(lines)
    width = max(left + len(shown) * CELL, *(int(small.getlength(line)) + 4 for line in ["", *lines])) + 4
    sheet = Image.new("RGB", (width, above + len(images) * THUMBNAIL), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((4, 4 + 16 * number), line, fill=INK, font=small)
    for row, (pixels, name) in enumerate(zip(images, names, strict=True)):
        top = above + row * THUMBNAIL
        sheet.paste(Image.fromarray(pixels).resize((THUMBNAIL - 2, THUMBNAIL - 2)), (0, top))
        draw.text((THUMBNAIL + 2, top + THUMBNAIL // 3), shorten(name, small, NAME_PIXELS - 4), fill=INK, font=small)
        for place, column in enumerate(shown):
            x = left + place * CELL
            draw.rectangle((x, top, x + CELL - 2, top + THUMBNAIL - 3), fill=_colour(values[column][row]))
            ink = PAPER if abs(values[column][row] - 0.5) > 0.3 else INK
            draw.text((x + 2, top + THUMBNAIL // 3), marks[column][row][:3], fill=ink, font=small)
    last = -2
    for place, column in enumerate(shown):
        if place - last >= 2:  # a head may be wider than its cell
            draw.text((left + place * CELL, above - 16), heads[column], fill=INK, font=small)
            last = place
    return to_png(sheet)


def _colour(value: float) -> Colour:
    """Blue for 1, vermilion for 0, white between."""
    return blend(RIGHT, 2 * value - 1) if value >= 0.5 else blend(WRONG, 1 - 2 * value)
