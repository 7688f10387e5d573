"""Writes a data set of shards: split, order and bytes depend on the images and the seed alone.

Everything is written into DATASET/.partial and renamed at the end, dataset.json last, so that no crash, full disk or bad image
leaves anything half-written under a final name.
"""

import datetime
import hashlib
import io
import math
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

import pipeline
from pipeline.config import DatasetConfig
from pipeline.console import say, track
from pipeline.data.sources import ImageSource, LabelledImage, open_source
from pipeline.errors import DataError, explain_os_error
from pipeline.files import fsync_file, fsync_folder, move_aside, sha256_of
from pipeline.manifest import (
    INDEX_ROW,
    MANIFEST_NAME,
    DatasetManifest,
    ImageStats,
    IndexEntry,
    ShardEntry,
    SplitEntry,
    load_dataset,
    read_shard_rows,
)
from pipeline.preprocess import WHITE, open_image

PARTIAL = ".partial"
OWN_NAMES = re.compile(rf"(train|val|test)(-\d{{6}}\.tar|\.index\.npy)|{re.escape(PARTIAL)}|\.{MANIFEST_NAME}\.tmp")
BAD_IMAGES_NAMED = 3


@dataclass
class PixelSums:
    """Running sums over the pixels of images, each channel apart, for mean and standard deviation."""

    count: int
    total: npt.NDArray[np.float64]  # (3,)
    squares: npt.NDArray[np.float64]  # (3,)

    @classmethod
    def empty(cls) -> "PixelSums":
        """Sums over no pixel."""
        return cls(0, np.zeros(3), np.zeros(3))

    def add(self, image: Image.Image) -> None:
        """Add every pixel of an RGB image."""
        # Integer sums are exact, so the statistics do not depend on the order of images.
        pixels = np.asarray(image, dtype=np.int64).reshape(-1, 3)
        self.count += len(pixels)
        self.total += pixels.sum(axis=0)
        self.squares += (pixels * pixels).sum(axis=0)

    def stats(self, split: str) -> ImageStats:
        """Mean and standard deviation of pixels scaled to 0..1; a constant channel gets 1/255 to divide by."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean * mean, 1.0))
        return ImageStats(split, [round(float(m), 6) for m in mean / 255], [round(float(s), 6) for s in std / 255])


def preparation_of(config: DatasetConfig, kind: str) -> dict[str, object]:
    """What decides the shards besides the images: part of the data set's digest."""
    return {
        "source": kind,
        "seed": config.split_seed,
        "fractions": {"val": config.val_fraction, "test": config.test_fraction},
        "samples_per_shard": config.samples_per_shard,
        "jpeg_quality": config.jpeg_quality,
    }


def prepare_dataset(config: DatasetConfig, folder: Path, *, fresh: bool = False) -> tuple[DatasetManifest, bool]:
    """Return the data set of this configuration in `folder`, and whether it had to be written.

    One that was made otherwise, or any when `fresh`, is moved aside. Raises DataError for a damaged one, and when something
    else than a data set lies there. The caller holds the folder's lock.
    """
    source = open_source(config.source)
    if (folder / MANIFEST_NAME).is_file():
        if not fresh:
            manifest = load_dataset(folder)
            wanted = (preparation_of(config, source.kind), source.fingerprint)
            if (manifest.preparation, manifest.info["source_fingerprint"]) == wanted:
                return manifest, False
        say(f"{folder}: {'--fresh was given' if fresh else 'the images or the settings of `dataset` changed'}")
    elif folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if not OWN_NAMES.fullmatch(path.name))
        if foreign:
            raise DataError(f"{folder}: is not a data set but holds {foreign[0]}. Choose another --dataset.path.")
    return write_dataset(source, config, folder), True


def split_images(source: ImageSource, config: DatasetConfig) -> dict[str, list[LabelledImage]]:
    """Share each class between the splits in proportion, by a hash of (seed, name): stable when images are added.

    Each split comes in the order of another hash, which is the order inside its shards. Raises DataError for a class that is
    too small for its share in every split.
    """
    splits: dict[str, list[LabelledImage]] = {"train": [], "val": [], "test": []}
    for label, class_name in enumerate(source.class_names):
        members = [image for image in source.images if image.label == label]
        members.sort(key=lambda image: _hash(config.split_seed, "split", image.name))
        num_test = _share(len(members), config.test_fraction)
        num_val = _share(len(members), config.val_fraction)
        if len(members) - num_test - num_val < 1:
            raise DataError(
                f"class `{class_name}` has {len(members)} images, too few for a share in every split. "
                "Add images, remove the class, or lower `dataset.val_fraction` and `dataset.test_fraction`."
            )
        splits["test"] += members[:num_test]
        splits["val"] += members[num_test : num_test + num_val]
        splits["train"] += members[num_test + num_val :]
    for images in splits.values():
        images.sort(key=lambda image: _hash(config.split_seed, "order", image.name))
    return {name: images for name, images in splits.items() if images}


def _share(number: int, fraction: float) -> int:
    # 25 * 0.28 is 7.000000000000001, which is meant to be 7.
    return math.ceil(round(number * fraction, 9))


