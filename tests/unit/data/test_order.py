import hashlib
import struct
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config import DataConfig
from pipeline.data.order import (
    BalancedOrder,
    ClassMembers,
    EpochOrder,
    GlobalBatchSampler,
    SampleRef,
    WeightedOrder,
    local_batch_size,
    mix,
    steps_per_epoch,
)
from pipeline.errors import ConfigError
from pipeline.manifest import INDEX_ROW, IndexEntry, ShardEntry, SplitEntry

SHARD_SIZES = [4, 3, 5, 2]


def epoch_order(shard_sizes: list[int], seed: int, epoch: int, window: int) -> npt.NDArray[np.int64]:
    """The whole order of an epoch at once, (N,)."""
    return EpochOrder(np.asarray(shard_sizes), seed, epoch, window)[:]


def sampler(**changes: Any) -> GlobalBatchSampler:
    arguments: dict[str, Any] = {
        "shard_sizes": SHARD_SIZES,
        "global_batch_size": 6,
        "seed": 1999,
        "rank": 0,
        "world_size": 1,
        "window": 2,
        "shuffle": True,
        "drop_last": False,
    }
    return GlobalBatchSampler(**{**arguments, **changes})


def global_batches(world_size: int, **changes: Any) -> list[list[SampleRef]]:
    """What all ranks together see in each step."""
    ranks = [list(sampler(rank=rank, world_size=world_size, **changes)) for rank in range(world_size)]
    return [[ref for batch in step for ref in batch] for step in zip(*ranks, strict=True)]


# ---- the order ----


def test_the_order_is_the_one_that_every_run_so_far_was_trained_in() -> None:
    # numpy keeps its bit generators the same for ever, but not `shuffle` or `permutation`; hence a sort by raw Philox words.
    # If these numbers change, no interrupted run can go on in its order and no past step can be replayed.
    assert epoch_order(SHARD_SIZES, seed=1999, epoch=0, window=2).tolist() == [8, 13, 12, 9, 7, 10, 11, 3, 1, 6, 5, 2, 0, 4]
    assert epoch_order(SHARD_SIZES, seed=1999, epoch=1, window=2).tolist() == [0, 2, 13, 3, 12, 1, 8, 9, 6, 4, 7, 11, 5, 10]


def test_numbers_are_mixed_the_same_way_on_every_machine() -> None:
    little_endian = struct.pack("<3q", 1999, 0, 3)
    assert mix(1999, 0, 3) == int.from_bytes(hashlib.blake2b(little_endian, digest_size=8).digest(), "little") >> 1
    assert mix(1999, 0, 3) == 1902691182255263826
    assert len({mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(-1, 2)}) == 4


