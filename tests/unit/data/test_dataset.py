import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import AugmentConfig, PreprocessConfig
from pipeline.data.augment import build_augmentation, neutral_colour
from pipeline.data.dataset import ShardDataset, ShardReader
from pipeline.data.order import SampleRef, mix
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest, load_dataset, open_index, open_labels
from pipeline.preprocess import PreprocessSpec, build_spec, decode_image


def spec_of(manifest: DatasetManifest) -> PreprocessSpec:
    return build_spec(PreprocessConfig(resize=[8, 10]), manifest.image_stats)


def members_of(manifest: DatasetManifest, split: str) -> list[tuple[str, bytes, int]]:
    """(key, encoded image, label) of every sample, read with tarfile and in the order of the shards."""
    found = []
    for shard in manifest.split(split).shards:
        with tarfile.open(manifest.folder / shard.name) as tar:
            contents = {member.name: tar.extractfile(member) for member in tar}
            read = {name: file.read() for name, file in contents.items() if file is not None}
        for name in read:
            key, _, extension = name.rpartition(".")
            if extension == "jpg":
                found.append((key, read[name], int(read[f"{key}.cls"])))
    return found


def test_a_sample_is_the_image_and_the_label_that_the_tar_holds(tiny_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(tiny_dataset, "train", spec_of(tiny_dataset))
    members = members_of(tiny_dataset, "train")
    assert len(dataset) == len(members) == 36
    for index, (key, encoded, label) in enumerate(members):
        image, found = dataset[index]
        assert (dataset.key(index), dataset.encoded(index), found) == (key, encoded, label)
        assert image.shape == (3, 8, 10)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode_image(encoded, dataset.spec))


def test_a_class_has_the_colour_of_its_folder(tiny_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(tiny_dataset, "val", spec_of(tiny_dataset))
    for index in range(len(dataset)):
        image, label = dataset[index]
        brightest = int(image.float().mean(dim=(1, 2)).argmax())  # 0 red, 1 green, 2 blue
        assert tiny_dataset.class_names[label] == ("red", "green", "blue")[brightest]


def test_a_batch_holds_what_its_references_ask_for_in_their_order(tiny_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(tiny_dataset, "train", spec_of(tiny_dataset))
    refs = [SampleRef(35, 0, 1.0), SampleRef(0, 0, 2.5), SampleRef(35, 0, 0.0)]
    batch = dataset.__getitems__(refs)
    labels = open_index(tiny_dataset, "train")["label"]
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, 8, 10), torch.uint8)
    assert torch.equal(batch["image"], torch.stack([dataset[35][0], dataset[0][0], dataset[35][0]]))
    assert (batch["label"].tolist(), batch["label"].dtype) == ([labels[35], labels[0], labels[35]], torch.int64)
    assert (batch["weight"].tolist(), batch["weight"].dtype) == ([1.0, 2.5, 0.0], torch.float32)
    assert (batch["index"].tolist(), batch["index"].dtype) == ([35, 0, 35], torch.int64)


def test_two_draws_of_a_sample_in_an_epoch_look_different(tiny_dataset: DatasetManifest) -> None:
    spec = spec_of(tiny_dataset)
    dataset = ShardDataset(tiny_dataset, "train", spec, build_augmentation(AugmentConfig(crop_scale=0.3), spec), seed=5)
    batch = dataset.__getitems__([SampleRef(3, 0, 1.0, draw) for draw in (7, 8, 7)])
    assert torch.equal(batch["image"][0], batch["image"][2])
    assert not torch.equal(batch["image"][0], batch["image"][1])
    assert len(set(batch["seed"].tolist())) == 2


def test_an_image_is_augmented_by_the_epoch_of_its_reference_and_its_own_number(tiny_dataset: DatasetManifest) -> None:
    spec = spec_of(tiny_dataset)
    augmentation = build_augmentation(AugmentConfig(crop_scale=0.3), spec)
    assert augmentation is not None
    dataset = ShardDataset(tiny_dataset, "train", spec_of(tiny_dataset), augmentation, seed=5)
    batch = dataset.__getitems__([SampleRef(3, 0, 1.0), SampleRef(3, 1, 1.0), SampleRef(4, 1, 1.0)])
    expected = []
    for index, epoch in ((3, 0), (3, 1), (4, 1)):
        expected.append(augmentation.image(dataset.encoded(index), spec, mix(5, epoch, index)))
    assert torch.equal(batch["image"], torch.stack(expected))
    assert not torch.equal(batch["image"][0], batch["image"][1])
    assert batch["seed"].tolist() == [mix(5, 0, 3), mix(5, 1, 3), mix(5, 1, 4)]


