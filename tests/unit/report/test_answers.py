import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.report.answers import GAP, HEAD_PIXELS, TILE, AnsweredImage, draw_answers
from pipeline.report.drawing import MARGIN, WRONG

CELL_WIDTH = TILE + GAP
EIGHT = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as file:
        return file.convert("RGB")


def pixels_of(sheet: Image.Image, number: int) -> npt.NDArray[np.uint8]:
    left = MARGIN + number * CELL_WIDTH
    return np.asarray(sheet.crop((left, HEAD_PIXELS, left + TILE, HEAD_PIXELS + TILE)))


def has_colour(sheet: Image.Image, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(sheet.crop(box)) == colour).all(axis=2).any())


def test_small_images_are_enlarged_by_a_whole_factor_and_wrong_ones_stand_in_a_frame() -> None:
    sheet = opened(draw_answers([AnsweredImage(EIGHT, "3"), AnsweredImage(EIGHT, "3", "8", 0.97)], "two"))
    for number in range(2):
        assert np.array_equal(pixels_of(sheet, number)[8::16, 8::16], EIGHT)
        left = MARGIN + number * CELL_WIDTH
        assert has_colour(sheet, (left - 3, HEAD_PIXELS, left, HEAD_PIXELS + TILE), WRONG) == bool(number)
        caption = (left, HEAD_PIXELS + TILE + 6, left + TILE, HEAD_PIXELS + TILE + 44)
        assert has_colour(sheet, caption, WRONG) == bool(number), "the wrong answer below the label"


def test_large_images_and_long_names_stay_in_their_places() -> None:
    large = np.full((300, 600, 3), 200, np.uint8)
    name = "a name of a class that is far too long for its place below an image"
    images = [AnsweredImage(large, name, name, 0.5)] * 7
    sheet = opened(draw_answers(images, "seven"))
    assert sheet.width == 6 * CELL_WIDTH - GAP + 2 * MARGIN
    tile = pixels_of(sheet, 0)
    assert (tile[-TILE // 2 + 1 :] == 200).all() and not (tile[: TILE // 2 - 4] == 200).all(), "256 x 128 fits as 128 x 64"
    between = np.asarray(sheet.crop((MARGIN + TILE + 4, HEAD_PIXELS, MARGIN + CELL_WIDTH - 4, sheet.height)))
    assert (between == 255).all(), "nothing reaches into the next column"


def test_without_mistakes_the_picture_says_so() -> None:
    sheet = opened(draw_answers([], "0 wrong of 360 validation images"))
    assert sheet.height > HEAD_PIXELS
    assert not (np.asarray(sheet.crop((0, HEAD_PIXELS, sheet.width, sheet.height))) == 255).all()


def test_the_arrow_stands_before_a_name_that_is_read_from_right_to_left() -> None:
    latin, hebrew = (opened(draw_answers([AnsweredImage(EIGHT, "3", name)], "one")) for name in ("8", "שלום"))
    arrow = (MARGIN, HEAD_PIXELS + TILE + 22, MARGIN + 9, HEAD_PIXELS + TILE + 44)
    assert has_colour(latin, (MARGIN, arrow[1], MARGIN + TILE, arrow[3]), WRONG)
    assert np.array_equal(np.asarray(latin.crop(arrow)), np.asarray(hebrew.crop(arrow)))
