from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import AugmentConfig, DataConfig, PreprocessConfig
from pipeline.data import native
from pipeline.data.datamodule import ResumableLoader, ShardDataModule
from pipeline.data.dataset import Batch
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.manifest import DatasetManifest, open_index
from pipeline.preprocess import build_spec
from tests.distributed.id_data import make_dataset
from tests.unit.data.test_dataset import damage
from tests.unit.data.test_order import epoch_order

# 36 samples are 4 batches of 8 and 4 more.
CONFIG = DataConfig(global_batch_size=8, shuffle_shards=2, augment=AugmentConfig(rotate_degrees=20.0))


def module(manifest: DatasetManifest, config: DataConfig = CONFIG) -> ShardDataModule:
    spec = build_spec(PreprocessConfig(resize=[8, 8]), manifest.image_stats)
    return ShardDataModule(manifest, spec, config, seed=1999)


def train_loader(manifest: DatasetManifest, config: DataConfig = CONFIG) -> ResumableLoader:
    loader = module(manifest, config).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    return loader


def require_equal(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one["bad"] == other["bad"]
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
        assert torch.equal(one["weight"], other["weight"])


def test_training_takes_whole_batches_in_the_order_of_the_epoch(tiny_dataset: DatasetManifest) -> None:
    loader = train_loader(tiny_dataset)
    loader.batches.sampler.set_epoch(3)
    sizes = [shard.num_samples for shard in tiny_dataset.split("train").shards]
    seen = [index for batch in loader for index in batch["index"].tolist()]
    assert seen == epoch_order(sizes, seed=1999, epoch=3, window=2).tolist()[:32]
    assert len(loader) == 4


def test_training_without_dropping_weighs_the_tail_up(tiny_dataset: DatasetManifest) -> None:
    *whole, last = train_loader(tiny_dataset, replace(CONFIG, drop_last=False))
    assert {weight for batch in whole for weight in batch["weight"].tolist()} == {1.0}
    assert last["weight"].tolist() == [2.0] * 4 + [0.0] * 4
    assert len({index for batch in (*whole, last) for index in batch["index"].tolist()}) == 36


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_evaluation_sees_every_sample_once_in_order_and_unchanged(split: str, tiny_dataset: DatasetManifest) -> None:
    data = module(tiny_dataset)
    batches = list(data.evaluation_loader(split))
    real = [
        (int(i), int(y))
        for batch in batches
        for i, y, w in zip(batch["index"], batch["label"], batch["weight"], strict=True)
        if w
    ]
    assert real == list(enumerate(open_index(tiny_dataset, split)["label"].tolist()))
    assert {float(weight) for batch in batches for weight in batch["weight"]} <= {0.0, 1.0}
    require_equal(batches, data.evaluation_loader(split))


def test_final_figures_come_from_validation_where_there_is_no_test(tiny_dataset: DatasetManifest) -> None:
    splits = {"train": tiny_dataset.split("train"), "val": tiny_dataset.split("train")}
    data = module(replace(tiny_dataset, splits=splits))
    assert sum(int(batch["weight"].sum()) for batch in data.test_dataloader()) == 36


# ---- the cursor ----


@pytest.mark.parametrize("num_done", [0, 1, 3])
def test_a_restored_loader_yields_exactly_the_rest_and_then_the_next_epoch(
    num_done: int, tiny_dataset: DatasetManifest
) -> None:
    undisturbed = train_loader(tiny_dataset)
    undisturbed.batches.set_epoch(2)
    expected = list(undisturbed)
    stopped = train_loader(tiny_dataset)
    stopped.batches.set_epoch(2)
    batches = iter(stopped)
    for _ in range(num_done):
        next(batches)
    state = stopped.state_dict()
    assert (state["epoch"], state["batch"]) == (2, num_done)

    resumed = train_loader(tiny_dataset)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    require_equal(resumed, expected[num_done:])
    for loader in (resumed, undisturbed):
        loader.batches.set_epoch(3)
    require_equal(resumed, undisturbed)


def test_a_loader_restored_at_the_end_of_an_epoch_begins_the_next(tiny_dataset: DatasetManifest) -> None:
    finished = train_loader(tiny_dataset)
    assert len(list(finished)) == 4
    state = finished.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 4)
    resumed = train_loader(tiny_dataset)
    resumed.load_state_dict(state)
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["batch"]) == (1, 0)
    finished.batches.set_epoch(1)
    require_equal(resumed, finished)


def test_a_loader_that_was_left_in_the_middle_begins_at_the_start_again(tiny_dataset: DatasetManifest) -> None:
    loader = train_loader(tiny_dataset)
    next(iter(loader))
    assert len(list(loader)) == 4


@pytest.mark.parametrize("global_batch_size", [4, 9])  # 9 gives as many batches as 8
def test_the_place_of_a_loader_with_another_batch_size_is_refused(
    global_batch_size: int, tiny_dataset: DatasetManifest
) -> None:
    other = train_loader(tiny_dataset, replace(CONFIG, global_batch_size=global_batch_size))
    message = rf"made with global_batch_size {global_batch_size}, but here it is 8\. Use --fresh"
    with pytest.raises(RunError, match=message):
        train_loader(tiny_dataset).load_state_dict(other.state_dict())


def test_the_place_of_a_loader_of_another_data_set_is_refused(tiny_dataset: DatasetManifest) -> None:
    state = {**train_loader(tiny_dataset).state_dict(), "num_batches": 5}
    with pytest.raises(RunError, match="made with num_batches 5, but here it is 4"):
        train_loader(tiny_dataset).load_state_dict(state)