def test_a_data_set_can_be_sent_to_another_process(tiny_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(tiny_dataset, "train", spec_of(tiny_dataset))
    dataset.encoded(0)  # opens a file, which must not travel
    sent = pickle.loads(pickle.dumps(dataset))
    assert [sent.encoded(index) for index in range(36)] == [dataset.encoded(index) for index in range(36)]


def test_the_index_does_not_travel_with_the_data_set(tiny_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(tiny_dataset, "train", spec_of(tiny_dataset))
    dataset.rows = np.memmap(tiny_dataset.folder / "train-000000.tar", dtype=dataset.rows.dtype, shape=(100,))
    sent = pickle.loads(pickle.dumps(dataset))
    assert isinstance(sent.rows, np.memmap)
    assert str(sent.rows.filename) == str((tiny_dataset.folder / "train.index.npy").resolve())
    assert len(pickle.dumps(dataset)) < 20_000


def damage(manifest: DatasetManifest, index: int) -> None:
    """Make the image of a training sample undecodable, in place."""
    row = open_index(manifest, "train")[index]
    path = manifest.folder / manifest.split("train").shards[row["shard"]].name
    content = bytearray(path.read_bytes())
    content[row["offset"] : row["offset"] + 4] = b"xxxx"
    path.write_bytes(content)


def test_a_sample_that_no_longer_decodes_weighs_nothing_and_is_named(copied_dataset: DatasetManifest) -> None:
    damage(copied_dataset, 7)
    dataset = ShardDataset(copied_dataset, "train", spec_of(copied_dataset))
    refs = [SampleRef(9, 0, 2.0), SampleRef(7, 0, 2.0), SampleRef(3, 0, 2.0), SampleRef(7, 0, 0.0)]
    batch = dataset.__getitems__(refs)
    assert batch["weight"].tolist() == [2.0, 0.0, 2.0, 0.0]
    ((row, shard, key, reason),) = batch["bad"]  # the last row only pads the batch
    assert (row, shard, key) == (1, "train-000001.tar", dataset.key(7))
    assert "cannot identify image file" in reason
    assert batch["image"][1].float().mean(dim=(1, 2)).tolist() == neutral_colour(dataset.spec)
    assert torch.equal(batch["image"][2], dataset[3][0])
    assert batch["index"].tolist() == [9, 7, 3, 7]
    with pytest.raises(DataError, match="cannot identify"):
        dataset.image(7)


def test_a_shard_that_is_cut_short_while_training_is_reported_by_name(copied_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(copied_dataset, "train", spec_of(copied_dataset))
    path = copied_dataset.folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"train-000000\.tar: ends before byte \d+\. It was cut short"):
        dataset.image(4)


def test_a_shard_that_vanishes_while_training_is_reported_by_name(copied_dataset: DatasetManifest) -> None:
    dataset = ShardDataset(copied_dataset, "train", spec_of(copied_dataset))
    (copied_dataset.folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: shard is missing"):
        dataset.image(0)


def test_a_reader_of_many_shards_keeps_only_a_few_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(b"0123456789" + str(number).encode())
    reader = ShardReader(paths, max_open=2)
    for _ in range(2):
        assert [reader.read(number, offset=9, size=2) for number in range(5)] == [b"9%d" % number for number in range(5)]
    still_open = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.readlink() in paths]
    assert len(still_open) == 2


# ---- several labels an image ----


def test_a_batch_of_several_labels_holds_their_rows_also_of_an_image_without_any(
    multi_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    dataset = ShardDataset(multi_dataset, "train", tiny_spec)
    rows = open_labels(multi_dataset, "train")
    batch = dataset.__getitems__([SampleRef(index, 0, 1.0) for index in (3, 0, 7)])
    assert batch["label"].dtype == torch.uint8
    np.testing.assert_array_equal(batch["label"].numpy(), rows[[3, 0, 7]])
    assert {tuple(row) for row in rows.tolist()} >= {(0, 0, 0), (1, 1, 1)}
    for index in range(len(dataset)):
        image, label = dataset[index]
        stripes = image.float().unfold(2, 5, 5).mean(dim=(1, 3))  # (3, stripes): the mean colour of each stripe
        channels = [2, 1, 0]  # blue, green and red lie side by side
        shown = [int(stripes[channel, place] > 180) for place, channel in enumerate(channels)]
        assert label.tolist() == shown


def test_label_rows_are_mapped_anew_in_each_process_and_never_pickled(
    multi_dataset: DatasetManifest, tiny_spec: PreprocessSpec
) -> None:
    dataset = ShardDataset(multi_dataset, "train", tiny_spec)
    content = pickle.dumps(dataset)
    assert dataset.__getstate__()["label_rows"] is None
    again = pickle.loads(content)
    assert isinstance(again.label_rows, np.memmap)
    assert torch.equal(again.labels(np.arange(5)), dataset.labels(np.arange(5)))


def test_a_sample_of_several_labels_that_no_longer_decodes_weighs_nothing(
    multi_dataset: DatasetManifest, tiny_spec: PreprocessSpec, tmp_path: Path
) -> None:
    manifest = load_dataset(shutil.copytree(multi_dataset.folder, tmp_path / "copy"))
    damage(manifest, 2)
    batch = ShardDataset(manifest, "train", tiny_spec).__getitems__([SampleRef(index, 0, 1.0) for index in range(4)])
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert batch["label"].shape == (4, 3)
    assert [sample.row for sample in batch["bad"]] == [2]
