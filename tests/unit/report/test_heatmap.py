import io

import numpy as np
from PIL import Image

from pipeline.report.drawing import RIGHT, WRONG
from pipeline.report.heatmap import CELL, HEAD_PIXELS, MAX_COLUMNS, NAME_PIXELS, THUMBNAIL, draw_heatmap

IMAGES = np.full((2, 8, 8, 3), 7, np.uint8)


def drawn(values: list[list[float]]) -> Image.Image:
    heads, marks = [str(column) for column in range(len(values))], [["", "9"]] * len(values)
    return Image.open(io.BytesIO(draw_heatmap(IMAGES, ["one", "two"], values, marks, heads))).convert("RGB")


def colour(sheet: Image.Image, row: int, column: int) -> tuple[int, ...]:
    corner = sheet.getpixel((THUMBNAIL + NAME_PIXELS + column * CELL + 1, HEAD_PIXELS + row * THUMBNAIL + 1))
    assert isinstance(corner, tuple)
    return corner


def test_low_is_vermilion_high_is_blue_and_between_is_white() -> None:
    sheet = drawn([[0.0, 1.0], [0.5, 0.9]])
    low, high, half = colour(sheet, 0, 0), colour(sheet, 1, 0), colour(sheet, 0, 1)
    assert (low, high) == (WRONG, RIGHT)
    assert half == (255, 255, 255)
    assert sheet.getpixel((0, HEAD_PIXELS)) == (7, 7, 7), "the image itself stands at the left"


def test_more_moments_than_fit_are_thinned_to_the_first_the_last_and_some_between() -> None:
    sheet = drawn([[0.0, 0.0], *([[0.5, 0.5]] * 500), [1.0, 1.0]])
    assert sheet.width == THUMBNAIL + NAME_PIXELS + MAX_COLUMNS * CELL + 4
    assert colour(sheet, 0, 0) == WRONG and colour(sheet, 0, MAX_COLUMNS - 1) == RIGHT


def test_a_title_stands_above_and_widens_a_narrow_picture() -> None:
    heads, marks = ["0"], [["", ""]]
    title = "a title that is longer than one column\nand has two lines"
    sheet = Image.open(io.BytesIO(draw_heatmap(IMAGES, ["one", "two"], [[0.5, 0.5]], marks, heads, title))).convert("RGB")
    plain = drawn([[0.5, 0.5]])
    assert sheet.width > plain.width and sheet.height == plain.height + 32
    assert sheet.getpixel((0, HEAD_PIXELS + 32)) == (7, 7, 7)
