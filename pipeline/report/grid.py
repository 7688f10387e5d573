"""A picture of many small images, each over its caption: what a network is fed, for a person to look at."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 96
CAPTION_PIXELS = 16
GAP = 4


def draw_grid(images: npt.NDArray[np.uint8], captions: list[str], columns: int = 8) -> bytes:
    """A PNG of images (N, H, W, 3), pixel for pixel; small ones are enlarged by a whole factor, without smoothing."""
    height, width = images.shape[1:3]
    factor = max(1, -(-SMALLEST_TILE // max(height, width)))
    tile_width, tile_height = max(width * factor, SMALLEST_TILE), height * factor
    rows = -(-len(images) // columns)
    cell_width, cell_height = tile_width + GAP, tile_height + CAPTION_PIXELS + GAP
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * cell_width + GAP // 2, number // columns * cell_height + GAP // 2
        sheet.paste(Image.fromarray(pixels).resize((width * factor, tile_height), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 1, top + tile_height), _shorten(caption, font, tile_width), fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def draw_tile(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG of one image (H, W, 3); a small one is enlarged as in a grid."""
    height, width = pixels.shape[:2]
    factor = max(1, -(-SMALLEST_TILE // max(height, width)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
