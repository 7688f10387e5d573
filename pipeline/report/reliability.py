"""The reliability diagram: how often answers of each confidence are right, over how many answers there are of it."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from pipeline.report.drawing import FAINT, INK, LINE, MARGIN, PAPER, RIGHT, WRONG, blend, font, to_png, write_upwards

SIDE, COUNTS_PIXELS, HEAD_PIXELS, AXIS_PIXELS, BETWEEN = 420, 110, 68, 58, 34


def draw_reliability(bins: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG of bins with `low`, `high`, `count`, `confidence` and `accuracy` (nan where the count is 0)."""
    note = "blue: right, by bin of confidence; orange: surer than right; light: more often right than sure"
    small, head = font(12), font(15)
    width = max(AXIS_PIXELS + SIDE, int(head.getlength(title)), int(small.getlength(note))) + 2 * MARGIN
    left, top = MARGIN + AXIS_PIXELS, HEAD_PIXELS
    base = top + SIDE + BETWEEN + COUNTS_PIXELS
    sheet = Image.new("RGB", (width, base + 52), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 12), title, fill=INK, font=head)
    draw.text((MARGIN, 36), note, fill=FAINT, font=small)
    _draw_axes(sheet, left, top, base)
    largest = max(1, *(entry["count"] for entry in bins))
    for entry in bins:
        x = (left + entry["low"] * SIDE + 1, left + entry["high"] * SIDE - 1)
        if not entry["count"]:
            continue
        right, sure = (top + SIDE * (1 - entry[name]) for name in ("accuracy", "confidence"))
        draw.rectangle((x[0], right, x[1], top + SIDE), fill=blend(RIGHT, 0.85))
        gap = blend(RIGHT, 0.35) if right < sure else blend(WRONG, 0.7)
        draw.rectangle((x[0], min(right, sure), x[1], max(right, sure)), fill=gap)
        tall = max(1.0, COUNTS_PIXELS * entry["count"] / largest)
        draw.rectangle((x[0], base - tall, x[1], base), fill=blend(INK, 0.55))
    for piece in range(0, SIDE, 12):
        draw.line((left + piece, top + SIDE - piece, left + piece + 7, top + SIDE - piece - 7), fill=INK, width=2)
    draw.text((left + 4, top + SIDE + BETWEEN - 4), f"tallest: {largest:,} answers", fill=FAINT, font=small, anchor="lb")
    return to_png(sheet)


def _draw_axes(sheet: Image.Image, left: int, top: int, base: int) -> None:
    draw, small = ImageDraw.Draw(sheet), font(12)
    for tick in range(6):
        share = tick / 5
        y, x = top + SIDE * (1 - share), left + SIDE * share
        draw.line((left, y, left + SIDE, y), fill=LINE)
        draw.text((left - 8, y), f"{share:.1f}", fill=FAINT, font=small, anchor="rm")
        draw.line((x, top, x, top + SIDE), fill=LINE)
        draw.text((x, base + 6), f"{share:.1f}", fill=FAINT, font=small, anchor="mt")
    draw.line((left, base, left + SIDE, base), fill=FAINT)
    draw.text((left + SIDE / 2, base + 26), "confidence", fill=INK, font=small, anchor="mt")
    write_upwards(sheet, (MARGIN + 8, top + SIDE / 2 + draw.textlength("accuracy", small) / 2), "accuracy", small, INK)
    write_upwards(sheet, (MARGIN + 8, base - COUNTS_PIXELS / 2 + draw.textlength("answers", small) / 2), "answers", small, INK)
