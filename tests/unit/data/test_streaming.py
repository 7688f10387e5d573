import dataclasses
import gzip
import itertools
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import AugmentConfig, DataConfig, PreprocessConfig
from pipeline.data.datamodule import ResumableLoader, ShardDataModule
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.streaming import StreamDataset, StreamLoader, read_samples
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec, build_spec
from tests.unit.data.test_dataset import damage

CONFIG = DataConfig(global_batch_size=4, steps_per_epoch=5, shuffle_buffer=8)


@pytest.fixture
def streamed(tiny_dataset: DatasetManifest) -> DatasetManifest:
    """The tiny data set, whose eight training shards are known by their paths alone."""
    return without_index(tiny_dataset)


def without_index(manifest: DatasetManifest) -> DatasetManifest:
    urls = [str(manifest.folder / shard.name) for shard in manifest.split("train").shards]
    splits = {name: split for name, split in manifest.splits.items() if name != "train"}
    return dataclasses.replace(manifest, splits=splits, streams={"train": urls})


def stream_of(
    manifest: DatasetManifest, spec: PreprocessSpec, config: DataConfig = CONFIG, *, rank: int = 0, world_size: int = 1
) -> StreamDataset:
    return StreamDataset(manifest, spec, config, None, seed=1999, rank=rank, world_size=world_size)


def loader_of(manifest: DatasetManifest, spec: PreprocessSpec, config: DataConfig = CONFIG) -> StreamLoader:
    loader = ShardDataModule(manifest, spec, config, seed=1999).train_dataloader()
    assert isinstance(loader, StreamLoader)
    return loader


