"""Every sample of a data set by one number, its place: the splits follow each other in the order of the manifest.

For verbs that look at a whole data set. Nothing here needs torch: training reads through `pipeline.data.dataset` instead.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.data.cache import ShardFetcher, fetcher_for, open_fetched
from pipeline.data.shards import read_key
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest, Index, open_index, open_labels, require_labels
from pipeline.preprocess import WHITE

Places = npt.NDArray[np.int64]
LABEL_ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Samples:
    """All samples of a data set by place: where their bytes are and what they are called."""

    manifest: DatasetManifest
    indexes: dict[str, Index]
    first: dict[str, int]  # place of each split's first sample
    fetchers: dict[str, ShardFetcher | None]  # what brings shards that are not here

    @classmethod
    def open(cls, manifest: DatasetManifest, config: DataConfig) -> "Samples":
        """Open the index of every split. Raises DataError for one that does not fit, or a label outside of the classes."""
        indexes, first, total = {}, {}, 0
        fetchers = {split: fetcher_for(manifest, split, config) for split in manifest.splits}
        for split in manifest.splits:
            if manifest.task != "multi":
                require_labels(manifest, split)
            indexes[split] = open_index(manifest, split)
            first[split], total = total, total + len(indexes[split])
        if not total:
            raise DataError(f"{manifest.folder}: holds no sample that could be looked at.")
        return cls(manifest, indexes, first, fetchers)

    def __len__(self) -> int:
        return sum(map(len, self.indexes.values()))

    def places(self, split: str) -> slice:
        """The places of a split."""
        return slice(self.first[split], self.first[split] + len(self.indexes[split]))

    def split_of(self, place: int) -> str:
        """The split that holds a place."""
        return [split for split, first in self.first.items() if first <= place and len(self.indexes[split])][-1]

    def split_numbers(self, places: Places) -> npt.NDArray[np.int64]:
        """The number of the split of each place, in the order of the manifest."""
        ends = np.cumsum([len(index) for index in self.indexes.values()])
        return np.searchsorted(ends, places, side="right")

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour below transparent pixels with which the data set was made."""
        red, green, blue = self.manifest.preparation.get("background", WHITE)
        return red, green, blue

    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each image file, (N,)."""
        return np.concatenate([index["size"].astype(np.int64) for index in self.indexes.values()])

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (place, encoded image) of ascending places, each shard opened once. Raises DataError for one cut short."""
        for place, shard, offset, size in self._located(places):
            yield place, shard.read(offset, size)

    def keys(self, places: Iterable[int]) -> dict[int, str]:
        """The WebDataset key of each place, from the tar header before its image."""
        found = {}
        for place, shard, offset, _ in self._located(sorted(set(places))):
            found[place] = read_key(shard.read, offset)
        return found

    def _located(self, places: Iterable[int]) -> Iterator[tuple[int, "_OpenShard", int, int]]:
        opened: _OpenShard | None = None
        try:
            for place in places:
                split = self.split_of(place)
                row = self.indexes[split][place - self.first[split]]
                number = int(row["shard"])
                if opened is None or opened.which != (split, number):
                    if opened is not None:
                        opened.close()
                        opened = None
                    opened = self._open(split, number)
                yield place, opened, int(row["offset"]), int(row["size"])
        finally:
            if opened is not None:
                opened.close()

    def _open(self, split: str, number: int) -> "_OpenShard":
        fetcher, path = self.fetchers[split], self.manifest.folder / self.manifest.splits[split].shards[number].name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fetcher is None else open_fetched(fetcher, number)
        except FileNotFoundError as error:
            raise DataError(f"{path}: shard is missing. Copy it again or rebuild with `shardline shard --fresh`.") from error
        return _OpenShard((split, number), path, descriptor)


class _OpenShard:
    def __init__(self, which: tuple[str, int], path: Path, descriptor: int) -> None:
        self.which, self.path, self._descriptor = which, path, descriptor

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise DataError(
                f"{self.path}: ends before byte {offset + size}. It was cut short: "
                "copy it again or rebuild it with `shardline shard --fresh`."
            )
        return content

    def close(self) -> None:
        os.close(self._descriptor)


class Labels:
    """The labels of all samples by place, one or several each."""

    def __init__(self, samples: Samples) -> None:
        manifest = samples.manifest
        self.samples, self.class_names = samples, manifest.class_names
        self._single = np.concatenate([index["label"].astype(np.int64) for index in samples.indexes.values()])
        self._rows = {split: open_labels(manifest, split) for split in manifest.splits} if manifest.task == "multi" else {}

    def of(self, place: int) -> list[int]:
        """The class numbers of a sample."""
        if not self._rows:
            return [int(self._single[place])]
        split = self.samples.split_of(place)
        return [int(number) for number in np.flatnonzero(self._rows[split][place - self.samples.first[split]])]

    def text(self, place: int) -> str:
        """The class names of a sample."""
        return ", ".join(self.class_names[number] for number in self.of(place)) or "no label"

    def with_class(self, number: int, split: str) -> Places:
        """The places of a split whose samples have this class."""
        places = self.samples.places(split)
        found = self._rows[split][:, number] > 0 if self._rows else self._single[places] == number
        return np.asarray(np.flatnonzero(found) + places.start)

    def counts(self, split: str) -> list[int]:
        """Samples of each class."""
        if self._rows:
            return [int(count) for count in self._rows[split].sum(axis=0, dtype=np.int64)]
        return [int(n) for n in np.bincount(self._single[self.samples.places(split)], minlength=len(self.class_names))]

    def num_unlabelled(self, split: str) -> int:
        """Samples without any class, which only a set of several labels may have."""
        return int((~self._rows[split].any(axis=1)).sum()) if self._rows else 0

    def signatures(self) -> npt.NDArray[np.int64]:
        """A number for the labels of each sample, (N,): equal where the labels are equal."""
        if not self._rows:
            return self._single
        factors = np.random.default_rng(0).integers(-(2**62), 2**62, len(self.class_names))
        return np.concatenate([_weighted_sums(rows, factors) for rows in self._rows.values()])


def _weighted_sums(rows: npt.NDArray[np.uint8], factors: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # In pieces: as 64-bit numbers all rows at once would take eight times the file.
    sums = np.zeros(len(rows), np.int64)
    for first in range(0, len(rows), LABEL_ROWS_AT_A_TIME):
        piece = slice(first, first + LABEL_ROWS_AT_A_TIME)
        sums[piece] = rows[piece].astype(np.int64) @ factors
    return sums
