"""Every sample once in an evaluation, at most once in a training epoch: on any ranks, workers, shards, start methods.

Ranks are simulated in this process, threads are real. A worker is what a loader process of the start method would hold: the
data set itself after a fork, an unpickled copy else; worker w of W makes every W-th batch. tests/distributed has real ones.
"""

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import native
from pipeline.data.datamodule import ResumableLoader
from pipeline.manifest import DatasetManifest
from tests.distributed.id_data import GLOBAL_BATCH_SIZE, LAYOUTS, config_of, ids_of, make_dataset, open_module

WORLD_SIZES, WORKERS, START_METHODS = (1, 2, 3, 4), (0, 1, 3), ("fork", "forkserver", "spawn", "threads")
EPOCHS = 2


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DatasetManifest]:
    """A data set of each layout of shards."""
    folder = tmp_path_factory.mktemp("ids")
    return {name: make_dataset(folder / name, sizes) for name, sizes in LAYOUTS.items()}


def simulated(loader: ResumableLoader, num_workers: int, start_method: str, epoch: int) -> list[list[int]]:
    """The samples of each local batch as `num_workers` loader processes would make them, -1 for padding."""
    loader.batches.set_epoch(epoch)
    dataset: Any = loader.dataset
    copies = [dataset if start_method == "fork" else pickle.loads(pickle.dumps(dataset)) for _ in range(num_workers)]
    found = []
    for number, refs in enumerate(pickle.loads(pickle.dumps(list(loader.batches)))):
        batch = copies[number % num_workers].__getitems__(refs)
        found.append([int(i) if w > 0 else -1 for i, w in zip(batch["index"], batch["weight"], strict=True)])
    return found


def global_batches(
    manifest: DatasetManifest, world_size: int, num_workers: int, start_method: str, *, drop_last: bool = True
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """(the global batches of each training epoch, those of an evaluation), put together from all ranks in their order."""
    train: list[list[list[int]]] = [[] for _ in range(EPOCHS)]
    evaluation: list[list[int]] = []
    for rank in range(world_size):
        num_threads = num_workers if start_method == "threads" else 0  # which are real
        module = open_module(manifest, rank, world_size, config_of(num_threads, start_method, drop_last=drop_last))
        train_loader, val_loader = module.train_dataloader(), module.val_dataloader()
        assert isinstance(train_loader, ResumableLoader)
        assert train_loader.num_threads == num_threads
        for epoch in range(EPOCHS):
            _join(train[epoch], _ids(train_loader, num_workers, start_method, epoch))
        _join(evaluation, _ids(val_loader, num_workers, "fork" if num_threads else start_method, 0))
    return train, evaluation


def _ids(loader: ResumableLoader, num_workers: int, start_method: str, epoch: int) -> list[list[int]]:
    if not num_workers or loader.num_threads:
        return ids_of(loader, epoch)
    return simulated(loader, num_workers, start_method, epoch)


def _join(together: list[list[int]], local: list[list[int]]) -> None:
    if not together:
        together += local
        return
    assert len(local) == len(together), "ranks must take equally many steps"
    for batch, more in zip(together, local, strict=True):
        batch += more


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_comes_as_often_as_it_must_in_every_case(layout: str, datasets: dict[str, DatasetManifest]) -> None:
    manifest = datasets[layout]
    number = manifest.split("train").num_samples
    expected = global_batches(manifest, 1, 0, "fork")
    start_methods = [method for method in START_METHODS if method != "threads" or native.is_built()]
    for case in itertools.product(WORLD_SIZES, WORKERS, start_methods):
        train, evaluation = global_batches(manifest, *case)
        assert (train, evaluation) == expected, case  # one order for all of them
        for epoch in train:
            counts = Counter(itertools.chain.from_iterable(epoch))
            assert set(counts.values()) == {1} and -1 not in counts, case
            assert len(counts) == number - number % GLOBAL_BATCH_SIZE, case  # less the declared tail
        assert train[0] != train[1], case
        seen = [index for batch in evaluation for index in batch if index >= 0]
        assert sorted(seen) == list(range(number)), case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_without_dropping_the_tail_an_epoch_sees_every_sample_once(
    layout: str, world_size: int, datasets: dict[str, DatasetManifest]
) -> None:
    train, _ = global_batches(datasets[layout], world_size, 0, "fork", drop_last=False)
    for epoch in train:
        seen = [index for batch in epoch for index in batch if index >= 0]
        assert sorted(seen) == list(range(datasets[layout].split("train").num_samples))


def test_more_ranks_than_samples_evaluate_each_once(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "few", [1, 1, 1])
    _, evaluation = global_batches(manifest, 4, 0, "fork")
    assert sorted(index for batch in evaluation for index in batch if index >= 0) == [0, 1, 2]


@pytest.mark.parametrize("stopped_after", [1, 2])
@pytest.mark.parametrize("resumed_on", WORLD_SIZES)
def test_a_run_resumed_on_another_number_of_ranks_goes_on_in_the_same_order(
    stopped_after: int, resumed_on: int, datasets: dict[str, DatasetManifest]
) -> None:
    manifest = datasets["uneven"]
    whole = global_batches(manifest, 1, 0, "fork")[0][0]
    loader = open_module(manifest, 0, 2, config_of(0, "fork")).train_dataloader()
    for _ in itertools.islice(loader, stopped_after):
        pass
    rest: list[list[int]] = []
    for rank in range(resumed_on):
        resumed = open_module(manifest, rank, resumed_on, config_of(0, "fork")).train_dataloader()
        assert isinstance(resumed, ResumableLoader)
        resumed.load_state_dict(loader.state_dict())
        _join(rest, ids_of(resumed))
    assert rest == whole[stopped_after:]
