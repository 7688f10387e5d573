import io

import numpy as np
from PIL import Image

from pipeline.report.confusion import (
    BAR_PIXELS,
    CELL,
    KINDS,
    NAME_PIXELS,
    ROW_PIXELS,
    LabelCounts,
    draw_confusion,
    draw_label_counts,
)
from pipeline.report.drawing import MARGIN, RIGHT


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as file:
        return file.convert("RGB")


def cell(sheet: Image.Image, size: int, row: int, column: int) -> tuple[int, ...]:
    """The colour of a cell's corner; the matrix stands at the lower right."""
    x, y = sheet.width - MARGIN - (size - column) * CELL + 3, sheet.height - MARGIN - (size - row) * CELL + 3
    colour = sheet.getpixel((x, y))
    assert isinstance(colour, tuple)
    return colour


def test_right_answers_are_blue_mistakes_vermilion_and_more_of_a_row_is_darker() -> None:
    names = ["a class with a rather long name", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    counts = np.diag([10, 10, 5, 0, 9, 9, 9, 9, 9, 9])
    counts[2, 0], counts[4, 1] = 5, 1
    sheet = opened(draw_confusion(names, counts, "title"))
    assert cell(sheet, 10, 0, 0) == RIGHT
    assert cell(sheet, 10, 0, 1) == cell(sheet, 10, 3, 3) == (255, 255, 255), "a count of nothing has no colour"
    half, many, few = cell(sheet, 10, 2, 2), cell(sheet, 10, 2, 0), cell(sheet, 10, 4, 1)
    assert half[2] > half[0] > RIGHT[0]
    assert many[0] > many[2] and few[0] > few[2], "vermilion"
    assert many[2] < few[2] < 240, "one of ten can be seen, and half is darker"


def test_the_picture_is_as_wide_as_its_title_and_no_name_takes_more_than_its_place() -> None:
    names, counts = ["x" * 200, "y"], np.array([[123_456, 0], [3, 12_345]])
    narrow = opened(draw_confusion(names, counts, "t", "n"))
    wide = opened(draw_confusion(names, counts, "a title of many words that is longer than two cells and a name", "n"))
    assert narrow.width < NAME_PIXELS + 2 * CELL + 80 < wide.width
    edge = np.asarray(wide.crop((wide.width - 8, 0, wide.width, 60)))
    assert (edge == 255).all(), "the title ends before the edge"


def test_the_bar_of_a_label_is_as_long_as_its_counts() -> None:
    rows = [LabelCounts("blue", 60, 30, 10), LabelCounts("green", 20, 0, 0), LabelCounts("red", 0, 0, 0)]
    sheet = opened(draw_label_counts(rows, "t", "n"))
    found, missed, invented = KINDS.values()
    for number, expected in enumerate([(60, 30, 10), (20, 0, 0), (0, 0, 0)]):
        y = sheet.height - MARGIN - (len(rows) - number) * ROW_PIXELS + 9
        line = np.asarray(sheet.crop((sheet.width - MARGIN - BAR_PIXELS, y, sheet.width, y + 1)))[0]
        lengths = [int((line == colour).all(axis=1).sum()) for colour in (found, missed, invented)]
        np.testing.assert_allclose(lengths, np.array(expected) * BAR_PIXELS / 100, atol=1.5)  # whole pixels
