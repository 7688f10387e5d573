"""The order of samples: a pure function of (shard sizes, seed, epoch), and the slice of it that each rank takes.

It knows no rank, worker, start method or restart, and that is what makes training exact, resumable and replayable. numpy
keeps its bit generators stable across versions but not its `shuffle`, so the order is a sort by Philox keys.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from pipeline.errors import ConfigError

Positions = npt.NDArray[np.int64]


class SampleRef(NamedTuple):
    """What a sampler sends to a loader process. It carries the epoch, so that no persistent worker holds a stale one."""

    sample_index: int
    epoch: int
    weight: float  # 0 for a row that only pads the batch


def mix(*numbers: int) -> int:
    """Hash integers to 63 bits, the same on every machine: the one source of randomness."""
    digest = hashlib.blake2b(np.asarray(numbers, "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _hashed_keys(count: int, *seeds: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=mix(*seeds)).random_raw(count)


def epoch_order(shard_sizes: list[int], seed: int, epoch: int, window: int) -> Positions:
    """Return every sample index once, (N,): shards shuffled, then samples within windows of `window` shards.

    Reading stays near-sequential within a window. 1.28 M samples in 1,024 shards take about 50 ms, so nothing is stored.
    """
    first = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = np.argsort(_hashed_keys(len(shard_sizes), seed, epoch, 0), kind="stable")
    parts = []
    for number, start in enumerate(range(0, len(shards), window)):
        members = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards[start : start + window]])
        keys = _hashed_keys(len(members), seed, epoch, 1, number)
        parts.append(members[np.argsort(keys, kind="stable")])
    return np.concatenate(parts)


def local_batch_size(global_batch_size: int, world_size: int) -> int:
    """Samples of a global batch on one rank. Raises ConfigError when the ranks cannot share it equally."""
    if global_batch_size % world_size:
        below = global_batch_size - global_batch_size % world_size
        choices = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise ConfigError(
            f"`data.global_batch_size` is {global_batch_size}, which {world_size} processes cannot share equally. "
            f"Set it to {choices}, or start another number of processes."
        )
    return global_batch_size // world_size


def steps_per_epoch(num_samples: int, global_batch_size: int, *, drop_last: bool) -> int:
    """Global batches in an epoch: whole ones only, or also a last one that is padded."""
    whole, rest = divmod(num_samples, global_batch_size)
    return whole if drop_last or not rest else whole + 1


class GlobalBatchSampler(Sampler[list[SampleRef]]):
    """Yields this rank's slice of every global batch of an epoch, from global batch `start` on.

    Global batch k is order[k*G : (k+1)*G]. Without `drop_last` the last one is padded to G with samples of weight 0, and its
    real samples weigh G / (number of them), so that the mean over G is the mean over the real ones.
    """

    def __init__(
        self,
        shard_sizes: list[int],
        global_batch_size: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        window: int,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        self.shard_sizes = shard_sizes
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size(global_batch_size, world_size)
        self.seed, self.rank, self.window = seed, rank, window
        self.shuffle, self.drop_last = shuffle, drop_last
        self.num_samples = sum(shard_sizes)
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Lightning calls set_epoch on `batch_sampler.sampler`; without this every epoch would have one order."""
        return self

    def __len__(self) -> int:
        return steps_per_epoch(self.num_samples, self.global_batch_size, drop_last=self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[SampleRef]]:
        start, self.start = self.start, 0
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = epoch_order(self.shard_sizes, self.seed, self.epoch, self.window)
        for number in range(start, len(self)):
            yield self._local_batch(order, number)

    def _local_batch(self, order: Positions, number: int) -> list[SampleRef]:
        size = self.global_batch_size
        members = order[number * size : (number + 1) * size]
        num_real = len(members)
        weight = size / num_real if self.shuffle else 1.0
        first = self.rank * self.local_batch_size
        return [
            SampleRef(int(members[place % num_real]), self.epoch, weight if place < num_real else 0.0)
            for place in range(first, first + self.local_batch_size)
        ]
