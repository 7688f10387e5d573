"""Map-style access to the samples of sharded tars: an index row, one `pread`, one decode.

No tar is parsed and nothing is unpickled or run: only image bytes are ever read from a shard. The index, and the label rows of
images with several labels, are mapped by each process from the same file, so that loader processes share one copy of them.
"""

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from pipeline.config import DataConfig
from pipeline.data.augment import Augmentation, neutral_colour, plain_image
from pipeline.data.cache import fetcher_for, open_fetched
from pipeline.data.native import DECODED, SAMPLE
from pipeline.data.order import SampleRef, mix
from pipeline.data.shards import read_key
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest, open_index, open_labels
from pipeline.preprocess import PreprocessSpec

# Shards that one thread or process keeps open.
MAX_OPEN = 256


class BadSample(NamedTuple):
    """A sample that cannot be decoded: its row in the batch, and what a person needs to find it."""

    row: int
    shard: str
    key: str
    reason: str


class Batch(TypedDict):
    """A local batch of n samples."""

    image: torch.Tensor  # uint8 (n, 3, H, W), RGB
    label: torch.Tensor  # int64 (n,); of several labels an image uint8 (n, K)
    weight: torch.Tensor  # float32 (n,), 0 for padding and for samples that cannot be decoded
    index: torch.Tensor  # int64 (n,), -1 where shards are streamed
    seed: npt.NDArray[np.uint64]  # (n,), from which the random changes of each image are drawn
    bad: list[BadSample]