def _hash(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode(errors="surrogateescape")).digest()


def write_dataset(source: ImageSource, config: DatasetConfig, folder: Path) -> DatasetManifest:
    """Write all splits of `source` into `folder` and return the manifest. Raises DataError naming undecodable images."""
    splits = split_images(source, config)
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = SplitWriter(partial, config, num_images=len(source.images))
        images = track(writer.write(splits, len(source.class_names)), "shard", len(source.images))
        for _ in images:
            pass
        if writer.bad_images:
            raise DataError(_describe_bad(writer.bad_images))
        manifest = DatasetManifest(
            task="single",
            class_names=source.class_names,
            splits=writer.entries,
            image_stats=writer.sums.stats("train"),
            preparation=preparation_of(config, source.kind),
            info={
                "source": config.source,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "source_fingerprint": source.fingerprint,
                "num_ignored": source.num_ignored,
                "tool_version": pipeline.__version__,
            },
            digest="",
            folder=partial,
        ).save()
        _publish(partial, folder)
        return replace(manifest, folder=folder)
    except OSError as error:
        raise explain_os_error(error, doing=str(folder)) or error from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Give a complete data set in FOLDER/.partial its place; the one that is there is kept under another name."""
    if (folder / MANIFEST_NAME).is_file():
        aside = move_aside(folder)
        say(f"the earlier data set is kept as {aside}")
        (aside / PARTIAL).rename(folder)
        fsync_folder(folder.parent)
        return
    for leftover in folder.iterdir():  # of a process that was killed between the lines below
        if leftover != partial:
            leftover.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        path.rename(folder / path.name)
    fsync_folder(folder)


def _describe_bad(bad_images: list[str]) -> str:
    named = "; ".join(bad_images[:BAD_IMAGES_NAMED])
    more = len(bad_images) - BAD_IMAGES_NAMED
    rest = f"; and {more} more" if more > 0 else ""
    number = "1 image" if len(bad_images) == 1 else f"{len(bad_images)} images"
    return f"{number} cannot be decoded: {named}{rest}. Replace or remove and run again; nothing was written."


class SplitWriter:
    """Writes splits one shard at a time and gathers what the manifest says of them."""

    def __init__(self, folder: Path, config: DatasetConfig, num_images: int) -> None:
        self.folder, self.config, self.num_images = folder, config, num_images
        self.entries: dict[str, SplitEntry] = {}
        self.bad_images: list[str] = []
        self.sums = PixelSums.empty()

    def write(self, splits: dict[str, list[LabelledImage]], num_classes: int) -> Iterator[LabelledImage]:
        """Write every split, yielding each image once it is packed."""
        for split, images in splits.items():
            shards: list[ShardEntry] = []
            rows: list[tuple[int, int, int, int]] = []
            for first in range(0, len(images), self.config.samples_per_shard):
                path = self.folder / f"{split}-{len(shards):06d}.tar"
                yield from self._write_shard(path, split, images[first : first + self.config.samples_per_shard], first)
                if self.bad_images:
                    continue  # the data set will be refused; go on only to name every bad image
                found = list(read_shard_rows(path))
                rows += [(len(shards), offset, size, label) for _, offset, size, label in found]
                shards.append(ShardEntry(path.name, len(found), path.stat().st_size, sha256_of(path)))
            table = np.array(rows, dtype=INDEX_ROW)
            index_path = self.folder / f"{split}.index.npy"
            np.save(index_path, table)
            fsync_file(index_path)
            counts = np.bincount(table["label"], minlength=num_classes).tolist()
            self.entries[split] = SplitEntry(shards, IndexEntry(index_path.name, sha256_of(index_path)), counts)

    def _write_shard(self, path: Path, split: str, images: list[LabelledImage], first: int) -> Iterator[LabelledImage]:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, image in enumerate(images, start=first):
                try:
                    encoded = self._encode(image, split)
                except DataError as error:
                    self.bad_images.append(f"{image.name} ({error})")
                else:
                    key = f"{number:08d}-{_key_part(image.name)}"
                    _add_member(tar, f"{key}.jpg", encoded)
                    _add_member(tar, f"{key}.cls", str(image.label).encode())
                yield image
        fsync_file(path)

    def _encode(self, image: LabelledImage, split: str) -> bytes:
        """Decode fully, then keep a JPEG's bytes and encode anything else as JPEG."""
        encoded = image.read()
        decoded = open_image(encoded, WHITE)
        if not encoded.startswith(b"\xff\xd8"):
            buffer = io.BytesIO()
            # Grey stays grey: one channel, and no colour to subsample.
            grey = Image.open(io.BytesIO(encoded)).mode in ("L", "1")
            to_save = decoded.convert("L") if grey else decoded
            to_save.save(buffer, "JPEG", quality=self.config.jpeg_quality, subsampling=0)
            encoded = buffer.getvalue()
            decoded = open_image(encoded, WHITE)
        if split == "train":
            self.sums.add(decoded)
        return encoded


def _key_part(name: str) -> str:
    """The file's own name in letters that no WebDataset reader trips over, so that a sample can be traced back."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime 0 and no owner: the same bytes on every machine
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
