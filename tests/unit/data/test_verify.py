import dataclasses
import tarfile
from pathlib import Path

import numpy as np

from pipeline.data.verify import num_files, verify_dataset
from pipeline.manifest import MANIFEST_NAME, DatasetManifest, IndexEntry, load_dataset, open_index
from tests.unit.test_manifest import relabel


def defects_by_file(manifest: DatasetManifest) -> dict[str, list[str]]:
    return {name: defects for name, defects in verify_dataset(manifest) if defects}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_whole_data_set_is_verified_file_by_file_without_a_defect(tiny_dataset: DatasetManifest) -> None:
    names = [name for name, _ in verify_dataset(tiny_dataset)]
    assert len(names) == num_files(tiny_dataset)
    assert sorted([*names[1:], MANIFEST_NAME]) == sorted(path.name for path in tiny_dataset.folder.iterdir())
    assert defects_by_file(tiny_dataset) == {}


def test_a_flipped_bit_in_an_image_is_found(copied_dataset: DatasetManifest) -> None:
    row = open_index(copied_dataset, "val")[6]  # the second sample of the second shard
    flip(copied_dataset.folder / "val-000001.tar", int(row["offset"]) + int(row["size"]) // 2)
    (defect,) = defects_by_file(copied_dataset).pop("val-000001.tar")
    assert defect.endswith("val-000001.tar: its sha256 is not the manifest's.")


def test_a_flipped_bit_in_a_label_is_found_and_its_sample_named(copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "test-000000.tar"
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".cls"))
    flip(path, member.offset_data)
    found = defects_by_file(load_dataset(copied_dataset.folder))
    assert found.keys() == {"test-000000.tar"}
    assert any(f"sample {member.name.removesuffix('.cls')} " in defect for defect in found["test-000000.tar"])


def test_a_flipped_bit_in_an_index_is_found(copied_dataset: DatasetManifest) -> None:
    flip(copied_dataset.folder / "train.index.npy", -1)  # the last label's highest byte
    found = defects_by_file(load_dataset(copied_dataset.folder))
    assert "its sha256 is not the manifest's" in found["train.index.npy"][0]
    assert "sample 35 has label" in found["train.index.npy"][1]


def test_an_index_that_disagrees_with_its_shards_is_found_though_its_digest_fits(copied_dataset: DatasetManifest) -> None:
    first = int(open_index(copied_dataset, "val")["label"][0])
    manifest = relabel(copied_dataset, "val", labels=[(first + 1) % 3])
    (defect,) = defects_by_file(manifest)["val-000000.tar"]
    assert "is not where or what the index says" in defect


def test_an_empty_index_is_a_defect_and_not_a_crash(copied_dataset: DatasetManifest) -> None:
    (copied_dataset.folder / "val.index.npy").write_bytes(b"")
    assert defects_by_file(copied_dataset).keys() == {"val.index.npy"}


def test_every_defect_is_named_and_none_ends_the_search(copied_dataset: DatasetManifest) -> None:
    folder = copied_dataset.folder
    (folder / "train-000000.tar").unlink()
    (folder / "train-000001.tar").write_bytes((folder / "train-000001.tar").read_bytes()[:2000])
    flip(folder / "train-000002.tar", 700)
    (folder / "val.index.npy").unlink()
    (folder / "train-000099.tar").write_bytes(b"x")
    found = defects_by_file(copied_dataset)
    assert sorted(found) == ["", "train-000000.tar", "train-000001.tar", "train-000002.tar", "val.index.npy"]
    assert "train-000099.tar: is a shard that the manifest does not know" in found[""][0]
    assert "is missing" in found["train-000000.tar"][0] and "is missing" in found["val.index.npy"][0]
    assert "bytes but the manifest says" in found["train-000001.tar"][0]


def test_any_number_of_processes_finds_the_same(copied_dataset: DatasetManifest) -> None:
    flip(copied_dataset.folder / "train-000002.tar", 700)
    (copied_dataset.folder / "test-000001.tar").unlink()
    alone, helped = (dict(verify_dataset(copied_dataset, workers)) for workers in (1, 3))
    assert alone == helped
    assert {name for name, defects in alone.items() if defects} == {"train-000002.tar", "test-000001.tar"}


def test_counts_that_are_not_those_of_the_index_are_found(copied_dataset: DatasetManifest) -> None:
    split = copied_dataset.split("val")
    wrong = dataclasses.replace(split, class_counts=[1, 2, 9])
    manifest = dataclasses.replace(copied_dataset, splits={**copied_dataset.splits, "val": wrong})
    assert (
        "counts [4, 4, 4] samples of the classes, but the manifest says [1, 2, 9]"
        in defects_by_file(manifest)["val.index.npy"][0]
    )


def test_label_rows_are_verified_too(copied_dataset: DatasetManifest) -> None:
    path = copied_dataset.folder / "val.labels.npy"
    np.save(path, np.full((12, 3), 2, np.uint8))
    split = dataclasses.replace(copied_dataset.split("val"), labels=IndexEntry(path.name, "0" * 64))
    manifest = dataclasses.replace(copied_dataset, splits={**copied_dataset.splits, "val": split})
    defects = defects_by_file(manifest)["val.labels.npy"]
    assert len(defects) == 3 and "sha256" in defects[0] and "other values than 0 and 1" in defects[1] and "counts" in defects[2]
