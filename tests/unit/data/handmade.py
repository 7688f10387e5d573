"""Data sets of shards made by hand: every sample, label and split where a test wants it."""

import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import sha256_of
from pipeline.manifest import INDEX_ROW, DatasetManifest, ImageStats, IndexEntry, ShardEntry, SplitEntry

PLAIN_STATS = ImageStats("train", [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])


@dataclass(frozen=True)
class Sample:
    """A sample: its key, its encoded image, and its class or, in a set of several labels, its classes."""

    key: str
    encoded: bytes
    label: int | tuple[int, ...]


def make_dataset(
    folder: Path, splits: dict[str, list[Sample]], class_names: list[str], samples_per_shard: int = 4, **manifest: Any
) -> DatasetManifest:
    """Write shards, indexes and dataset.json; several labels where the first sample has a tuple."""
    folder.mkdir(parents=True)
    multi = any(isinstance(sample.label, tuple) for samples in splits.values() for sample in samples)
    values: dict[str, Any] = {
        "task": "multi" if multi else "single",
        "image_stats": PLAIN_STATS,
        "preparation": {},
        "info": {"source": "handmade", "num_ignored": 0},
    }
    entries = {name: _write_split(folder, name, samples, class_names, samples_per_shard) for name, samples in splits.items()}
    return DatasetManifest(class_names=class_names, splits=entries, digest="", folder=folder, **values | manifest).save()


def _write_split(folder: Path, name: str, samples: list[Sample], class_names: list[str], samples_per_shard: int) -> SplitEntry:
    shards: list[ShardEntry] = []
    rows: list[tuple[int, int, int, int]] = []
    for first in range(0, len(samples), samples_per_shard):
        path = folder / f"{name}-{len(shards):06d}.tar"
        part = samples[first : first + samples_per_shard]
        rows += [(len(shards), offset, size, label) for offset, size, label in _write_shard(path, part)]
        shards.append(ShardEntry(path.name, len(part), path.stat().st_size, sha256_of(path)))
    table = np.array(rows, INDEX_ROW)
    np.save(folder / f"{name}.index.npy", table)
    index = IndexEntry(f"{name}.index.npy", sha256_of(folder / f"{name}.index.npy"))
    labels = np.zeros((len(samples), len(class_names)), np.uint8)  # (N, K)
    for row, sample in zip(labels, samples, strict=True):
        row[list(sample.label) if isinstance(sample.label, tuple) else [sample.label]] = 1
    entry = None
    if any(isinstance(sample.label, tuple) for sample in samples):
        np.save(folder / f"{name}.labels.npy", labels)
        entry = IndexEntry(f"{name}.labels.npy", sha256_of(folder / f"{name}.labels.npy"))
    return SplitEntry(shards, index, labels.sum(axis=0, dtype=int).tolist(), entry)


def _write_shard(path: Path, samples: list[Sample]) -> list[tuple[int, int, int]]:
    places = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            label = sample.label if isinstance(sample.label, int) else (sample.label or (-1,))[0]
            for name, content in ((f"{sample.key}.jpg", sample.encoded), (f"{sample.key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
                if name.endswith(".jpg"):
                    places.append((tar.offset - -(-len(content) // 512) * 512, len(content), label))
    return places
