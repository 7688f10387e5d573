import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.dataset import ShardDataset
from pipeline.data.merge import merge_datasets
from pipeline.data.order import GlobalBatchSampler
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, ImageStats, load_dataset, open_index, open_labels
from pipeline.preprocess import PreprocessSpec


def relabelled(manifest: DatasetManifest, class_names: list[str], folder: Path) -> DatasetManifest:
    """A copy of a data set in which class number k is called `class_names[k]`."""
    shutil.copytree(manifest.folder, folder)
    return dataclasses.replace(manifest, class_names=class_names, folder=folder).save()


def entries(*members: tuple[DatasetManifest, float]) -> list[dict[str, Any]]:
    return [{"path": str(manifest.folder), "weight": weight} for manifest, weight in members]


@pytest.fixture
def other(tiny_dataset: DatasetManifest, tmp_path: Path) -> DatasetManifest:
    """The tiny data set (blue, green, red) with its classes called by other colours of the same list."""
    return relabelled(tiny_dataset, ["red", "blue", "green"], tmp_path / "other")


def test_labels_are_translated_by_class_name_and_images_stay_where_they_are(
    tiny_dataset: DatasetManifest, other: DatasetManifest, tiny_spec: PreprocessSpec, tmp_path: Path
) -> None:
    merged, made = merge_datasets(entries((tiny_dataset, 1.0), (other, 1.0)), tmp_path / "merged", tmp_path)
    assert made and merged.class_names == ["blue", "green", "red"]
    assert sorted(path.name for path in merged.folder.iterdir()) == [
        "dataset.json",
        *(f"{split}.index.npy" for split in ("test", "train", "val")),
    ]
    for split, number in (("train", 36), ("val", 12), ("test", 12)):
        dataset = ShardDataset(load_dataset(merged.folder), split, tiny_spec)
        assert len(dataset) == 2 * number
        for place, (manifest, index) in enumerate(itertools.product((tiny_dataset, other), range(number))):
            source = ShardDataset(manifest, split, tiny_spec)
            assert dataset.encoded(place) == source.encoded(index)
            assert dataset.key(place) == source.key(index)
            assert merged.class_names[dataset.rows[place]["label"]] == manifest.class_names[source.rows[index]["label"]]
    assert merged.split("train").class_counts == [24, 24, 24]


def test_weights_decide_what_an_epoch_draws_and_not_what_an_evaluation_sees(
    tiny_dataset: DatasetManifest, other: DatasetManifest, tmp_path: Path
) -> None:
    merged, _ = merge_datasets(entries((tiny_dataset, 2), (other, 0.5)), tmp_path / "merged", tmp_path)
    train = merged.split("train")
    assert (train.num_samples, train.samples_per_epoch) == (72, 72 + 18)
    batches = GlobalBatchSampler.of_training(train.shards, DataConfig(global_batch_size=10, drop_last=False), seed=1)
    drawn = np.bincount([ref.sample_index for batch in batches for ref in batch if ref.weight], minlength=72)
    assert drawn[:36].tolist() == [2] * 36
    assert sorted(drawn[36:].tolist()) == [0] * 18 + [1] * 18
    assert merged.split("val").samples_per_epoch == merged.split("val").num_samples == 24


def test_a_data_set_may_lack_classes_of_the_first(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    more = relabelled(tiny_dataset, ["ant", "green", "red"], tmp_path / "more")
    more = dataclasses.replace(more, class_names=["ant", "green", "red", "blue"]).save()
    merged, _ = merge_datasets(entries((more, 1), (tiny_dataset, 1)), tmp_path / "merged", tmp_path)
    assert merged.class_names == ["ant", "green", "red", "blue"]
    assert merged.split("train").class_counts == [12, 24, 24, 12]


def test_classes_that_do_not_fit_are_shown_side_by_side(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    strange = relabelled(tiny_dataset, ["blue", "green", "crimson"], tmp_path / "strange")
    message = r"strange: has the classes \['blue', 'green', 'crimson'\], .* has \['blue', 'green', 'red'\]; crimson is unknown"
    with pytest.raises(DataError, match=message):
        merge_datasets(entries((tiny_dataset, 1), (strange, 1)), tmp_path / "merged", tmp_path)
    assert not (tmp_path / "merged").exists()


def test_data_sets_of_different_tasks_are_not_merged(
    tiny_dataset: DatasetManifest, other: DatasetManifest, tmp_path: Path
) -> None:
    multi = dataclasses.replace(other, task="multi").save()
    with pytest.raises(DataError, match=r"other: its task is `multi` but that of .* is `single`"):
        merge_datasets(entries((tiny_dataset, 1), (multi, 1)), tmp_path / "merged", tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1}, r"holds \{'weight': 1\}; each entry is \{path: FOLDER, weight: NUMBER\}"),
        ({"path": "x", "wieght": 1}, "each entry is"),
        ({"path": "x", "weight": "2"}, "each entry is"),
        ({"path": "x", "weight": 0}, "the weight of x is 0; it must be greater than 0"),
        ({"path": "x", "weight": float("nan")}, "it must be greater than 0"),
    ],
)
def test_an_entry_of_another_form_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_datasets([entry], tmp_path / "merged", tmp_path)


