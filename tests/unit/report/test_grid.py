import io

import numpy as np
from PIL import Image

from pipeline.report.grid import draw_grid, draw_tile


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as file:
        return file.convert("RGB")


def test_a_grid_shows_images_enlarged_without_smoothing_over_their_captions() -> None:
    images = np.zeros((9, 2, 4, 3), np.uint8)  # (N, H, W, 3)
    images[..., 0] = (np.arange(9, dtype=np.uint8) * 20)[:, None, None]
    images[:, 1, 3, 2] = 255  # the lower right pixel has blue in it
    picture = opened(draw_grid(images, ["cat"] * 8 + ["a name in \N{CJK UNIFIED IDEOGRAPH-6F22} that is far too long"]))
    # Tiles are 96 x 48 pixels, with 16 below for the caption and 4 between them; the ninth begins a second row.
    for number in range(9):
        left, top = (number % 8) * 100 + 2, (number // 8) * 68 + 2
        assert picture.getpixel((left, top)) == (number * 20, 0, 0)
        assert picture.getpixel((left + 71, top + 47)) == (number * 20, 0, 0)
        assert picture.getpixel((left + 72, top + 47)) == (number * 20, 0, 255)
        assert picture.getpixel((left + 95, top + 48)) == (255, 255, 255)


def test_a_tile_is_one_image_enlarged_by_a_whole_factor() -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    picture = np.asarray(opened(draw_tile(pixels)))
    assert picture.shape == (48, 96, 3)
    assert np.array_equal(picture[::24, ::24], pixels)
    large = np.zeros((100, 200, 3), np.uint8)
    assert np.asarray(opened(draw_tile(large))).shape == large.shape
