"""A picture of images with what was answered: the label alone where it was right, in a frame and with the answer where not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.report.drawing import FAINT, INK, LINE, MARGIN, PAPER, WRONG, font, shorten, thumbnail, to_png

TILE, GAP, FRAME, LINE_PIXELS, HEAD_PIXELS = 128, 14, 3, 17, 40


@dataclass(frozen=True)
class AnsweredImage:
    """One image (H, W, 3), its label, and the answer in words, empty where the answer is the label."""

    pixels: npt.NDArray[np.uint8]
    label: str
    answer: str = ""
    confidence: float | None = None


def draw_answers(images: Sequence[AnsweredImage], title: str, columns: int = 6) -> bytes:
    """A PNG of images over label and answer, below a title; without images a line says that there is none."""
    face, head = font(12), font(15)
    rows = max(1, -(-len(images) // columns))
    cell_width, cell_height = TILE + GAP, TILE + 2 * LINE_PIXELS + 10 + GAP
    width = max(min(columns, len(images)) * cell_width - GAP, int(head.getlength(title)) + 1) + 2 * MARGIN
    sheet = Image.new("RGB", (width, HEAD_PIXELS + rows * cell_height + 4), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 12), title, fill=INK, font=head)
    if not images:
        draw.text((MARGIN, HEAD_PIXELS + 8), "There is none.", fill=INK, font=face)
    for number, image in enumerate(images):
        left, top = MARGIN + number % columns * cell_width, HEAD_PIXELS + number // columns * cell_height
        _place(sheet, image, (left, top))
        _write_below(draw, image, left, top + TILE + FRAME + 2)
    return to_png(sheet)


def _place(sheet: Image.Image, image: AnsweredImage, corner: tuple[int, int]) -> None:
    """Put an image on the ground of its square, with a frame that says whether it was answered rightly."""
    tile = thumbnail(image.pixels, TILE)
    left, top = corner[0] + (TILE - tile.width) // 2, corner[1] + TILE - tile.height
    box = (left - 1, top - 1, left + tile.width, top + tile.height)
    draw = ImageDraw.Draw(sheet)
    if image.answer:
        box = (left - FRAME, top - FRAME, left + tile.width + FRAME - 1, top + tile.height + FRAME - 1)
        draw.rectangle(box, fill=WRONG)
    else:
        draw.rectangle(box, fill=LINE)
    sheet.paste(tile, (left, top))


def _write_below(draw: ImageDraw.ImageDraw, image: AnsweredImage, left: int, top: int) -> None:
    """The label, and in a second line the answer where it is another, with its confidence to the right."""
    face, room = font(12), float(TILE)
    last = top + (LINE_PIXELS if image.answer else 0)
    if image.confidence is not None:
        sure = f"{image.confidence:.0%}"
        room -= face.getlength(f"{sure} ")
        draw.text((left + TILE, last), sure, fill=FAINT, font=face, anchor="ra")
    draw.text((left, top), shorten(image.label, face, TILE if image.answer else room), fill=INK, font=face)
    if image.answer:
        # The mark keeps the arrow before a name of a script from right to left.
        draw.text((left, last), shorten(f"\N{LEFT-TO-RIGHT MARK}→ {image.answer}", face, room), fill=WRONG, font=face)
