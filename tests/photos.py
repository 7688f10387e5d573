"""Photos for tests: in memory, as files, and the preprocessing that leaves one as it is."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.golden import GoldenVectors
from pipeline.preprocess import PreprocessSpec

AS_STORED = PreprocessSpec(
    resize=None,
    crop=None,
    interpolation="bilinear",
    antialias=True,
    mean=[0.5, 0.5, 0.5],
    std=[0.25, 0.25, 0.25],
    resize_mode="shortest",
)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def golden_photos(golden_path: Path, folder: Path) -> list[Path]:
    """The golden images of a model as files in `folder`: greyscale, CMYK, rotated, transparent, a panorama and so on."""
    golden = GoldenVectors.read(golden_path)
    paths = []
    for kind, encoded in zip(golden.kinds, golden.encoded, strict=True):
        form = Image.open(io.BytesIO(encoded)).format
        paths.append(folder / f"{kind}.{str(form).lower()}")
        paths[-1].write_bytes(encoded)
    return paths
