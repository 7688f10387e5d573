"""The order of samples: a pure function of (shard sizes, seed, epoch), and the slice of it that each rank takes.

It knows no rank, worker, start method or restart, and that is what makes training exact, resumable and replayable. Nothing of
it is stored: a window of shards is sorted when the epoch reaches it. numpy keeps its bit generators stable across versions but
not its `shuffle`, so the order is a sort by Philox keys.
"""

import hashlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from pipeline.config import DataConfig
from pipeline.errors import ConfigError
from pipeline.manifest import DatasetManifest, Index, ShardEntry, num_drawn

Positions = npt.NDArray[np.int64]
# Positions that are interleaved at a time where shards have different weights.
BLOCK = 1 << 16


class SampleRef(NamedTuple):
    """What a sampler sends to a loader process. It carries the epoch, so that no persistent worker holds a stale one."""

    sample_index: int
    epoch: int
    weight: float  # 0 for a row that only pads the batch
    draw: int = 0  # where an epoch has a sample several times: its place in the epoch, from 1; no two look alike


def mix(*numbers: int) -> int:
    """Hash integers to 63 bits, the same on every machine: the one source of randomness."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _hashed_keys(count: int, *seeds: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(key=mix(*seeds)).random_raw(count)


class EpochOrder:
    """The order of one pass over `shard_sizes`: shards shuffled, then samples within windows of `window` shards.

    Any slice can be asked for, at the cost of the windows that it touches: the memory is that of a window, and a pass of 100
    million samples can begin anywhere at once.
    """

    def __init__(self, shard_sizes: npt.NDArray[np.int64], seed: int, epoch: int, window: int) -> None:
        self.seed, self.epoch, self.window = seed, epoch, window
        self.sizes = shard_sizes
        self.first = np.concatenate([[0], np.cumsum(shard_sizes)])  # index of each shard's first sample
        self.shards = np.argsort(_hashed_keys(len(shard_sizes), seed, epoch, 0), kind="stable")
        ends = np.cumsum(shard_sizes[self.shards])[window - 1 :: window]
        self.window_first = np.concatenate([[0], ends, [self.first[-1]]])  # position of each window's first sample
        self._last: tuple[int, Positions] | None = None

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, span: slice) -> Positions:
        """Sample indices at positions start <= position < stop."""
        start, stop, _ = span.indices(len(self))
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number = int(np.searchsorted(self.window_first, start, side="right")) - 1
            first, end = int(self.window_first[number]), int(self.window_first[number + 1])
            parts.append(self._window(number)[start - first : stop - first])
            start = end
        return np.concatenate(parts)

    def _window(self, number: int) -> Positions:
        if self._last is None or self._last[0] != number:
            members = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in self.shards_of(number)])
            keys = _hashed_keys(len(members), self.seed, self.epoch, 1, number)
            self._last = number, members[np.argsort(keys, kind="stable")]
        return self._last[1]

    def shards_of(self, number: int) -> list[int]:
        """The shards of a window."""
        return [int(shard) for shard in self.shards[number * self.window : (number + 1) * self.window]]

    def upcoming_shards(self, position: int) -> Iterator[int]:
        """Every shard still needed from `position` on, in the order of first need."""
        for shard in self.shards[int(np.searchsorted(self.window_first, position, side="right") - 1) * self.window :]:
            yield int(shard)


class WeightedOrder:
    """The order of one epoch over shards of different weights, sliced as an EpochOrder is.

    Shards of one weight w and N samples in all give round(w * N) positions: floor(w) whole passes and the beginning of another.
    These streams are interleaved evenly. With a single weight of 1 it is that one pass.
    """

    def __init__(self, shard_sizes: list[int], weights: list[float], seed: int, epoch: int, window: int) -> None:
        self.streams = []
        sizes, weight_of = np.asarray(shard_sizes, np.int64), np.asarray(weights)
        for weight in sorted(set(weights)):
            shards = np.flatnonzero(weight_of == weight)
            self.streams.append(_Stream(sizes, shards, weight, seed, epoch, window))
        self.lengths = [len(stream) for stream in self.streams]
        self.num_blocks = -(-sum(self.lengths) // BLOCK) or 1
        self._last: tuple[int, Positions] | None = None

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, span: slice) -> Positions:
        """Sample indices at positions start <= position < stop."""
        start, stop, _ = span.indices(len(self))
        if len(self.streams) == 1:
            return self.streams[0].take(start, stop)
        parts = [np.zeros(0, np.int64)]
        number = self._block_at(start)
        while start < stop:
            first, end = sum(self._bounds(number)), sum(self._bounds(number + 1))
            parts.append(self._block(number)[start - first : stop - first])
            start, number = end, number + 1
        return np.concatenate(parts)

    def _bounds(self, number: int) -> list[int]:
        """How much of each stream lies before block `number`, in integers so that every machine agrees."""
        return [(2 * length * number + self.num_blocks) // (2 * self.num_blocks) for length in self.lengths]

    def _block_at(self, position: int) -> int:
        low, high = 0, self.num_blocks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._bounds(middle)) <= position else (low, middle)
        return low

    def _block(self, number: int) -> Positions:
        if self._last is None or self._last[0] != number:
            bounds = list(zip(self._bounds(number), self._bounds(number + 1), strict=True))
            # The j-th of n positions of a stream belongs at (j + 1/2) / n of the epoch.
            places = [
                (np.arange(start, stop) + 0.5) / length for (start, stop), length in zip(bounds, self.lengths, strict=True)
            ]
            members = [stream.take(*bound) for stream, bound in zip(self.streams, bounds, strict=True)]
            self._last = number, np.concatenate(members)[np.argsort(np.concatenate(places), kind="stable")]
        return self._last[1]

    def upcoming_shards(self, position: int) -> Iterator[int]:
        """Every shard still needed from `position` on, about in the order of first need."""
        starts = self._bounds(self._block_at(position)) if len(self.streams) > 1 else [position]
        pending = [stream.upcoming_shards(start) for stream, start in zip(self.streams, starts, strict=True)]
        while pending:
            for shards in list(pending):
                shard = next(shards, None)
                if shard is None:
                    pending.remove(shards)
                else:
                    yield shard


class _Stream:
    """The positions that shards of one weight have in an epoch."""

    def __init__(
        self, sizes: npt.NDArray[np.int64], shards: Positions, weight: float, seed: int, epoch: int, window: int
    ) -> None:
        self.shards = shards
        self.first = np.concatenate([[0], np.cumsum(sizes)])[shards]  # index of the first sample of each of these shards
        self.sizes = sizes[shards]
        self.local_first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.total = int(self.local_first[-1])
        self.length = num_drawn(weight, self.total)
        self.seed, self.epoch, self.window = seed, epoch, window
        self.is_all = len(shards) == len(sizes)
        self._passes: dict[int, EpochOrder] = {}

    def __len__(self) -> int:
        return self.length

    def _pass(self, number: int) -> EpochOrder:
        if number not in self._passes:
            seed = mix(self.seed, number) if number else self.seed
            self._passes = {number: EpochOrder(self.sizes, seed, self.epoch, self.window)}
        return self._passes[number]

    def take(self, start: int, stop: int) -> Positions:
        """Sample indices of the whole split at positions start <= position < stop of this stream."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number, offset = divmod(start, self.total)
            until = min(stop, (number + 1) * self.total)
            parts.append(self._pass(number)[offset : offset + until - start])
            start = until
        local = np.concatenate(parts)
        if self.is_all:
            return local
        shard = np.searchsorted(self.local_first, local, side="right") - 1
        return np.asarray(self.first[shard] + local - self.local_first[shard], np.int64)

    def upcoming_shards(self, start: int) -> Iterator[int]:
        """Shards from position `start` to the end of this stream."""
        while start < self.length:
            number, offset = divmod(start, self.total)
            for local in self._pass(number).upcoming_shards(offset):
                yield int(self.shards[local])
            start = (number + 1) * self.total