def tensors_of(batches: list[Batch]) -> list[tuple[bytes, int]]:
    """(pixels, label) of each row."""
    return [
        (image.contiguous().numpy().tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]


def test_a_pass_holds_every_sample_once_as_the_tensor_of_the_indexed_path(
    streamed: DatasetManifest, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    batches = list(itertools.islice(stream_of(streamed, tiny_spec, dataclasses.replace(CONFIG, shuffle_buffer=1)), 9))
    indexed = ShardDataset(tiny_dataset, "train", tiny_spec)
    expected = [(image.contiguous().numpy().tobytes(), label) for image, label in (indexed[index] for index in range(36))]
    found = tensors_of(batches)
    assert sorted(found) == sorted(expected)
    assert found != expected  # shards are shuffled
    assert batches[0]["image"].shape == (4, 3, 16, 16)
    assert batches[0]["weight"].tolist() == [1.0] * 4
    assert batches[0]["index"].tolist() == [-1] * 4


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_a_pass_also_where_there_are_fewer_shards(
    world_size: int, streamed: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    config = dataclasses.replace(CONFIG, shuffle_buffer=1, global_batch_size=world_size)
    seen = []
    for rank in range(world_size):
        stream = stream_of(streamed, tiny_spec, config, rank=rank, world_size=world_size)
        seen += [sample["__key__"] for sample in stream._pass(0, stream.first_consumer)]
    assert len(seen) == len(set(seen)) == 36


def test_an_epoch_is_whole_steps_and_the_stream_goes_on(streamed: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    loader = loader_of(streamed, tiny_spec)
    assert len(loader) == 5
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 5
    assert len(set(tensors_of([*first, *second]))) > 30  # 40 rows of 36 samples
    assert loader.state_dict() == {"epoch": 2, "batch": 5, "num_batches": 5, "global_batch_size": 4}


def test_a_resumed_stream_takes_the_rest_of_the_steps_with_other_samples(
    streamed: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    loader = loader_of(streamed, tiny_spec)
    first = list(itertools.islice(loader, 2))
    resumed = loader_of(streamed, tiny_spec)
    resumed.load_state_dict(loader.state_dict())
    rest = list(resumed)
    assert len(rest) == 3
    assert tensors_of(rest)[:8] != tensors_of(first)
    assert len(list(resumed)) == 5
    with pytest.raises(RunError, match="made with num_batches 7, but here it is 5"):
        resumed.load_state_dict({**loader.state_dict(), "num_batches": 7})


def test_loader_processes_stream_too(streamed: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    config = dataclasses.replace(CONFIG, num_workers=2, start_method="fork", shuffle_buffer=1)
    loader = loader_of(streamed, tiny_spec, config)
    rows = [row for batches in (list(loader), list(loader)) for row in tensors_of(batches)]
    assert len(rows) == 40
    assert len(set(rows)) > 25


def test_images_are_augmented(streamed: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    plain = loader_of(streamed, tiny_spec)
    config = dataclasses.replace(CONFIG, augment=AugmentConfig(crop_scale=0.3))
    rotated = loader_of(streamed, tiny_spec, config)
    for one, other in zip(plain, rotated, strict=True):
        assert torch.equal(one["label"], other["label"])
        assert not torch.equal(one["image"], other["image"])
        assert len(set(one["seed"].tolist())) == len(one["label"])


def test_a_bad_sample_is_masked_and_named(copied_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    damage(copied_dataset, 7)
    batches = list(itertools.islice(stream_of(without_index(copied_dataset), tiny_spec), 9))
    bad = [(sample, batch) for batch in batches for sample in batch["bad"]]
    ((sample, batch),) = bad
    assert sample.shard.endswith("train-000001.tar")
    assert sample.key.startswith("00000007-")
    assert batch["weight"].tolist().count(0) == 1 and batch["weight"][sample.row] == 0


def test_compressed_shards_can_be_streamed(copied_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    path = copied_dataset.folder / "train-000000.tar"
    packed = path.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_samples([str(packed)])) == [{**sample, "__url__": str(packed)} for sample in read_samples([str(path)])]


@pytest.mark.parametrize("damaged", [b"", b"no tar at all" * 100, None])
def test_a_shard_that_cannot_be_read_is_named(damaged: bytes | None, copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "train-000000.tar"
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be (read|opened)"):
        list(read_samples([str(path)]))


def test_a_shard_that_names_a_command_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        list(read_samples([f"pipe:touch {tmp_path}/owned"]))
    assert not (tmp_path / "owned").exists()


def test_steps_must_be_said(streamed: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    with pytest.raises(ConfigError, match=r"streamed and have no known size: say `data\.steps_per_epoch`"):
        loader_of(streamed, tiny_spec, dataclasses.replace(CONFIG, steps_per_epoch=None))


def test_an_evaluation_of_the_same_data_set_is_exact(streamed: DatasetManifest, tiny_spec: PreprocessSpec) -> None:
    loader: Any = ShardDataModule(streamed, tiny_spec, CONFIG, seed=1999).val_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert sum(int(batch["weight"].sum()) for batch in loader) == 12


def test_a_stream_without_samples_ends_instead_of_looking_for_ever(tmp_path: Path, streamed: DatasetManifest) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    empty = dataclasses.replace(streamed, streams={"train": [str(tmp_path / "empty.tar")]})
    spec = build_spec(PreprocessConfig(resize=[16, 16]), streamed.image_stats)
    with pytest.raises(
        DataError, match=r"empty\.tar, \.\.\.\) hold too few samples: none is left for one of 1 loader processes"
    ):
        next(iter(stream_of(empty, spec)))


def test_a_stream_of_several_labels_has_the_rows_of_the_indexed_path(
    multi_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    indexed = ShardDataset(multi_dataset, "train", tiny_spec)
    config = dataclasses.replace(CONFIG, shuffle_buffer=1, global_batch_size=len(indexed))
    batch = next(iter(stream_of(without_index(multi_dataset), tiny_spec, config)))
    assert batch["label"].dtype == torch.uint8
    assert float(batch["weight"].min()) == 1.0, "an image without a label is none that cannot be read"
    labels_of = {
        image.contiguous().numpy().tobytes(): tuple(label.tolist()) for image, label in map(indexed.__getitem__, range(24))
    }
    found = zip(batch["image"], batch["label"], strict=True)
    assert {image.contiguous().numpy().tobytes(): tuple(label.tolist()) for image, label in found} == labels_of
