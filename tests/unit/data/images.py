"""Encoded images made of numbers, for tests of what reads them."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random pixels, (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Smooth pixels, (H, W, 3), that JPEG keeps nearly as they are: red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of a file of `format`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG of pixels (H, W, 3) or (H, W)."""
    return encode(Image.fromarray(pixels), "PNG")


def as_jpeg(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    """A JPEG of pixels (H, W, 3) or (H, W)."""
    return encode(Image.fromarray(pixels), "JPEG", quality=95, **options)