class ClassMembers:
    """The samples of each class of a split, by their indices."""

    def __init__(self, rows: Index) -> None:
        self.shard_of = np.array(rows["shard"])  # (N,)
        self.num_shards = int(self.shard_of.max()) + 1
        self.members = np.argsort(rows["label"], kind="stable")  # (N,), one class after the other
        self.counts = np.bincount(rows["label"])  # (K,)
        assert self.counts.all(), "a class without samples cannot be drawn"
        self.first = np.cumsum(self.counts) - self.counts

    def of(self, number: int) -> Positions:
        """The samples of a class."""
        return self.members[self.first[number] : self.first[number] + self.counts[number]]


class BalancedOrder:
    """The order of one epoch that shows each of K classes equally often, sliced as an EpochOrder is.

    Every K positions show each class once, in random order. Over the epochs of a run a class goes through one whole shuffled
    pass of its samples after the other, so that each comes as often as any other of its class. Where K does not divide the
    epoch, the classes of its last few positions take turns. A pass stays within windows of shards as an EpochOrder does; the
    n-th passes of all classes go through the shards in one order.
    """

    def __init__(self, classes: ClassMembers, seed: int, epoch: int, window: int) -> None:
        self.classes, self.seed, self.epoch, self.window = classes, seed, epoch, window
        self.num_classes = len(classes.counts)
        self.num_rounds, self.num_left = divmod(len(self), self.num_classes)
        turns = epoch * self.num_left  # positions left over in earlier epochs, which classes 0, 1, 2, ... took in turn
        numbers = np.arange(self.num_classes)
        self.drawn_before = epoch * self.num_rounds + (turns + self.num_classes - 1 - numbers) // self.num_classes  # (K,)
        self.last_classes = (turns + np.arange(self.num_left)) % self.num_classes
        self.rounds_in_block = max(1, BLOCK // self.num_classes)
        self._last: tuple[int, Positions] | None = None
        self._passes: dict[int, tuple[int, Positions]] = {}

    def __len__(self) -> int:
        return len(self.classes.members)

    def __getitem__(self, span: slice) -> Positions:
        """Sample indices at positions start <= position < stop."""
        start, stop, _ = span.indices(len(self))
        numbers = self._classes_at(start, stop)
        draws = self.drawn_before[numbers] + np.arange(start, stop) // self.num_classes
        passes, offsets = np.divmod(draws, self.classes.counts[numbers])
        samples = np.zeros(len(numbers), np.int64)
        together = np.lexsort((passes, numbers))
        changes = np.flatnonzero(np.diff(numbers[together]) | np.diff(passes[together])) + 1
        for group in np.split(together, changes) if len(together) else ():
            samples[group] = self._pass(int(numbers[group[0]]), int(passes[group[0]]))[offsets[group]]
        return samples

    def _classes_at(self, start: int, stop: int) -> Positions:
        size = self.rounds_in_block * self.num_classes
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number, offset = divmod(start, size)
            parts.append(self._block(number)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _block(self, number: int) -> Positions:
        """The classes of whole rounds, and at the epoch's end of the few positions left over."""
        if self._last is None or self._last[0] != number:
            keys = _hashed_keys(self.rounds_in_block * self.num_classes, self.seed, self.epoch, 2, number)
            rounds = np.argsort(keys.reshape(-1, self.num_classes), axis=1, kind="stable")
            left = self.num_rounds - number * self.rounds_in_block
            if left < len(rounds):
                last = self.last_classes[np.argsort(keys[: self.num_left], kind="stable")]
                rounds = np.concatenate([rounds[:left].ravel(), last])
            self._last = number, rounds.ravel()
        return self._last[1]

    def _pass(self, number: int, turn: int) -> Positions:
        """All samples of a class in the order of its pass `turn`."""
        known = self._passes.get(number)
        if known is None or known[0] != turn:
            members = self.classes.of(number)
            shards = np.argsort(_hashed_keys(self.classes.num_shards, self.seed, turn, 3), kind="stable")
            windows = np.argsort(shards)[self.classes.shard_of[members]] // self.window
            keys = _hashed_keys(len(members), self.seed, turn, 4, number)
            known = turn, members[np.lexsort((keys, windows))]
            self._passes[number] = known
        return known[1]

    def upcoming_shards(self, position: int) -> Iterator[int]:
        """Every shard still needed from `position` on, in the order of first need."""
        seen: set[int] = set()
        for start in range(position, len(self), BLOCK):
            shards = self.classes.shard_of[self[start : start + BLOCK]]
            first = np.sort(np.unique(shards, return_index=True)[1])
            new = [shard for shard in shards[first].tolist() if shard not in seen]
            seen.update(new)
            yield from new


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


def training_steps_per_epoch(manifest: DatasetManifest, config: DataConfig) -> int:
    """Optimizer steps that training calls an epoch. Raises ConfigError when nothing says it."""
    if "train" not in manifest.streams:
        samples = manifest.split("train").samples_per_epoch
        whole = steps_per_epoch(samples, config.global_batch_size, drop_last=config.drop_last)
        return min(whole, config.steps_per_epoch or whole)
    if config.steps_per_epoch is None:
        raise ConfigError("the training shards are streamed and have no known size: say `data.steps_per_epoch`.")
    return config.steps_per_epoch


class GlobalBatchSampler(Sampler[list[SampleRef]]):
    """Yields this rank's slice of every global batch of an epoch, from batch `start` on.

    Global batch k is order[k*G : (k+1)*G]; with `accumulate` it comes in so many equal parts, each a batch here. Without
    `drop_last` the last one is padded to G with samples of weight 0. In training (`shuffle`) its real samples then weigh
    G / (number of them), so that the mean over G is the mean over the real ones. `weights` are those of the shards in training,
    `classes` is given where it balances them; an evaluation sees every sample once.
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
        weights: list[float] | None = None,
        classes: ClassMembers | None = None,
        accumulate: int = 1,
        limit: int | None = None,
    ) -> None:
        self.shard_sizes = shard_sizes
        self.weights = weights or [1.0] * len(shard_sizes)
        self.classes = classes
        self.global_batch_size = global_batch_size
        self.accumulate = accumulate
        self.local_batch_size = local_batch_size(global_batch_size // accumulate, world_size)
        self.repeats = classes is not None or any(weight > 1 for weight in self.weights)
        self.seed, self.rank, self.window = seed, rank, window
        self.shuffle, self.drop_last = shuffle, drop_last
        num_samples = len(self.order(0)) if shuffle else sum(shard_sizes)
        self.num_samples = num_samples if limit is None else min(num_samples, limit * global_batch_size)
        self.epoch = 0
        self.start = 0

    @classmethod
    def of_training(
        cls,
        shards: list[ShardEntry],
        config: DataConfig,
        seed: int,
        *,
        rows: Index | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> "GlobalBatchSampler":
        """The batches that training takes from `shards`; of all ranks together unless one is named.

        `rows`, the index, is needed where classes are balanced.
        """
        assert rows is not None or not config.balance_classes
        return cls(
            [shard.num_samples for shard in shards],
            config.global_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            window=config.shuffle_shards,
            shuffle=True,
            drop_last=config.drop_last,
            weights=[shard.weight for shard in shards],
            classes=ClassMembers(rows) if config.balance_classes and rows is not None else None,
            accumulate=config.accumulate,
            limit=config.steps_per_epoch,
        )

    @classmethod
    def of_evaluation(
        cls, shards: list[ShardEntry], config: DataConfig, *, rank: int, world_size: int, limit: int | None = None
    ) -> "GlobalBatchSampler":
        """The batches of an evaluation: every sample of `shards` once, in order, or those of the first `limit` batches."""
        return cls(
            [shard.num_samples for shard in shards],
            config.global_batch_size,
            seed=0,
            rank=rank,
            world_size=world_size,
            window=1,
            shuffle=False,
            drop_last=False,
            accumulate=config.accumulate,
            limit=limit,
        )

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Lightning calls set_epoch on `batch_sampler.sampler`; without this every epoch would have one order."""
        return self

    def __len__(self) -> int:
        whole = steps_per_epoch(self.num_samples, self.global_batch_size, drop_last=self.drop_last)
        return whole * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def order(self, epoch: int) -> WeightedOrder | BalancedOrder:
        """The shuffled order of an epoch."""
        if self.classes is not None:
            return BalancedOrder(self.classes, self.seed, epoch, self.window)
        return WeightedOrder(self.shard_sizes, self.weights, self.seed, epoch, self.window)

    def upcoming_shards(self) -> Iterator[int]:
        """Shards that the next iteration will read, in the order of first need."""
        if self.shuffle:
            return self.order(self.epoch).upcoming_shards(self.start // self.accumulate * self.global_batch_size)
        return iter(range(len(self.shard_sizes)))

    def __iter__(self) -> Iterator[list[SampleRef]]:
        start, self.start = self.start, 0
        order = self.order(self.epoch) if self.shuffle else None
        for number in range(start, len(self)):
            step, part = divmod(number, self.accumulate)
            first = step * self.global_batch_size
            end = min(first + self.global_batch_size, self.num_samples)
            members = order[first:end] if order is not None else np.arange(first, end)
            yield self._local_batch(members, part, first)

    def _local_batch(self, members: Positions, part: int, position: int) -> list[SampleRef]:
        """The refs of `members`, of which the first has `position` in the epoch."""
        num_real = len(members)
        weight = self.global_batch_size / num_real if self.shuffle else 1.0
        first = part * (self.global_batch_size // self.accumulate) + self.rank * self.local_batch_size
        return [
            SampleRef(
                int(members[place % num_real]),
                self.epoch,
                weight if place < num_real else 0.0,
                1 + position + place if self.repeats else 0,
            )
            for place in range(first, first + self.local_batch_size)
        ]
