import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.samples import Labels, Samples
from pipeline.errors import DataError
from tests.unit.data.handmade import Sample, make_dataset

SPLITS = {
    "train": [Sample(f"t{number}", f"train image {number}".encode(), number % 3) for number in range(10)],
    "val": [Sample(f"v{number}", f"val image {number}".encode(), 1) for number in range(3)],
    "test": [Sample("x0", b"test image 0", 2)],
}
EVERY_SAMPLE = [sample for samples in SPLITS.values() for sample in samples]
SEVERAL = {
    "train": [Sample("a", b"1", (0, 2)), Sample("b", b"2", ()), Sample("c", b"3", (0, 2))],
    "test": [Sample("d", b"4", (2,)), Sample("e", b"5", (0,))],
}


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    manifest = make_dataset(tmp_path / "data", SPLITS, ["a", "b", "c"], samples_per_shard=4)
    return Samples.open(manifest, DataConfig())


@pytest.fixture
def several(tmp_path: Path) -> Samples:
    return Samples.open(make_dataset(tmp_path / "several", SEVERAL, ["x", "y", "z"]), DataConfig())


def test_places_number_the_samples_of_all_splits(samples: Samples) -> None:
    assert len(samples) == 14
    assert [samples.places(split) for split in SPLITS] == [slice(0, 10), slice(10, 13), slice(13, 14)]
    assert [samples.split_of(place) for place in (0, 9, 10, 12, 13)] == ["train", "train", "val", "val", "test"]
    assert samples.split_numbers(np.array([0, 9, 10, 12, 13])).tolist() == [0, 0, 1, 1, 2]


def test_bytes_and_keys_are_read_by_place_over_shards_and_splits(samples: Samples) -> None:
    assert dict(samples.read(range(14))) == {place: sample.encoded for place, sample in enumerate(EVERY_SAMPLE)}
    assert dict(samples.read([3, 4, 13])) == {3: b"train image 3", 4: b"train image 4", 13: b"test image 0"}
    assert samples.keys([13, 4, 4]) == {4: "t4", 13: "x0"}
    assert samples.sizes().tolist() == [len(sample.encoded) for sample in EVERY_SAMPLE]


def test_a_long_key_is_read_too(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", {"train": [Sample("short", b"image", 0)]}, ["a"])
    key = "k" * 150
    with tarfile.open(tmp_path / "data/train-000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in ((f"{key}.jpg", b"image"), (f"{key}.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
        tar.close()
    with tarfile.open(tmp_path / "data/train-000000.tar") as tar:
        offset = tar.next().offset_data  # type: ignore[union-attr]
    rows = np.load(tmp_path / "data/train.index.npy")
    rows["offset"] = offset
    np.save(tmp_path / "data/train.index.npy", rows)
    assert Samples.open(manifest, DataConfig()).keys([0]) == {0: key}


def test_a_shard_that_ends_early_or_is_gone_is_reported_by_name(samples: Samples) -> None:
    shard = samples.manifest.folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"train-000001\.tar: ends before byte \d+"):
        list(samples.read(range(10)))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: shard is missing"):
        list(samples.read(range(10)))


def test_a_label_outside_of_the_classes_is_refused(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", SPLITS, ["a", "b", "c"])
    rows = np.load(tmp_path / "data/val.index.npy")
    rows["label"][1] = 3
    np.save(tmp_path / "data/val.index.npy", rows)
    with pytest.raises(DataError, match=r"sample 1 has label 3, outside the 3 classes"):
        Samples.open(manifest, DataConfig())


def test_a_data_set_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no sample"):
        Samples.open(make_dataset(tmp_path / "data", {}, ["a", "b"]), DataConfig())


def test_labels_by_place_class_and_split(samples: Samples) -> None:
    labels = Labels(samples)
    assert [labels.of(place) for place in (0, 1, 10, 13)] == [[0], [1], [1], [2]]
    assert labels.text(13) == "c"
    assert labels.counts("train") == [4, 3, 3]
    assert labels.counts("val") == [0, 3, 0]
    assert labels.with_class(1, "train").tolist() == [1, 4, 7]
    assert labels.with_class(1, "val").tolist() == [10, 11, 12]
    assert labels.num_unlabelled("train") == 0


def test_several_labels_by_place_class_and_split(several: Samples) -> None:
    labels = Labels(several)
    assert [labels.of(place) for place in range(5)] == [[0, 2], [], [0, 2], [2], [0]]
    assert [labels.text(place) for place in (0, 1)] == ["x, z", "no label"]
    assert labels.counts("train") == [2, 0, 2]
    assert labels.with_class(2, "test").tolist() == [3]
    assert (labels.num_unlabelled("train"), labels.num_unlabelled("test")) == (1, 0)


def test_signatures_are_equal_where_the_labels_are(samples: Samples, several: Samples) -> None:
    assert Labels(samples).signatures().tolist() == [sample.label for sample in EVERY_SAMPLE]
    first, second, third, fourth, fifth = Labels(several).signatures().tolist()
    assert first == third
    assert len({first, second, fourth, fifth}) == 4