def test_a_data_set_is_merged_once(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is given twice. Give it once, with weight 2".replace(".", r"\.")):
        merge_datasets(entries((tiny_dataset, 1), (tiny_dataset, 1)), tmp_path / "merged", tmp_path)


def test_nothing_is_redone_until_a_member_or_a_weight_changes(
    tiny_dataset: DatasetManifest, other: DatasetManifest, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    first, _ = merge_datasets(entries((tiny_dataset, 1), (other, 1)), folder, tmp_path)
    again, made = merge_datasets(entries((tiny_dataset, 1), (other, 1)), folder, tmp_path)
    assert (again.digest, made) == (first.digest, False)
    changed, made = merge_datasets(entries((tiny_dataset, 1), (other, 3)), folder, tmp_path)
    assert made and changed.digest != first.digest
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()].count("merged") == 2  # the earlier one is kept


def test_a_folder_of_something_else_is_left_alone(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"merged: is not a data set and not empty"):
        merge_datasets(entries((tiny_dataset, 1)), tmp_path / "merged", tmp_path)


def test_label_rows_of_several_labels_are_translated_too(
    tiny_dataset: DatasetManifest, other: DatasetManifest, tmp_path: Path
) -> None:
    members = []
    for number, manifest in enumerate((relabelled(tiny_dataset, tiny_dataset.class_names, tmp_path / "one"), other)):
        splits = {}
        for name, split in manifest.splits.items():
            rows = np.random.default_rng(number).integers(0, 2, (split.num_samples, 3), dtype=np.uint8)
            np.save(manifest.folder / f"{name}.labels.npy", rows)
            splits[name] = dataclasses.replace(split, labels=dataclasses.replace(split.index, name=f"{name}.labels.npy"))
        members.append(dataclasses.replace(manifest, task="multi", splits=splits).save())
    merged, _ = merge_datasets(entries((members[0], 1), (members[1], 1)), tmp_path / "merged", tmp_path)
    labels = open_labels(load_dataset(merged.folder), "val")
    assert np.array_equal(labels[:12], open_labels(members[0], "val"))
    # red, blue, green of the second are columns 2, 0, 1 of the first.
    assert np.array_equal(labels[12:, [2, 0, 1]], open_labels(members[1], "val"))
    assert merged.split("val").class_counts == labels.sum(axis=0).tolist()
    assert len(open_index(merged, "val")) == 24


def test_the_statistics_are_those_of_all_samples_together(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    dark = ImageStats("train", [0.2] * 3, [0.1] * 3)
    light = ImageStats("train", [0.8] * 3, [0.1] * 3)
    members = []
    for name, stats in (("dark", dark), ("light", light)):
        copy = relabelled(tiny_dataset, tiny_dataset.class_names, tmp_path / name)
        members.append((dataclasses.replace(copy, image_stats=stats).save(), 1.0))
    merged, _ = merge_datasets(entries(*members), tmp_path / "merged", tmp_path)
    assert merged.image_stats.mean == [0.5] * 3
    assert merged.image_stats.std == [0.316228] * 3  # sqrt(0.1^2 + 0.3^2)


def test_a_member_that_was_written_anew_is_merged_anew(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    member = relabelled(tiny_dataset, tiny_dataset.class_names, tmp_path / "member")
    merge_datasets(entries((member, 2.0)), tmp_path / "merged", tmp_path)
    shard = member.split("train").shards[0]
    (member.folder / shard.name).write_bytes((member.folder / shard.name).read_bytes() + bytes(10240))
    train = member.split("train")
    larger = dataclasses.replace(shard, num_bytes=shard.num_bytes + 10240)
    splits = member.splits | {"train": dataclasses.replace(train, shards=[larger, *train.shards[1:]])}
    member = dataclasses.replace(member, splits=splits).save()
    merged, made = merge_datasets(entries((member, 2.0)), tmp_path / "merged", tmp_path)
    assert made and merged.split("train").shards[0].num_bytes == larger.num_bytes


def test_a_merge_is_the_same_data_set_wherever_its_folder_lies(tiny_dataset: DatasetManifest, tmp_path: Path) -> None:
    merged = [merge_datasets(entries((tiny_dataset, 1.0)), tmp_path / place, tmp_path)[0] for place in ("here", "a/b/there")]
    assert merged[0].digest == merged[1].digest
    assert load_dataset(tmp_path / "a/b/there").digest == merged[1].digest
