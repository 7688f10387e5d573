"""torchvision's classification data sets by name: `torchvision:CIFAR10`, or `torchvision:CIFAR10:FOLDER` to say where they lie.

Where an image is a file its bytes are taken as they are; where it is an array it becomes a PNG, which loses nothing.
"""

import contextlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.sources import ImageSource, ListedImage, encode_png
from pipeline.errors import DataError, nearest

DEFAULT_ROOT = Path("data/torchvision")


class TorchvisionImages(ImageSource):
    """The images of a data set of torchvision, with its own splits. Raises DataError."""

    def __init__(self, source: str) -> None:
        _, name, *rest = source.split(":", 2)
        self.kind = f"torchvision:{name}"
        self.root = Path(rest[0]).expanduser() if rest else DEFAULT_ROOT
        self.parts = {split: self._open(name, options) for split, options in _splits_of(_class_of(name))}
        first = next(iter(self.parts.values()))
        self.class_names = [_class_name(item) for item in getattr(first, "classes", [])] or self._numbered()

    def _numbered(self) -> list[str]:
        labels = {int(label) for part in self.parts.values() for label in _labels_of(part, self.kind)}
        return [str(label) for label in range(max(labels) + 1)]

    def _open(self, name: str, options: dict[str, Any]) -> Any:
        kind = _class_of(name)
        wanted = inspect.signature(kind).parameters
        with contextlib.redirect_stdout(io.StringIO()):
            for download in (False, True):
                extra = {"download": download} if "download" in wanted else {}
                try:
                    root = {"root": self.root} if "root" in wanted else {}
                    return kind(**root, **options, **extra)
                except Exception as error:  # each data set has its own way of saying that files are missing
                    if download or "download" not in wanted:
                        raise DataError(
                            f"torchvision:{name} is not in {self.root} and cannot be downloaded "
                            f"({' '.join(str(error).split())[:160]}). Put its files there, as torchvision lays them out."
                        ) from error
        raise AssertionError

    def images(self) -> Iterator[ListedImage]:
        """List the images of each split in torchvision's order."""
        for split, part in self.parts.items():
            for number, label in enumerate(_labels_of(part, self.kind)):
                yield ListedImage(f"{split or 'image'}-{number:08d}", (int(label),), split, (number, 0))

    def read(self, name: str) -> bytes:
        """The file's bytes, or the pixels as a PNG."""
        split, _, number = name.rpartition("-")
        part = self.parts[None if split == "image" else split]
        path = _path_of(part, int(number))
        if path is not None:
            return path.read_bytes()
        image = part[int(number)][0]
        if not isinstance(image, Image.Image):
            raise DataError(f"{self.kind} gives {type(image).__name__} instead of images")
        return encode_png(image)


def _class_of(name: str) -> Any:
    from torchvision import datasets

    if name not in datasets.__all__ or not inspect.isclass(getattr(datasets, name)):
        raise DataError(f"torchvision has no data set '{name}'.{nearest(name, datasets.__all__)}")
    return getattr(datasets, name)


def _splits_of(kind: Any) -> list[tuple[str | None, dict[str, Any]]]:
    """The splits that a data set has, with the arguments that choose them."""
    wanted = inspect.signature(kind).parameters
    if "train" in wanted:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" in wanted:
        known = getattr(kind, "_SPLITS", None) or getattr(kind, "_split_to_folder", None) or ("train", "val", "test")
        names = [name for name in ("train", "val", "test") if name in known]
        return [(name, {"split": name}) for name in names or ["train", "test"]]
    return [(None, {})]


def _labels_of(part: Any, kind: str) -> Any:
    for name in ("targets", "labels", "_labels"):
        labels = getattr(part, name, None)
        if labels is not None:
            break
    else:
        labels = (part[number][1] for number in range(len(part)))
    for label in labels:
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise DataError(f"{kind} has no single class for each image, so it cannot be sharded.")
        yield label.__index__()


def _path_of(part: Any, number: int) -> Path | None:
    """The file of an image, in the two ways in which torchvision's data sets keep it."""
    samples = getattr(part, "samples", None) or getattr(part, "_samples", None)
    if samples is not None:
        return Path(samples[number][0])
    files = getattr(part, "_image_files", None)
    return Path(files[number]) if files is not None else None


def _class_name(item: Any) -> str:
    return ", ".join(item) if isinstance(item, tuple) else str(item)
