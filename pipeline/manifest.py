"""dataset.json and the index files beside it: what a data set of shards holds, and whether it still does.

The manifest is written last, so a data set that has one is complete. Opening looks at sizes and labels but never hashes big
files; `shardline verify` does.
"""

import dataclasses
import hashlib
import json
import math
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.files import digest_of, locked, write_bytes, write_json
from pipeline.remote import fetch, is_url, join, read_all

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
Task = Literal["single", "binary", "multi"]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff")
# One row a sample, read by mmap: 20 bytes, 25 MB for ImageNet.
INDEX_ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
Index = npt.NDArray[np.void]
ROWS_AT_A_TIME = 1 << 20
# Other ranks wait while one of them brings the index of a remote data set.
MIRROR_WAIT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar file of a split. `name` is relative to the data set, or a URL.

    A training epoch draws `weight` times the shard's samples: 1 is each exactly once, 0.5 every second one, 2 each twice.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    weight: float = 1.0


@dataclass(frozen=True)
class IndexEntry:
    """The index file, or the file of label rows, of a split."""

    name: str
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """The shards, index and class counts of one split; with several labels an image, also the file of label rows."""

    shards: list[ShardEntry]
    index: IndexEntry
    class_counts: list[int]
    labels: IndexEntry | None = None  # uint8 (N, K), one column a class

    @property
    def num_samples(self) -> int:
        """Samples in all shards of the split."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that a training epoch draws: those of the shards of each weight, times that weight."""
        totals: Counter[float] = Counter()
        for shard in self.shards:
            totals[shard.weight] += shard.num_samples
        return sum(num_drawn(weight, total) for weight, total in totals.items())


def num_drawn(weight: float, num_samples: int) -> int:
    """Samples that an epoch draws from `num_samples` of this weight: to the nearest whole number, halves up."""
    return math.floor(weight * num_samples + 0.5)


@dataclass(frozen=True)
class ImageStats:
    """Mean and standard deviation of each RGB channel, pixels scaled to 0..1, over `split`."""

    split: str
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class DatasetManifest:
    """dataset.json. `digest` covers everything except itself and `info`.

    `streams` names the shards of splits that cannot be indexed, by URL. `folder` and `url` say where it was read from.
    """

    task: Task
    class_names: list[str]
    splits: dict[str, SplitEntry]
    image_stats: ImageStats
    preparation: dict[str, Any]
    info: dict[str, Any]
    digest: str
    format_version: int = FORMAT_VERSION
    streams: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    url: str = ""

    def split(self, name: str) -> SplitEntry:
        """Return the entry of a split. Raises DataError when the data set has none of that name."""
        if name not in self.splits:
            raise DataError(f"{self.folder}: has no `{name}` split (it has {', '.join(self.splits)}).")
        return self.splits[name]

    @property
    def evaluation_split(self) -> str:
        """The split that final figures are taken on: test, or val where there is no test."""
        return "test" if "test" in self.splits else "val"

    def content(self) -> dict[str, Any]:
        """What the digest covers."""
        values = self._values()
        if self.preparation.get("source") == "merge":  # whose shards lie elsewhere, by another way from each folder
            for split in values["splits"].values():
                for shard in split["shards"]:
                    shard["name"] = shard["name"].rsplit("/", 1)[-1]
        return {key: value for key, value in values.items() if key not in ("digest", "info")}

    def _values(self) -> dict[str, Any]:
        """What dataset.json holds; entries that say nothing are left out."""
        values = dataclasses.asdict(self)
        del values["folder"], values["url"]
        if not self.streams:
            del values["streams"]
        for split in values["splits"].values():
            if split["labels"] is None:
                del split["labels"]
            for shard in split["shards"]:
                if shard["weight"] == 1.0:
                    del shard["weight"]
        return values

    def save(self) -> "DatasetManifest":
        """Write dataset.json into `folder` with the digest of its content; return the manifest as written."""
        manifest = dataclasses.replace(self, digest=digest_of(self.content()))
        write_json(self.folder / MANIFEST_NAME, manifest._values())
        return manifest


def load_dataset(location: Path | str, cache_folder: Path | None = None) -> DatasetManifest:
    """Read a data set's manifest and see that its files are there in full size. Raises DataError.

    Of a data set at a URL, manifest and index are brought into `cache_folder`, where `folder` then points; its shards stay.
    """
    if isinstance(location, str) and location.startswith("file://"):
        location = Path(urllib.parse.unquote(location.removeprefix("file://")))
    if isinstance(location, str) and is_url(location):
        assert cache_folder is not None
        return _load_remote(location, cache_folder / "datasets")
    manifest = read_manifest(Path(location))
    _require_files(manifest)
    return manifest


def _load_remote(url: str, mirrors: Path) -> DatasetManifest:
    content = read_all(join(url, MANIFEST_NAME))
    # A data set that changed gets another mirror, so that old and new never mix.
    mirror = mirrors / hashlib.sha256(url.encode() + content).hexdigest()[:32]
    with locked(mirror, wait_seconds=MIRROR_WAIT_SECONDS):
        if not (mirror / MANIFEST_NAME).is_file():
            write_bytes(mirror / MANIFEST_NAME, content)
        manifest = dataclasses.replace(read_manifest(mirror), url=url)
        for split in manifest.splits.values():
            for entry in (split.index, split.labels):
                if entry is not None:
                    fetch(join(url, entry.name), mirror / entry.name, entry.sha256)
    return manifest


