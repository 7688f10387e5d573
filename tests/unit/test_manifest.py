import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.files import digest_of, sha256_of
from pipeline.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    ImageStats,
    load_dataset,
    open_index,
    read_versioned_json,
    require_labels,
)

Edit = Callable[[dict[str, Any]], Any]


def edit_json(folder: Path, edit: Edit) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def relabel(manifest: DatasetManifest, split: str, labels: list[int]) -> DatasetManifest:
    """Write labels into a split's index and make the manifest agree, as a faulty tool would."""
    entry = manifest.splits[split]
    path = manifest.folder / entry.index.name
    rows = np.load(path)
    rows["label"][: len(labels)] = labels
    np.save(path, rows)
    index = dataclasses.replace(entry.index, sha256=sha256_of(path))
    splits = {**manifest.splits, split: dataclasses.replace(entry, index=index)}
    return dataclasses.replace(manifest, splits=splits).save()


# ---- the manifest ----


def test_a_manifest_that_was_saved_is_loaded_as_it_was(tiny_dataset: DatasetManifest) -> None:
    assert load_dataset(tiny_dataset.folder) == tiny_dataset


def test_the_digest_covers_everything_but_itself_and_what_differs_between_machines(tiny_dataset: DatasetManifest) -> None:
    others: dict[str, Any] = {
        "task": "binary",
        "class_names": ["a", "b", "c"],
        "splits": {**tiny_dataset.splits, "more": tiny_dataset.splits["val"]},
        "image_stats": ImageStats("train", [0.0] * 3, [1.0] * 3),
        "preparation": {},
        "info": {},
        "digest": "other",
        "format_version": 0,
        "streams": {"train": ["https://host/0.tar"]},
        "folder": Path("elsewhere"),
        "url": "s3://bucket/elsewhere",
    }
    assert others.keys() == {item.name for item in dataclasses.fields(DatasetManifest)}
    before = digest_of(tiny_dataset.content())
    assert before == tiny_dataset.digest
    digests = {name: digest_of(dataclasses.replace(tiny_dataset, **{name: value}).content()) for name, value in others.items()}
    same = {name for name, digest in digests.items() if digest == before}
    assert same == {"digest", "info", "folder", "url"}


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["class_names"].reverse(),
        lambda values: values["splits"]["train"]["shards"][0].update(sha256="0" * 64),
        lambda values: values["splits"]["val"]["class_counts"].reverse() or values["splits"]["val"]["class_counts"].append(1),
        lambda values: values["image_stats"]["mean"].reverse(),
        lambda values: values["splits"].pop("test"),
        lambda values: values.update(digest="0" * 64),
    ],
)
def test_a_manifest_that_was_edited_by_hand_is_refused(edit: Edit, copied_dataset: DatasetManifest) -> None:
    edit_json(copied_dataset.folder, edit)
    with pytest.raises(DataError, match=r"dataset\.json: was edited: its digest does not fit its content.*--fresh"):
        load_dataset(copied_dataset.folder)


def test_what_differs_between_machines_may_differ(copied_dataset: DatasetManifest) -> None:
    edit_json(copied_dataset.folder, lambda values: values["info"].update(source="/another/folder"))
    assert load_dataset(copied_dataset.folder).digest == copied_dataset.digest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.update(format_version=99), r"format_version 99 is newer than 1, which this .* Upgrade it"),
        (lambda values: values.pop("format_version"), r"has no format_version; it was not written by Shardline"),
        (lambda values: values.pop("splits"), r"not a data set manifest \('splits'\)"),
        (lambda values: values.pop("digest"), r"not a data set manifest \(.*'digest'\)"),
        (lambda values: values.update(splits=[]), r"not a data set manifest"),
        (lambda values: values.update(colour=1), r"not a data set manifest \(.*'colour'\)"),
        (lambda values: values["splits"]["val"]["shards"][0].pop("sha256"), r"not a data set manifest \(.*'sha256'\)"),
    ],
)
def test_a_manifest_of_another_form_is_refused_by_name(edit: Edit, message: str, copied_dataset: DatasetManifest) -> None:
    edit_json(copied_dataset.folder, edit)
    with pytest.raises(DataError, match=rf"dataset\.json: {message}"):
        load_dataset(copied_dataset.folder)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[1]", "has no format_version")]
)
def test_a_file_that_is_no_json_object_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"dataset\.json: {message}"):
        read_versioned_json(tmp_path / "dataset.json")


def test_a_folder_without_a_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set there \(no dataset\.json\)\. Make it with `shardline shard`"):
        load_dataset(tmp_path)


def test_a_truncated_shard_is_reported_by_name(copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "train-000002.tar"
    num_bytes = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"train-000002\.tar: holds {num_bytes - 1} bytes but the manifest says {num_bytes}\."):
        load_dataset(copied_dataset.folder)


@pytest.mark.parametrize(("name", "what"), [("test-000001.tar", "shard is missing"), ("val.index.npy", "index is missing")])
def test_a_missing_file_is_reported_by_name(name: str, what: str, copied_dataset: DatasetManifest) -> None:
    (copied_dataset.folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: {what}"):
        load_dataset(copied_dataset.folder)


def test_an_unknown_split_is_refused_with_the_known_ones(tiny_dataset: DatasetManifest) -> None:
    with pytest.raises(DataError, match=r"has no `dev` split \(it has train, val, test\)"):
        tiny_dataset.split("dev")


def test_final_figures_are_taken_on_validation_only_where_there_is_no_test(tiny_dataset: DatasetManifest) -> None:
    without = dataclasses.replace(tiny_dataset, splits={"train": tiny_dataset.split("train"), "val": tiny_dataset.split("val")})
    assert (tiny_dataset.evaluation_split, without.evaluation_split) == ("test", "val")


# ---- the index ----


def test_the_index_says_where_each_image_lies_in_its_shard(tiny_dataset: DatasetManifest) -> None:
    rows = open_index(tiny_dataset, "train")
    assert len(rows) == 36
    assert np.bincount(rows["label"]).tolist() == tiny_dataset.split("train").class_counts == [12, 12, 12]
    for row in rows:
        shard = (tiny_dataset.folder / f"train-{row['shard']:06d}.tar").read_bytes()
        encoded = shard[row["offset"] : row["offset"] + row["size"]]
        assert encoded.startswith(b"\xff\xd8")  # a JPEG's first
        assert encoded.endswith(b"\xff\xd9")  # and last bytes


def test_an_index_of_another_length_is_refused(copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "train.index.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match=r"train\.index\.npy: holds \(35,\) rows of .* but the manifest says 36 samples"):
        open_index(copied_dataset, "train")


@pytest.mark.parametrize("num_bytes", [0, 100, 200])
def test_an_index_that_was_cut_short_is_refused_by_name(num_bytes: int, copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "train.index.npy"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=r"train\.index\.npy: not an index"):
        open_index(copied_dataset, "train")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_refused_with_its_sample(label: int, copied_dataset: DatasetManifest) -> None:
    manifest = relabel(copied_dataset, "val", labels=[0, label])
    with pytest.raises(DataError, match=rf"val\.index\.npy: sample 1 has label {label}, outside the 3 classes \(0 to 2\)"):
        require_labels(manifest, "val")
