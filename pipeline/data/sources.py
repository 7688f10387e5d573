"""Where raw images come from: scikit-learn's handwritten digits, folders, a table, an archive, a torchvision data set.

A source lists small descriptions, lazily, and reads the bytes of one image at a time: memory does not grow with their number.
"""

import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data.class_folders import ClassFolders, Folder, is_image_name
from pipeline.data.labels import require_text
from pipeline.errors import DataError
from pipeline.manifest import Task


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One raw image: a name that is unique in its source, its classes (the first is THE label), and its split if it has one.

    `facts` (size in bytes, time or another number) change when the image does.
    """

    name: str
    labels: tuple[int, ...]
    split: str | None
    facts: tuple[int, int]


class ImageSource(ABC):
    """All images of a source. It can be used in a process forked from the one that opened it."""

    kind: str
    class_names: list[str]
    task: Task = "single"
    num_ignored: int = 0  # files that are no images, or belong to no class; known once all images were listed

    @abstractmethod
    def images(self) -> Iterator[ListedImage]:
        """List every image, in a fixed order."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded bytes of an image. Raises OSError or DataError when it cannot be read."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what the source holds open."""


def open_source(config: DatasetConfig) -> ImageSource:
    """Return the source that the configuration names. Raises DataError."""
    source = _open(config)
    require_text(source.class_names, config.source)
    return source


def _open(config: DatasetConfig) -> ImageSource:
    if config.source == "digits":
        return Digits()
    if config.source.startswith("torchvision:"):
        from pipeline.data.torchvision_source import TorchvisionImages

        return TorchvisionImages(config.source)
    path = Path(config.source).expanduser()
    lower = path.name.lower()
    if path.is_dir():
        return FolderImages(path, config.class_level)
    if lower.endswith((".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")):
        from pipeline.data.tables import TableImages

        return TableImages(path)
    if lower.endswith((".zip", ".tar", ".tgz", ".tbz2", ".txz")) or ".tar." in lower:
        from pipeline.data.archives import open_archive

        return open_archive(path, config.class_level)
    if path.is_file():
        raise DataError(f"{path}: is neither a table (.csv, .jsonl, .parquet) nor an archive (.tar, .zip) of images.")
    raise DataError(
        f"{path}: no such folder. `dataset.source` is `digits`, a folder with one folder of images a class, a table "
        "(.csv, .jsonl, .parquet), an archive (.tar, .zip), or torchvision:NAME."
    )


class Digits(ImageSource):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn (from the UCI repository)."""

    kind = "digits"

    def __init__(self) -> None:
        self.class_names = [str(digit) for digit in range(10)]

    @functools.cached_property
    def _digits(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        from sklearn.datasets import load_digits  # costs 2.4 s

        digits = load_digits()
        return np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8), digits.target  # (1797, 8, 8), (1797,)

    def images(self) -> Iterator[ListedImage]:
        """List the digits in scikit-learn's order."""
        for number, label in enumerate(self._digits[1].tolist()):
            yield ListedImage(f"digit-{number:04d}", (label,), None, (0, 0))

    def read(self, name: str) -> bytes:
        """A digit as a PNG."""
        return encode_png(Image.fromarray(self._digits[0][int(name.removeprefix("digit-"))]))


def facts_of(path: Path) -> tuple[int, int]:
    """Size and time of a file; (0, 0) where there is none, a link that leads nowhere for one: reading it says why."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return 0, 0
    return status.st_size, status.st_mtime_ns


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file of `image`."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class FolderImages(ImageSource):
    """Every image below a folder, by the rules of `pipeline.data.class_folders`; hidden and other files are counted.

    Folders are walked twice: once to see which of them are classes, once to list.
    """

    kind = "folder"

    def __init__(self, folder: Path, class_level: int | None) -> None:
        self.folder = folder
        holding = (parts for parts, names, _ in self._walk() if any(map(is_image_name, names)))
        self.folders = ClassFolders(holding, class_level, str(folder))
        self.class_names = self.folders.class_names

    def images(self) -> Iterator[ListedImage]:
        """List the images folder by folder."""
        self.num_ignored = 0
        for parts, names, num_hidden in self._walk():
            place = self.folders.place(parts)
            chosen = [name for name in names if is_image_name(name)] if place is not None else []
            self.num_ignored += len(names) - len(chosen) + num_hidden
            for name in chosen:
                assert place is not None
                path = "/".join((*parts, name))
                yield ListedImage(path, (place[0],), place[1], facts_of(self.folder / path))

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        # A path object for each of a million images costs as much as the reading.
        with io.FileIO(f"{self.folder}/{name}") as file:
            return file.readall()

    def _walk(self) -> Iterator[tuple[Folder, list[str], int]]:
        """Yield (folder, names of its files, files in hidden folders below it), sorted; a linked folder once a way down."""
        yield from _walk(self.folder, (), frozenset())


def _walk(path: Path, parts: Folder, above: frozenset[tuple[int, int]]) -> Iterator[tuple[Folder, list[str], int]]:
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to a folder that it lies in
        return
    try:
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except PermissionError as error:
        raise DataError(
            f"{path}: the folder cannot be read ({error.strerror}). Change its owner or mode, or leave it out."
        ) from error
    folders = [entry for entry in entries if _is_folder(entry)]
    hidden = [entry for entry in folders if entry.name.startswith(".")]
    num_hidden = sum(sum(len(files) for _, _, files in os.walk(entry.path)) for entry in hidden)
    # A link that leads nowhere counts as a file: an image of that name is rejected by name, and not passed over.
    yield parts, [entry.name for entry in entries if entry not in folders], num_hidden
    for entry in folders:
        if entry not in hidden:
            yield from _walk(path / entry.name, (*parts, entry.name), above | {identity})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
