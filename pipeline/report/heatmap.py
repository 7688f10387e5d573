"""A picture of numbers from 0 to 1: a row for each image, a column for each moment; marks say what was wrong."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CELL, THUMBNAIL, NAME_PIXELS, HEAD_PIXELS = 20, 40, 96, 20
MAX_COLUMNS = 48
LOW, HIGH = np.array([178, 34, 52]), np.array([36, 110, 68])  # red for 0, green for 1, white between


def draw_heatmap(
    images: npt.NDArray[np.uint8],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    marks: Sequence[Sequence[str]],
    heads: Sequence[str],
) -> bytes:
    """A PNG. Images (N, H, W, 3) with their names; `values[column][row]`, `marks[column][row]`, and a head over each column.

    Of more columns than fit, the first and last and some between are drawn.
    """
    shown = sorted({round(place) for place in np.linspace(0, len(values) - 1, min(len(values), MAX_COLUMNS))})
    left = THUMBNAIL + NAME_PIXELS
    sheet = Image.new("RGB", (left + len(shown) * CELL + 4, HEAD_PIXELS + len(images) * THUMBNAIL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (pixels, name) in enumerate(zip(images, names, strict=True)):
        top = HEAD_PIXELS + row * THUMBNAIL
        sheet.paste(Image.fromarray(pixels).resize((THUMBNAIL - 2, THUMBNAIL - 2)), (0, top))
        draw.text((THUMBNAIL + 2, top + THUMBNAIL // 3), name[:14], fill="black", font=font)
        for place, column in enumerate(shown):
            x = left + place * CELL
            draw.rectangle((x, top, x + CELL - 2, top + THUMBNAIL - 3), fill=_colour(values[column][row]))
            draw.text((x + 2, top + THUMBNAIL // 3), marks[column][row][:3], fill="black", font=font)
    last = -2
    for place, column in enumerate(shown):
        if place - last >= 2:  # a head may be wider than its cell
            draw.text((left + place * CELL, 4), heads[column], fill="black", font=font)
            last = place
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _colour(value: float) -> tuple[int, int, int]:
    end, share = (HIGH, 2 * value - 1) if value >= 0.5 else (LOW, 1 - 2 * value)
    red, green, blue = (np.array([255, 255, 255]) + share * (end - 255)).round().astype(int).tolist()
    return red, green, blue