def read_manifest(folder: Path) -> DatasetManifest:
    """Read a data set's manifest, whatever became of its files. Raises DataError."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder}: no data set there (no {MANIFEST_NAME}). Make it with `shardline shard`.")
    values = read_versioned_json(path)
    try:
        splits = {
            name: SplitEntry(
                shards=[ShardEntry(**shard) for shard in split["shards"]],
                index=IndexEntry(**split["index"]),
                class_counts=split["class_counts"],
                labels=IndexEntry(**split["labels"]) if "labels" in split else None,
            )
            for name, split in values["splits"].items()
        }
        stats = ImageStats(**values["image_stats"])
        manifest = DatasetManifest(**{**values, "splits": splits, "image_stats": stats, "folder": folder})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a data set manifest ({error}). Rebuild it with `shardline shard --fresh`.") from error
    if manifest.digest != digest_of(manifest.content()):
        raise DataError(f"{path}: was edited: its digest does not fit its content. Rebuild it with `shardline shard --fresh`.")
    return manifest


def read_versioned_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that has a format_version; refuse one that a newer Shardline wrote. Raises DataError."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{path}: has no format_version; it was not written by Shardline.")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, which this Shardline reads. Upgrade it."
        )
    return dict(values)


def _require_files(manifest: DatasetManifest) -> None:
    for split in manifest.splits.values():
        for shard in split.shards:
            path = manifest.folder / shard.name
            if is_url(shard.name):
                continue
            if not path.is_file():
                raise DataError(f"{path}: shard is missing. Copy it again or rebuild with `shardline shard --fresh`.")
            if path.stat().st_size != shard.num_bytes:
                raise DataError(
                    f"{path}: holds {path.stat().st_size} bytes but the manifest says {shard.num_bytes}. "
                    "It was probably cut short: copy it again or rebuild with `shardline shard --fresh`."
                )
        if not (manifest.folder / split.index.name).is_file():
            raise DataError(f"{manifest.folder / split.index.name}: index is missing. Rebuild with `shardline shard --fresh`.")


def open_index(manifest: DatasetManifest, split_name: str) -> Index:
    """Map a split's index, one INDEX_ROW a sample, (N,), reading none of it. Raises DataError for wrong rows or count."""
    split = manifest.split(split_name)
    path = manifest.folder / split.index.name
    try:
        rows: Index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not an index ({error}). Rebuild with `shardline shard --fresh`.") from error
    if rows.dtype != INDEX_ROW or rows.shape != (split.num_samples,):
        raise DataError(
            f"{path}: holds {rows.shape} rows of {rows.dtype} but the manifest says {split.num_samples} samples. "
            "Rebuild with `shardline shard --fresh`."
        )
    return rows


def open_labels(manifest: DatasetManifest, split_name: str) -> npt.NDArray[np.uint8]:
    """Map a split's label rows, uint8 (N, K): 1 where sample and class belong together. Raises DataError for another shape."""
    split = manifest.split(split_name)
    if split.labels is None:
        raise DataError(f"{manifest.folder}: `{split_name}` has one label an image and no label rows.")
    path = manifest.folder / split.labels.name
    try:
        labels: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a file of label rows ({error}). Rebuild with `shardline shard --fresh`.") from error
    if labels.dtype != np.uint8 or labels.shape != (split.num_samples, len(manifest.class_names)):
        raise DataError(
            f"{path}: holds {labels.shape} of {labels.dtype}, but the manifest says {split.num_samples} samples "
            f"of {len(manifest.class_names)} classes. Rebuild with `shardline shard --fresh`."
        )
    return labels


def counts_per_epoch(manifest: DatasetManifest) -> tuple[list[float], float]:
    """How often a training epoch shows each class, and how many samples it has, by the weights of the shards."""
    train = manifest.split("train")
    weights = np.array([shard.weight for shard in train.shards])
    if (weights == 1.0).all():
        return [float(count) for count in train.class_counts], float(train.num_samples)
    rows, counts = open_index(manifest, "train"), np.zeros(len(manifest.class_names))
    labels = open_labels(manifest, "train") if manifest.task == "multi" else None
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[first : first + ROWS_AT_A_TIME]
        drawn = weights[part["shard"]]  # (n,)
        if labels is None:
            counts += np.bincount(part["label"], weights=drawn, minlength=len(counts))
        else:
            counts += drawn @ labels[first : first + ROWS_AT_A_TIME]
    return counts.tolist(), float(sum(shard.weight * shard.num_samples for shard in train.shards))


def require_labels(manifest: DatasetManifest, split_name: str) -> None:
    """Read all labels of a split and refuse one outside of the classes. Raises DataError naming the sample."""
    if manifest.task == "multi":
        _require_label_rows(manifest, split_name)
        return
    rows = open_index(manifest, split_name)
    num_classes = len(manifest.class_names)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        labels = rows["label"][first : first + ROWS_AT_A_TIME]
        outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(outside):
            raise DataError(
                f"{manifest.folder / manifest.split(split_name).index.name}: sample {first + outside[0]} has label "
                f"{labels[outside[0]]}, outside the {num_classes} classes (0 to {num_classes - 1}). "
                "Correct its label and rebuild with `shardline shard --fresh`."
            )


def _require_label_rows(manifest: DatasetManifest, split_name: str) -> None:
    labels, entry = open_labels(manifest, split_name), manifest.split(split_name).labels
    for first in range(0, len(labels), ROWS_AT_A_TIME):
        wrong = np.flatnonzero((labels[first : first + ROWS_AT_A_TIME] > 1).any(axis=1))
        if len(wrong):
            assert entry is not None
            raise DataError(
                f"{manifest.folder / entry.name}: the labels of sample {first + wrong[0]} are not 0 and 1. "
                "Rebuild with `shardline shard --fresh`."
            )
