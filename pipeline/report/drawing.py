"""What the drawn pictures share: a typeface, colours, text that fits its place, and thumbnails. Pictures are opaque on white.

Colours are told apart by the colour-blind too: blue is right, vermilion is wrong.
"""

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

INK, FAINT, LINE, PAPER = (27, 31, 36), (89, 99, 110), (208, 214, 221), (255, 255, 255)
RIGHT, WRONG = (0, 92, 158), (196, 64, 0)
MARGIN = 16


@functools.cache
def font(size: int) -> Font:
    """DejaVu where matplotlib brought it (MLflow needs that): Pillow's own has hardly more than ASCII."""
    # The module is looked for and not imported, which would take a second.
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def to_png(sheet: Image.Image) -> bytes:
    """The bytes of a PNG."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def shorten(text: str, face: Font, width: float) -> str:
    """The text, or its beginning with an ellipsis, so that it is at most `width` pixels wide."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def blend(colour: Colour, share: float) -> Colour:
    """White with a share of a colour."""
    red, green, blue = (round(255 + (part - 255) * share) for part in colour)
    return red, green, blue


def write_upwards(sheet: Image.Image, place: tuple[float, float], text: str, face: Font, fill: Colour) -> None:
    """Write text that runs upwards, centred on x and beginning at y."""
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=face)
    mask = mask.rotate(90, expand=True)
    sheet.paste(fill, (round(place[0] - mask.width / 2), round(place[1] - mask.height)), mask)


def thumbnail(pixels: npt.NDArray[np.uint8], side: int) -> Image.Image:
    """An image (H, W, 3) that fits into a square: a small one is enlarged by a whole factor without smoothing."""
    image = Image.fromarray(pixels)
    factor = side // max(image.size)
    if factor:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
