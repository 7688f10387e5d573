"""Where raw images come from: scikit-learn's handwritten digits, or a folder with one folder of images a class.

A source is a list of small descriptions; bytes are read one image at a time, so memory does not grow with the data set.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import DataError
from pipeline.files import digest_of
from pipeline.manifest import IMAGE_EXTENSIONS

SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class LabelledImage:
    """One raw image: a name that is unique in its source, its class, and how to get its encoded bytes."""

    name: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageSource:
    """All images of a source. `fingerprint` changes when an image is added, removed or rewritten."""

    kind: str
    class_names: list[str]
    images: list[LabelledImage]
    fingerprint: str
    num_ignored: int = 0


def open_source(source: str) -> ImageSource:
    """Return the source that the configuration names: `digits` or a folder. Raises DataError."""
    if source == "digits":
        return open_digits()
    return open_class_folders(Path(source).expanduser())


def open_digits() -> ImageSource:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn (from the UCI repository)."""
    from sklearn.datasets import load_digits  # costs 2.4 s

    digits = load_digits()
    grey = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)  # (1797, 8, 8)
    images = [
        LabelledImage(f"digit-{number:04d}", int(label), functools.partial(_encode_png, pixels))
        for number, (pixels, label) in enumerate(zip(grey, digits.target, strict=True))
    ]
    return ImageSource("digits", [str(digit) for digit in range(10)], images, fingerprint="scikit-learn digits")


def _encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def open_class_folders(folder: Path) -> ImageSource:
    """Every image below FOLDER/CLASS/ belongs to CLASS; hidden and other files are ignored and counted."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. `dataset.source` is `digits` or a folder with one folder of images a class."
        )
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(class_folders) < 2:
        raise DataError(f"{folder}: holds {len(class_folders)} class folders; at least 2 are needed.")
    if all(path.name.lower() in SPLIT_FOLDERS for path in class_folders):
        raise DataError(
            f"{folder}: its folders ({', '.join(path.name for path in class_folders)}) look like splits, not classes. "
            "Give a folder whose folders are the classes; Shardline splits it."
        )
    images: list[LabelledImage] = []
    facts: list[tuple[str, int, int]] = []
    num_ignored = sum(path.is_file() for path in folder.iterdir())
    for label, class_folder in enumerate(class_folders):
        for path in sorted(path for path in class_folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            # Tools keep copies in hidden folders; one half of a pair in train and the other in test would flatter the accuracy.
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if hidden or path.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
                num_ignored += 1
                continue
            status = path.stat()
            images.append(LabelledImage(name, label, path.read_bytes))
            facts.append((name, status.st_size, status.st_mtime_ns))
    names = [path.name for path in class_folders]
    return ImageSource("folder", names, images, digest_of(facts), num_ignored)
