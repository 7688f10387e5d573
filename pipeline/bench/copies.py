"""The same images in the forms that only one contender reads; each is made once, and there whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL_SIDE = 256  # pixels of the longest side in the usual smaller set
QUALITY = 88  # the middle of the files' own, for what encodes them anew


def write_litdata(folder: Path, target: Path) -> None:
    """The JPEGs of FOLDER byte for byte, in litData's chunks."""
    from litdata import optimize

    def write(part: str) -> None:
        optimize(fn=_bytes_of, inputs=_paths(folder), output_dir=part, chunk_bytes="64MB", num_workers=1)

    _once(target, write)


def write_mds(folder: Path, target: Path) -> None:
    """The JPEGs of FOLDER byte for byte, in MosaicML Streaming's shards."""
    from streaming import MDSWriter

    def write(part: str) -> None:
        with MDSWriter(out=part, columns={"image": "bytes"}) as writer:
            for path in _paths(folder):
                writer.write({"image": Path(path).read_bytes()})

    _once(target, write)


def write_beton(folder: Path, target: Path, **options: Any) -> None:
    """The images of FOLDER in FFCV's own file; it takes no JPEG as it is, but encodes the pixels by `options`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(**options), "label": IntField()}
    _once(target, lambda part: DatasetWriter(part, fields, num_workers=1).from_indexed_dataset(ImageFolder(str(folder))))


def mark(folder: Path, target: Path) -> Path:
    """The JPEGs of FOLDER with a restart marker every 4 MCUs, in the same class folders at `target`."""
    from pipeline.data.native import with_restarts

    def write(part: str) -> None:
        for path in _paths(folder):
            marked = Path(part) / Path(path).relative_to(folder)
            marked.parent.mkdir(parents=True, exist_ok=True)
            marked.write_bytes(with_restarts(Path(path).read_bytes(), 4))

    _once(target, write)
    return target


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def _once(target: Path, write: Callable[[str], object]) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write(str(part))
    part.replace(target)


def _paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.jpg"))


def _bytes_of(path: str) -> bytes:
    return Path(path).read_bytes()
