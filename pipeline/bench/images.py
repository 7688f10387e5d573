"""Photographs to measure with: seeded crops of scikit-learn's two sample photos with sensor noise, in class folders."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
NOISE = 8.6  # levels; gives files of about 71 KB
QUALITIES = (85, 91)
NUM_CLASSES = 10


def make_images(folder: Path, number: int, seed: int = 0) -> Path:
    """Write `number` JPEGs of 500 x 375 pixels into FOLDER/CLASS/ unless they are there, and return the folder."""
    from sklearn.datasets import load_sample_images

    done = folder / f".{number}-{seed}"
    if done.is_file():
        return folder
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(number):
        path = folder / f"class-{index % NUM_CLASSES}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_make_image(photos, np.random.default_rng((seed, index))))
    done.touch()
    return folder


def _make_image(photos: list[Image.Image], draw: np.random.Generator) -> bytes:
    first, second = (_crop(photos[number], draw) for number in draw.permutation(len(photos)))
    mixed = np.asarray(Image.blend(first, second, float(draw.uniform(0.0, 0.35))), np.float32)
    noisy = mixed + draw.normal(0, NOISE, mixed.shape)
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=int(draw.integers(QUALITIES[0], QUALITIES[1] + 1)))
    return buffer.getvalue()


def _crop(photo: Image.Image, draw: np.random.Generator) -> Image.Image:
    share = draw.uniform(0.6, 1.0)
    width, height = int(photo.width * share), int(photo.height * share)
    left, top = (int(draw.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    return photo.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