@pytest.mark.parametrize("shard_sizes", [[1], [7], SHARD_SIZES, [5] * 20, [1, 100, 1]])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_sample_comes_exactly_once(shard_sizes: list[int], window: int) -> None:
    order = epoch_order(shard_sizes, seed=3, epoch=4, window=window)
    assert sorted(order.tolist()) == list(range(sum(shard_sizes)))


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = {tuple(epoch_order([5] * 4, seed, epoch, window=2).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_samples_are_mixed_within_a_window_of_shards_and_not_beyond() -> None:
    order = epoch_order([5] * 8, seed=1999, epoch=0, window=2)
    windows = [sorted({int(sample) // 5 for sample in order[first : first + 10]}) for first in range(0, 40, 10)]
    assert [len(shards) for shards in windows] == [2, 2, 2, 2]
    assert sorted(shard for shards in windows for shard in shards) == list(range(8))
    assert windows != sorted(windows)  # the shards were shuffled
    assert any(abs(a - b) != 1 for a, b in windows)  # and do not keep their neighbours
    assert all(order[first : first + 10].tolist() != sorted(order[first : first + 10]) for first in range(0, 40, 10))


def test_every_sample_comes_first_equally_often() -> None:
    firsts = [int(epoch_order([2, 3, 1], seed, epoch=0, window=3)[0]) for seed in range(3000)]
    # Binomial with n = 3000, p = 1/6: mean 500, standard deviation 20.4; five of them over six samples miss once in 10^5.
    np.testing.assert_allclose(np.bincount(firsts, minlength=6), 500, rtol=0, atol=5 * 20.4)


@pytest.mark.parametrize("span", [(0, 1), (0, 14), (3, 9), (6, 7), (13, 14), (5, 5), (14, 20)])
def test_any_slice_of_an_epoch_can_be_asked_for_alone(span: tuple[int, int]) -> None:
    for window in (1, 2, 3, 10):
        whole = epoch_order(SHARD_SIZES, 1999, 3, window)
        assert EpochOrder(np.asarray(SHARD_SIZES), 1999, 3, window)[slice(*span)].tolist() == whole[slice(*span)].tolist()


def test_empty_shards_change_nothing_but_the_windows() -> None:
    for window in (1, 2, 5):
        assert sorted(epoch_order([0, 3, 0, 0, 2, 0], 1, 1, window).tolist()) == list(range(5))


def test_a_hundred_million_samples_can_be_begun_anywhere_in_little_memory() -> None:
    sizes = np.full(20_000, 5_000)
    tracemalloc.start()
    begun = time.process_time()
    order = EpochOrder(sizes, seed=1, epoch=0, window=8)
    batch = order[90_000_000:90_000_256]
    seconds = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(batch.tolist())) == 256
    assert peak < 20e6  # a whole order would be 800 MB
    assert seconds < 1


# ---- shards of different weights ----

WEIGHTED_SIZES = [30, 20, 10, 25, 15]
WEIGHTS = [1.0, 0.5, 1.0, 2.5, 0.5]


def weighted_order(epoch: int = 0, weights: list[float] = WEIGHTS) -> WeightedOrder:
    return WeightedOrder(WEIGHTED_SIZES, weights, seed=1999, epoch=epoch, window=2)


def shard_of(index: int) -> int:
    return int(np.searchsorted(np.cumsum(WEIGHTED_SIZES), index, side="right"))


def test_equal_weights_of_one_are_the_plain_order() -> None:
    plain = epoch_order(WEIGHTED_SIZES, 1999, 4, window=2).tolist()
    assert weighted_order(4, [1.0] * 5)[:].tolist() == plain


def test_a_weight_is_how_often_an_epoch_draws_a_sample() -> None:
    order = weighted_order()
    drawn = Counter(order[:].tolist())
    times = {shard: [drawn[index] for index in range(100) if shard_of(index) == shard] for shard in range(5)}
    assert times[0] == [1] * 30 and times[2] == [1] * 10
    assert set(times[1] + times[4]) == {0, 1} and sum(times[1] + times[4]) == 18  # half of 35, halves up
    assert set(times[3]) == {2, 3} and sum(times[3]) == 63  # 2.5 x 25
    assert len(order) == 40 + 18 + 63
    entries = [ShardEntry("", size, 0, "", weight) for size, weight in zip(WEIGHTED_SIZES, WEIGHTS, strict=True)]
    assert SplitEntry(entries, IndexEntry("", ""), []).samples_per_epoch == len(order)


def test_half_of_a_data_set_is_another_half_every_epoch() -> None:
    halves = {frozenset(i for i in weighted_order(epoch)[:].tolist() if shard_of(i) in (1, 4)) for epoch in range(10)}
    assert len(halves) == 10
    assert len(frozenset.union(*halves)) == 35


def test_shards_of_different_weights_are_mixed_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.order.BLOCK", 16)
    order = weighted_order()[:].tolist()
    for group, total in (({0, 2}, 40), ({1, 4}, 18), ({3}, 63)):
        for end in range(0, 122, 11):
            assert abs(sum(shard_of(index) in group for index in order[:end]) - total * end / 121) <= 1.5


@pytest.mark.parametrize("block", [1, 16, 1000])
def test_any_slice_of_a_weighted_epoch_can_be_asked_for_alone(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weighted_order()[:].tolist()
    monkeypatch.setattr("pipeline.data.order.BLOCK", block)
    assert Counter(weighted_order()[:].tolist()) == Counter(whole)
    whole = weighted_order()[:].tolist()
    for start in range(0, 122, 7):
        assert weighted_order()[start : start + 20].tolist() == whole[start : start + 20]


@pytest.mark.parametrize("weights", [[1.0] * 5, WEIGHTS])
@pytest.mark.parametrize("position", [0, 1, 50, 99])
def test_every_shard_that_is_still_needed_is_announced(weights: list[float], position: int) -> None:
    order = weighted_order(0, weights)
    announced = list(order.upcoming_shards(position))
    assert {shard_of(index) for index in order[position : len(order)].tolist()} <= set(announced)
    if weights == [1.0] * 5:
        needed = list(dict.fromkeys(shard_of(index) // 1 for index in order[position : len(order)].tolist()))
        # Within a window all shards are needed at once.
        assert set(announced[:2]) >= set(needed[:1])
        assert len(announced) == len(set(announced))


# ---- global batches ----


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same_samples_in_the_same_step(world_size: int, drop_last: bool, shuffle: bool) -> None:
    together = global_batches(world_size, drop_last=drop_last, shuffle=shuffle)
    assert together == global_batches(1, drop_last=drop_last, shuffle=shuffle)
    order = epoch_order(SHARD_SIZES, 1999, 0, window=2).tolist() if shuffle else list(range(14))
    for number, batch in enumerate(together):
        real = [ref.sample_index for ref in batch if ref.weight]
        assert real == order[6 * number : 6 * number + 6]
        assert len(batch) == 6


def test_training_drops_the_tail_to_whole_batches_and_another_tail_every_epoch() -> None:
    seen = []
    for epoch in range(20):
        batches = sampler(drop_last=True)
        batches.set_epoch(epoch)
        assert [len(batch) for batch in batches] == [6, 6]
        seen.append({ref.sample_index for batch in batches for ref in batch})
    assert all(len(samples) == 12 for samples in seen)
    assert set.union(*seen) == set(range(14))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_weighted_mean_of_a_padded_batch_is_the_mean_of_its_real_samples(world_size: int) -> None:
    last = global_batches(world_size)[-1]
    losses = np.random.default_rng(0).normal(size=14)
    # As in training: each rank takes the mean of weight x loss over its rows, and all-reduce the mean over the ranks.
    per_rank = [
        np.mean([ref.weight * losses[ref.sample_index] for ref in last[first : first + 6 // world_size]])
        for first in range(0, 6, 6 // world_size)
    ]
    order = epoch_order(SHARD_SIZES, 1999, 0, window=2)
    # Two or three sums in another order: a few units in the last place of float64.
    np.testing.assert_allclose(np.mean(per_rank), losses[order[12:]].mean(), rtol=1e-14, atol=1e-15)
    assert [ref.weight for ref in last] == [3.0, 3.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_an_evaluation_weighs_each_sample_once_and_padding_nothing(world_size: int) -> None:
    refs = [ref for batch in global_batches(world_size, shuffle=False) for ref in batch]
    weights = np.zeros(14)
    for ref in refs:
        weights[ref.sample_index] += ref.weight
    assert weights.tolist() == [1.0] * 14
    assert len(refs) == 18


def test_a_data_set_smaller_than_a_batch_is_one_padded_batch_on_every_rank() -> None:
    ranks = [list(sampler(shard_sizes=[2], rank=rank, world_size=3)) for rank in range(3)]
    assert [[ref.weight for batch in batches for ref in batch] for batches in ranks] == [[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_can_begin_in_the_middle_once(start: int) -> None:
    batches = sampler()
    whole = list(batches)
    batches.start = start
    assert list(batches) == whole[start:]
    assert list(batches) == whole


def test_every_reference_carries_its_epoch_and_lightning_can_set_it() -> None:
    batches = sampler()
    batches.sampler.set_epoch(7)  # Lightning looks for set_epoch on `batch_sampler.sampler`
    assert {ref.epoch for batch in batches for ref in batch} == {7}
    assert [ref.sample_index for batch in batches for ref in batch if ref.weight] == epoch_order(
        SHARD_SIZES, 1999, 7, 2
    ).tolist()


@pytest.mark.parametrize(
    ("num_samples", "drop_last", "steps"),
    [(12, True, 2), (12, False, 2), (13, True, 2), (13, False, 3), (5, True, 0), (5, False, 1)],
)
def test_the_steps_of_an_epoch_are_whole_batches_or_also_a_padded_one(num_samples: int, drop_last: bool, steps: int) -> None:
    assert steps_per_epoch(num_samples, 6, drop_last=drop_last) == steps
    batches = sampler(shard_sizes=[num_samples], drop_last=drop_last)
    assert len(batches) == len(list(batches)) == steps


@pytest.mark.parametrize(("global_batch_size", "world_size", "choices"), [(64, 3, "63 or 66"), (2, 3, "3"), (10, 4, "8 or 12")])
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_nearest_ones(
    global_batch_size: int, world_size: int, choices: str
) -> None:
    message = f"is {global_batch_size}, which {world_size} processes cannot share equally. Set it to {choices}, or start"
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        local_batch_size(global_batch_size, world_size)


# ---- every class equally often ----

# 40, 15 and 5 samples of three classes, in shards of 7.
LABELS = np.random.default_rng(0).permutation([0] * 40 + [1] * 15 + [2] * 5)


def index_of(labels: npt.NDArray[np.int64], samples_per_shard: int = 7) -> npt.NDArray[np.void]:
    rows = np.zeros(len(labels), INDEX_ROW)
    rows["label"], rows["shard"] = labels, np.arange(len(labels)) // samples_per_shard
    return rows


def balanced(epoch: int, seed: int = 1999, labels: npt.NDArray[np.int64] = LABELS) -> BalancedOrder:
    return BalancedOrder(ClassMembers(index_of(labels)), seed, epoch, window=2)


@pytest.mark.parametrize("number", [60, 59, 58], ids=["whole rounds", "two left over", "one left over"])
def test_each_class_comes_as_often_as_any_other_and_evenly(number: int) -> None:
    labels = LABELS[:number]
    order = balanced(3, labels=labels)
    drawn = labels[order[:]]
    counts = np.bincount(drawn, minlength=3)
    assert len(order) == counts.sum() == number
    assert set(counts.tolist()) <= {number // 3, -(-number // 3)}
    for first in range(0, number // 3 * 3, 3):
        assert sorted(drawn[first : first + 3]) == [0, 1, 2], "once in every three positions"
    assert len({tuple(drawn[first : first + 3]) for first in range(0, 57, 3)}) > 3, "in random order"


def test_over_a_run_each_sample_comes_as_often_as_any_other_of_its_class() -> None:
    for number in (60, 59, 58):
        labels = LABELS[:number]
        seen = np.zeros(number, int)
        for epoch in range(11):
            seen += np.bincount(balanced(epoch, labels=labels)[:], minlength=number)
            for label in range(3):
                assert np.ptp(seen[labels == label]) <= 1, "one whole pass after the other, also from epoch to epoch"
        drawn = [int(seen[labels == label].sum()) for label in range(3)]
        assert max(drawn) - min(drawn) <= 1, "the positions left over go round"


def test_a_balanced_order_is_a_function_of_seed_and_epoch_that_can_be_asked_for_any_slice() -> None:
    whole = balanced(2)[:]
    for start, stop in ((0, 7), (5, 6), (17, 49), (58, 60), (60, 60)):
        assert balanced(2)[start:stop].tolist() == whole[start:stop].tolist()
    assert whole.tolist() != balanced(3)[:].tolist()
    assert whole.tolist() != balanced(2, seed=1)[:].tolist()
    # As above: these numbers are what runs so far were trained in.
    assert whole[:12].tolist() == [0, 15, 36, 3, 23, 42, 44, 50, 14, 48, 19, 9]


def test_a_balanced_order_names_every_shard_still_needed_in_the_order_of_first_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.order.BLOCK", 16)
    order = balanced(0)
    for position in (0, 31, 59):
        first_need = dict.fromkeys(int(sample) // 7 for sample in order[position:])
        assert list(order.upcoming_shards(position)) == list(first_need)


def test_a_class_goes_through_its_shards_window_by_window() -> None:
    labels = np.zeros(70, np.int64)
    shards = balanced(0, labels=labels)[:] // 7
    for first in range(0, 70, 14):
        assert len(set(shards[first : first + 14])) == 2, "windows of two shards"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("changes", [{"weights": [1.0, 3.0, 1.0, 2.0]}, {"classes": True}], ids=["weights", "classes"])
def test_a_sample_that_an_epoch_has_again_is_drawn_anew(changes: dict[str, Any], world_size: int) -> None:
    if "classes" in changes:
        changes = {"classes": ClassMembers(index_of(LABELS))}
    draws = [ref.draw for batch in global_batches(world_size, **changes) for ref in batch if ref.weight]
    assert draws == list(range(1, len(draws) + 1))
    assert {ref.draw for batch in global_batches(world_size) for ref in batch} == {0}, "the plain order keeps its changes"
    later = sampler(**changes)
    later.start = 2
    assert next(iter(later))[0].draw == 13


def test_ranks_parts_and_restarts_share_the_balanced_batches() -> None:
    rows = index_of(LABELS)
    shards = [ShardEntry("s", int(count), 0, "") for count in np.bincount(rows["shard"])]
    config = DataConfig(global_batch_size=12, balance_classes=True, shuffle_shards=2)
    whole = GlobalBatchSampler.of_training(shards, config, 1999, rows=rows)
    whole.set_epoch(1)
    expected = [ref.sample_index for batch in whole for ref in batch]
    assert expected == BalancedOrder(ClassMembers(rows), 1999, 1, 2)[:].tolist()
    assert len(whole) == 5
    halves = [GlobalBatchSampler.of_training(shards, config, 1999, rows=rows, rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.set_epoch(1)
        half.start = 2
    steps = zip(*halves, strict=True)
    assert [ref.sample_index for step in steps for batch in step for ref in batch] == expected[24:]