class ShardReader:
    """Reads byte ranges of shards. Files are opened lazily in each process, which makes it safe to fork and to pickle."""

    def __init__(self, paths: list[Path], max_open: int = MAX_OPEN, fetch: Callable[[int], Path] | None = None) -> None:
        self.paths = paths
        self.max_open = max_open
        self.fetch = fetch  # brings a shard that is not here yet
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict(), "_process": 0}

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of a shard. Raises DataError when the file ends before."""
        content = os.pread(self.descriptor(shard), size, offset)
        if len(content) != size:
            raise DataError(
                f"{self.paths[shard]}: ends before byte {offset + size}. It was cut short: "
                "copy it again or rebuild it with `shardline shard --fresh`."
            )
        return content

    def descriptor(self, shard: int) -> int:
        """An open file, until `max_open` others have been asked for. Raises DataError where there is none."""
        if self._process != os.getpid():  # after a fork the parent's table is not ours to close
            self._descriptors, self._process = OrderedDict(), os.getpid()
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            if len(self._descriptors) >= self.max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._open(shard)
        self._descriptors[shard] = descriptor
        return descriptor

    def _open(self, shard: int) -> int:
        if self.fetch is not None:
            return open_fetched(self.fetch, shard)
        try:
            return os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DataError(f"{self.paths[shard]}: shard is missing. Rebuild with `shardline shard --fresh`.") from error


class ShardDataset(Dataset[Any]):
    """The samples of one split, in the order of its shards.

    `dataset[i]` is (image uint8 (3, H, W), label, an int or uint8 (K,)); a loader asks for whole batches by `__getitems__`.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        split_name: str,
        spec: PreprocessSpec,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        config: DataConfig | None = None,
    ) -> None:
        self.manifest, self.split_name = manifest, split_name
        self._open()
        self.shards = manifest.split(split_name).shards
        self.fetcher = fetcher_for(manifest, split_name, config or DataConfig())
        paths = [manifest.folder / shard.name for shard in self.shards]
        # An evicted shard takes its room until it is closed.
        max_open = MAX_OPEN if self.fetcher is None else 2 * (config or DataConfig()).shuffle_shards
        self.reader = ShardReader(paths, max_open, self.fetcher)
        self.spec = spec
        self.augmentation = augmentation
        self.seed = seed

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as all of its bytes.
        return {**self.__dict__, "rows": None, "label_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self.rows = open_index(self.manifest, self.split_name)
        self.label_rows = open_labels(self.manifest, self.split_name) if self.manifest.task == "multi" else None

    def with_own_files(self) -> "ShardDataset":
        """The same for another thread, whose open files nobody else closes."""
        twin = copy.copy(self)
        twin.reader = ShardReader(self.reader.paths, self.reader.max_open, self.reader.fetch)
        return twin

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, index: int) -> bytes:
        """The image file of a sample, byte for byte."""
        row = self.rows[index]
        return self.reader.read(int(row["shard"]), int(row["offset"]), int(row["size"]))

    def shard_name(self, index: int) -> str:
        """The shard that holds a sample."""
        return self.shards[int(self.rows[index]["shard"])].name

    def key(self, index: int) -> str:
        """The sample's WebDataset key, read from the tar header before its image."""
        row = self.rows[index]
        shard = int(row["shard"])
        return read_key(lambda offset, size: self.reader.read(shard, offset, size), int(row["offset"]))

    def image(self, index: int, epoch: int = 0) -> torch.Tensor:
        """The decoded, in training augmented, image of a sample: uint8 (3, H, W). Raises DataError."""
        return self._pixels(self.encoded(index), mix(self.seed, epoch, index))

    def _read_crops(
        self, indices: npt.NDArray[np.int64], seeds: npt.NDArray[np.uint64], order: npt.NDArray[np.int64], images: torch.Tensor
    ) -> npt.NDArray[np.int64]:
        """Fill the rows of `images` by the native decoder, and return those that it leaves to the general one."""
        assert self.augmentation is not None and self.augmentation.crops is not None
        samples = np.empty(len(order), SAMPLE)
        samples["row"] = order
        rows = self.rows[indices[order]]
        samples["offset"], samples["size"] = rows["offset"], rows["size"]
        samples["key"] = seeds[order]
        shards, which = np.unique(rows["shard"], return_inverse=True)
        memory = images.permute(0, 2, 3, 1).numpy()
        statuses = np.empty(len(order), np.int32)
        for first in range(0, len(shards), self.reader.max_open):  # no more files than stay open
            files = np.array([self.reader.descriptor(int(shard)) for shard in shards[first : first + self.reader.max_open]])
            part = (which >= first) & (which < first + len(files))
            samples["file"][part] = files[which[part] - first]
            statuses[part] = self.augmentation.crops.read(samples[part], memory)
        left: npt.NDArray[np.int64] = order[statuses != DECODED]
        return left

    def _pixels(self, encoded: bytes, seed: int) -> torch.Tensor:
        if self.augmentation is None:
            return plain_image(encoded, self.spec)
        return self.augmentation.image(encoded, self.spec, seed)

    def labels(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """The labels of samples: int64 (n,), or uint8 (n, K) where an image has several."""
        if self.label_rows is not None:
            return torch.from_numpy(self.label_rows[indices])
        return torch.from_numpy(self.rows["label"][indices].astype(np.int64))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        (label,) = self.labels(np.array([index]))
        return self.image(index), label if label.ndim else int(label)

    @property
    def reads_crops(self) -> bool:
        """Whether a batch is one call of the native decoder, but for what that leaves over."""
        return self.augmentation is not None and self.augmentation.crops is not None

    def __getitems__(self, refs: list[SampleRef], images: torch.Tensor | None = None) -> Batch:
        """A local batch, in `images` where given. One that cannot be decoded is neutral, weighs 0 and is named in `bad`."""
        assert self.spec.fixed_size is not None
        indices = np.array([ref.sample_index for ref in refs])
        drawn = [(ref.epoch, ref.sample_index, ref.draw) if ref.draw else (ref.epoch, ref.sample_index) for ref in refs]
        seeds = np.array([mix(self.seed, *numbers) for numbers in drawn], np.uint64)
        weights = np.array([ref.weight for ref in refs], np.float32)
        if images is None:
            images = new_images(len(refs), self.spec.fixed_size)
        bad = []
        order = np.argsort(indices, kind="stable")  # that of the file
        for place in (self._read_crops(indices, seeds, order, images) if self.reads_crops else order).tolist():
            index = int(indices[place])
            encoded = self.encoded(index)
            try:
                images[place] = self._pixels(encoded, int(seeds[place]))
            except DataError as error:
                images[place] = torch.tensor(neutral_colour(self.spec), dtype=torch.uint8)[:, None, None]
                if weights[place] > 0:
                    bad.append(BadSample(place, self.shard_name(index), self.key(index), str(error)))
                weights[place] = 0
        return {
            "image": images,
            "label": self.labels(indices),
            "weight": torch.from_numpy(weights),
            "index": torch.from_numpy(indices),
            "seed": seeds,
            "bad": sorted(bad),
        }


def decodable(batch: Batch, most: int | None = None) -> Batch:
    """The samples of a batch that could be decoded, or the first `most` of them."""
    good = torch.nonzero(batch["weight"] > 0).flatten()[:most]
    return Batch(
        image=batch["image"][good],
        label=batch["label"][good],
        weight=batch["weight"][good],
        index=batch["index"][good],
        seed=batch["seed"][good.numpy()],
        bad=[],
    )


def new_images(num_samples: int, size: tuple[int, int]) -> torch.Tensor:
    """Room for a batch, uint8 (n, 3, H, W); in a loader process already in the memory that it shares with the rank.

    In memory the channels lie together, as decoders write them: turning each image round would cost a tenth of its decode.
    """
    shape = (num_samples, *size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    # As torch's own collate function does.
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")  # type: ignore[no-untyped-call]
    images = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return images.permute(0, 3, 1, 2)