# ---- loader processes ----


def test_two_loader_processes_give_the_same_batches_and_the_same_errors_as_none(copied_dataset: DatasetManifest) -> None:
    alone = train_loader(copied_dataset, replace(CONFIG, drop_last=False))
    helped = train_loader(copied_dataset, replace(CONFIG, drop_last=False, num_workers=2, start_method="forkserver"))
    for epoch in (0, 1):  # the same processes live on: they must not remember the first epoch
        for loader in (alone, helped):
            loader.batches.set_epoch(epoch)
        require_equal(helped, alone)
    state = alone.state_dict()
    state["batch"] = 2
    for loader in (alone, helped):
        loader.load_state_dict(state)
    remaining = iter(helped)
    require_equal([next(remaining)], [next(iter(alone))])
    assert helped.state_dict()["batch"] == 3  # what was delivered, not what the processes have read ahead
    del remaining

    damage(copied_dataset, 7)
    for loader in (alone, helped):
        loader.batches.set_epoch(2)
    reports = [[(int(batch["index"][bad.row]), bad) for batch in loader for bad in batch["bad"]] for loader in (alone, helped)]
    assert [index for index, _ in reports[0]] == [7]
    assert reports[0] == reports[1]

    (copied_dataset.folder / "train-000003.tar").write_bytes(b"")
    messages = []
    for loader in (alone, train_loader(copied_dataset, replace(CONFIG, num_workers=1, start_method="forkserver"))):
        with pytest.raises(DataError, match=r"train-000003\.tar: ends before byte") as refusal:
            list(loader)
        messages.append(str(refusal.value).split(": ends")[0])
    assert messages[0] == messages[1]


# ---- threads ----

CROPS = AugmentConfig(crop_scale=0.3, horizontal_flip=0.5)
needs_native = pytest.mark.skipif(not native.is_built(), reason=f"needs the native decoder: {native.HOW_TO_BUILD}")


@needs_native
def test_threads_give_the_same_batches_and_the_same_errors_as_none(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "dataset", [1, 17, 2, 9, 7])  # 36 images
    config = replace(CONFIG, augment=CROPS, drop_last=False)
    alone, helped = (train_loader(manifest, replace(config, num_workers=number)) for number in (0, 3))
    assert (alone.num_threads, helped.num_threads) == (0, 3)
    for epoch in (0, 1):
        for loader in (alone, helped):
            loader.batches.set_epoch(epoch)
        require_equal(helped, list(alone))
    for loader in (alone, helped):
        loader.load_state_dict({**alone.state_dict(), "epoch": 1, "batch": 2})
    remaining = iter(helped)
    require_equal([next(remaining)], [next(iter(alone))])
    assert helped.state_dict()["batch"] == 3  # what was delivered, not what the threads have read ahead
    del remaining

    damage(manifest, 7)
    for loader in (alone, helped):
        loader.batches.set_epoch(2)
    reports = [[(int(batch["index"][bad.row]), bad) for batch in loader for bad in batch["bad"]] for loader in (alone, helped)]
    assert [index for index, _ in reports[0]] == [7]
    assert reports[0] == reports[1]

    (manifest.folder / "train-003.tar").write_bytes(b"")
    for number in (0, 2):
        with pytest.raises(DataError, match=r"train-003\.tar: ends before byte"):
            list(train_loader(manifest, replace(config, num_workers=number)))


@needs_native
def test_a_batch_of_threads_is_not_written_over_while_it_is_held(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "dataset", [36])
    config = replace(CONFIG, augment=CROPS, num_workers=2)
    kept = list(train_loader(manifest, config))
    require_equal(kept, train_loader(manifest, replace(config, num_workers=0)))


@needs_native
def test_more_shards_in_a_batch_than_files_stay_open_are_read_all_the_same(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "dataset", [2] * 18)
    loader = train_loader(manifest, replace(CONFIG, augment=CROPS, shuffle_shards=18))
    expected = list(loader)
    loader.dataset.reader.max_open = 2  # type: ignore[attr-defined]
    require_equal(loader, expected)


def test_what_a_whole_batch_is_changed_by_leaves_its_crops_to_threads(tiny_dataset: DatasetManifest) -> None:
    loader = train_loader(tiny_dataset, replace(CONFIG, augment=replace(CROPS, policy="randaugment"), num_workers=1))
    assert (loader.num_threads, loader.num_workers) == (1, 0)


def test_without_the_native_decoder_processes_make_the_batches(
    tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = train_loader(tiny_dataset, replace(CONFIG, augment=CROPS, num_workers=1, decoder="torchvision"))
    assert (loader.num_threads, loader.num_workers) == (0, 1)
    monkeypatch.setattr(native, "_jpeg", None)
    loader = train_loader(tiny_dataset, replace(CONFIG, augment=CROPS, num_workers=1))
    assert (loader.num_threads, loader.num_workers) == (0, 1)
    with pytest.raises(ConfigError, match=r"`data\.decoder` is native, which is not built here\. `make native` builds it"):
        train_loader(tiny_dataset, replace(CONFIG, augment=CROPS, decoder="native"))


@needs_native
def test_both_decoders_cut_the_same_boxes_and_differ_by_a_grey_level(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "dataset", [36])
    config = replace(CONFIG, augment=CROPS)
    ours, theirs = (train_loader(manifest, replace(config, decoder=decoder)) for decoder in ("native", "torchvision"))
    for one, other in zip(ours, theirs, strict=True):
        difference = (one["image"].int() - other["image"].int()).abs()
        assert int(difference.max()) <= 1
