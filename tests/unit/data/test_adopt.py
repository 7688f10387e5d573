import dataclasses
import gzip
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.adopt import Adoption, adopt_shards, expand
from pipeline.data.dataset import ShardDataset
from pipeline.data.verify import verify_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, load_dataset, open_index, open_labels
from pipeline.preprocess import PreprocessSpec
from tests.unit.data.images import as_jpeg, as_png, noise
from tests.unit.data.test_shards import FORMATS, write_tar

Samples = dict[str, tuple[bytes, Any]]


def make_shard(path: Path, numbers: range, *, labels: str = "cls", form: str = "pax", key: str = "{:05d}") -> Samples:
    """A shard of random images; returns image bytes and label number by key."""
    samples, members = {}, {}
    for number in numbers:
        name, label = key.format(number), number % 3
        image = as_jpeg(noise(8, 8, number)) if number % 2 else as_png(noise(8, 8, number))
        members[f"{name}.{'jpg' if number % 2 else 'PNG'}"] = image
        if labels == "txt":
            members[f"{name}.txt"] = ["cat", "dog", "bird"][label].encode()
        elif labels == "json":
            members[f"{name}.json"] = json.dumps({"meta": {"id": label}}).encode()
        elif labels == "multi":
            members[f"{name}.json"] = json.dumps({"labels": ["cat", "dog"][: number % 3]}).encode()
        else:
            members[f"{name}.cls"] = str(label).encode()
        samples[name] = (image, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, members, FORMATS[form])
    return samples


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two shards to train on and one to validate, named as others name them."""
    folder = tmp_path / "foreign"
    make_shard(folder / "train-000.tar", range(10))
    make_shard(folder / "train-001.tar", range(10, 17))
    make_shard(folder / "val-000.tar", range(20, 26))
    return folder


def require_samples(manifest: DatasetManifest, split: str, samples: Samples, spec: PreprocessSpec) -> None:
    dataset = ShardDataset(load_dataset(manifest.folder), split, spec)
    found = {dataset.key(i): (dataset.encoded(i), int(dataset.rows[i]["label"])) for i in range(len(dataset))}
    assert found == samples
    assert [defect for _, defects in verify_dataset(manifest) for defect in defects] == []


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["{:05d}", "folder/" + "k" * 120 + "{}", "Käfer/{}"])
def test_shards_of_any_tar_are_adopted_byte_for_byte(form: str, key: str, tmp_path: Path, tiny_spec: PreprocessSpec) -> None:
    if form == "ustar" and "k" in key:
        key = "f" * 60 + "/" + "k" * 60 + "{}"
    samples = make_shard(tmp_path / "train-0.tar", range(9), form=form, key=key)
    manifest, made = adopt_shards(tmp_path, Adoption())
    assert made and manifest.class_names == ["0", "1", "2"]
    assert manifest.split("train").class_counts == [3, 3, 3]
    require_samples(manifest, "train", samples, tiny_spec)


def test_the_shards_of_the_webdataset_library_are_adopted_and_ours_are_read_by_it(
    tmp_path: Path, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset

    monkeypatch.setattr("webdataset.utils.enforce_security", False)  # its writer opens no local file otherwise
    samples: Samples = {}
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs/train-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(9):
            key = f"sub/{'long' * 40}-{number}"
            samples[key] = (as_jpeg(noise(8, 8, number)), number % 2)
            writer.write({"__key__": key, "jpg": samples[key][0], "cls": number % 2, "other.bin": b"x"})
    manifest, _ = adopt_shards(tmp_path / "theirs", Adoption())
    assert [shard.num_samples for shard in manifest.split("train").shards] == [4, 4, 1]
    require_samples(manifest, "train", samples, tiny_spec)

    ours = ShardDataset(tiny_dataset, "train", tiny_spec)
    paths = [str(tiny_dataset.folder / shard.name) for shard in tiny_dataset.split("train").shards]
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in read] == [
        (ours.key(i), ours.encoded(i), int(ours.rows[i]["label"])) for i in range(len(ours))
    ]


def test_splits_come_from_the_names_of_shards_or_their_folders(foreign: Path) -> None:
    manifest, _ = adopt_shards(foreign, Adoption())
    assert {name: [shard.name for shard in split.shards] for name, split in manifest.splits.items()} == {
        "train": ["train-000.tar", "train-001.tar"],
        "val": ["val-000.tar"],
    }
    for path, name in (("a/training/000.tar", "train"), ("a/Validation/000.tar", "val"), ("imagenet-val-0001.tar", "val")):
        shutil.rmtree(foreign)
        make_shard(foreign / path, range(5))
        assert list(adopt_shards(foreign, Adoption())[0].splits) == [name]


def test_patterns_say_what_names_do_not(foreign: Path) -> None:
    (foreign / "train-001.tar").rename(foreign / "more.tar")
    with pytest.raises(DataError, match=r"no split can be told from the names of more\.tar\. Say --train 'PATTERN'"):
        adopt_shards(foreign, Adoption())
    patterns = {"train": "train-{000..000}.tar,mo*.tar", "test": "val-000.tar"}
    manifest, _ = adopt_shards(foreign, Adoption(patterns))
    assert [shard.name for shard in manifest.split("train").shards] == ["train-000.tar", "more.tar"]
    assert list(manifest.splits) == ["train", "test"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"train": "nothing-*.tar"}, r"no file fits 'nothing-\*\.tar'"),
        ({"train": "train-{000..003}.tar"}, r"train-002\.tar: no such shard \(named for train\)"),
        ({"train": "train-*.tar", "val": "train-001.tar"}, r"train-001\.tar: is named for two splits, or twice for one"),
        ({"train": "train-{000.tar"}, "has unbalanced braces"),
        ({"train": "pipe:curl evil"}, "begins with pipe:, from which no shard is read"),
    ],
)
def test_patterns_that_cannot_work_are_refused(patterns: dict[str, str], message: str, foreign: Path) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        adopt_shards(foreign, Adoption(patterns))
    assert not (foreign / "dataset.json").exists()


def test_patterns_are_expanded_in_their_order(tmp_path: Path) -> None:
    assert expand(tmp_path, "b-{9..11}.tar,a.tar, c-{x,y}.tar") == [
        "b-9.tar",
        "b-10.tar",
        "b-11.tar",
        "a.tar",
        "c-x.tar",
        "c-y.tar",
    ]
    assert expand(tmp_path, "https://host/{00..01}.tar") == ["https://host/00.tar", "https://host/01.tar"]


def test_labels_may_be_names_and_classes_listed(tmp_path: Path, tiny_spec: PreprocessSpec) -> None:
    samples = make_shard(tmp_path / "train.tar", range(6), labels="txt")
    manifest, _ = adopt_shards(tmp_path, Adoption(label="txt"))
    assert manifest.class_names == ["bird", "cat", "dog"]
    require_samples(manifest, "train", {key: (image, [1, 2, 0][label]) for key, (image, label) in samples.items()}, tiny_spec)
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\nfish\n")
    manifest, _ = adopt_shards(tmp_path, Adoption(label="txt"), fresh=True)
    assert manifest.class_names == ["cat", "dog", "bird", "fish"]
    require_samples(manifest, "train", samples, tiny_spec)
    (tmp_path / "few.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"train\.tar: sample number 3 has the label 'bird', which is no class of 2"):
        adopt_shards(tmp_path, Adoption(label="txt", classes=tmp_path / "few.txt"), fresh=True)
    with pytest.raises(DataError, match=r"no\.txt: no such list of classes"):
        adopt_shards(tmp_path, Adoption(label="txt", classes=tmp_path / "no.txt"), fresh=True)


def test_labels_may_be_a_field_or_lists(tmp_path: Path, tiny_spec: PreprocessSpec) -> None:
    samples = make_shard(tmp_path / "one" / "train.tar", range(6), labels="json")
    manifest, _ = adopt_shards(tmp_path / "one", Adoption(label="json:meta.id"))
    require_samples(manifest, "train", samples, tiny_spec)
    make_shard(tmp_path / "many" / "train.tar", range(6), labels="multi")
    manifest, _ = adopt_shards(tmp_path / "many", Adoption(label="json:labels"))
    assert (manifest.task, manifest.class_names) == ("multi", ["cat", "dog"])
    assert open_labels(manifest, "train").tolist() == [[0, 0], [1, 0], [1, 1]] * 2
    assert open_index(manifest, "train")["label"].tolist() == [-1, 0, 0] * 2
    assert manifest.split("train").class_counts == [4, 2]
    assert [defect for _, defects in verify_dataset(manifest) for defect in defects] == []


def test_nothing_is_redone_and_nothing_overwritten_unasked(foreign: Path) -> None:
    first, made = adopt_shards(foreign, Adoption())
    again, made_again = adopt_shards(foreign, Adoption())
    assert (made, made_again, again.digest) == (True, False, first.digest)
    with pytest.raises(DataError, match=r"has a dataset\.json of other shards or settings\. Give --fresh"):
        adopt_shards(foreign, Adoption(image="jpg"))
    make_shard(foreign / "train-002.tar", range(30, 33))
    with pytest.raises(DataError, match="Give --fresh"):
        adopt_shards(foreign, Adoption())
    more, _ = adopt_shards(foreign, Adoption(), fresh=True)
    assert more.split("train").num_samples == 20
    assert [path.name for path in foreign.iterdir() if path.name.startswith("dataset.json.")]


def test_defective_shards_are_named_and_nothing_is_written(foreign: Path) -> None:
    content = (foreign / "train-001.tar").read_bytes()
    (foreign / "train-001.tar").write_bytes(content[: len(content) // 2])
    write_tar(foreign / "val-000.tar", {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"train-001\.tar: was cut short.* And 1 other shards are defective"):
        adopt_shards(foreign, Adoption())
    assert sorted(path.name for path in foreign.iterdir()) == ["train-000.tar", "train-001.tar", "val-000.tar"]


def test_the_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    members = {}
    for number, colour in enumerate([(0, 51, 255), (255, 51, 255)]):
        members[f"{number}.png"] = as_png(np.full((4, 4, 3), colour, np.uint8))
        members[f"{number}.cls"] = str(number).encode()
    members |= {"9.png": b"no image", "9.cls": b"1"}  # found when it is trained on, not here
    write_tar(tmp_path / "train.tar", members)
    stats = adopt_shards(tmp_path, Adoption())[0].image_stats
    assert (stats.split, stats.mean) == ("train", [0.5, 0.2, 1.0])
    assert stats.std == [0.5, round(1 / 255, 6), round(1 / 255, 6)]


def test_shards_to_be_streamed_are_named_and_not_read(foreign: Path) -> None:
    for path in foreign.glob("train-*.tar"):
        path.write_bytes(b"whatever")
    stream = "train-{000..001}.tar"
    manifest, _ = adopt_shards(foreign, Adoption(stream=stream))
    assert manifest.streams == {"train": ["train-000.tar", "train-001.tar"]}
    assert list(manifest.splits) == ["val"]
    assert manifest.image_stats.split == "val"
    assert load_dataset(foreign).streams == manifest.streams
    assert adopt_shards(foreign, Adoption(stream=stream))[1] is False
    assert dataclasses.replace(manifest, streams={}).content() != manifest.content()


def test_another_list_of_classes_is_not_passed_over(foreign: Path, tmp_path: Path) -> None:
    for names in ("cat dog bird", "dog cat bird"):
        (tmp_path / f"{names[:3]}.txt").write_text(names.replace(" ", "\n"))
    adopt_shards(foreign, Adoption(classes=tmp_path / "cat.txt"))
    assert not adopt_shards(foreign, Adoption(classes=tmp_path / "cat.txt"))[1]
    with pytest.raises(DataError, match="of other shards or settings"):
        adopt_shards(foreign, Adoption(classes=tmp_path / "dog.txt"))


def test_names_that_are_numbers_are_adopted(tmp_path: Path) -> None:
    members = {f"{number}.jpg": as_jpeg(noise(8, 8, number)) for number in range(4)}
    members |= {f"{number}.txt": label for number, label in enumerate((b"1984", b"cat", b"2001", b"cat"))}
    write_tar(tmp_path / "train-0.tar", dict(sorted(members.items())), FORMATS["pax"])
    (tmp_path / "classes.txt").write_text("cat\n1984\n2001\n")
    manifest, _ = adopt_shards(tmp_path, Adoption(label="txt"))
    assert open_index(manifest, "train")["label"].tolist() == [1, 0, 2, 0]


def test_what_lies_beside_the_samples_is_passed_over(tmp_path: Path, tiny_spec: PreprocessSpec) -> None:
    samples = make_shard(tmp_path / "whole/train-0.tar", range(3))
    with tarfile.open(tmp_path / "whole/train-0.tar") as tar:
        members = {member.name: content.read() for member in tar if (content := tar.extractfile(member))}
    (tmp_path / "mixed").mkdir()
    mixed = {"README.md": b"hello", "._00000.jpg": b"macOS", **members, "notes.json": b"{}"}
    write_tar(tmp_path / "mixed/train-0.tar", mixed, FORMATS["pax"])
    require_samples(adopt_shards(tmp_path / "mixed", Adoption())[0], "train", samples, tiny_spec)


def test_a_sample_without_a_known_image_says_what_it_has(tmp_path: Path) -> None:
    members = {"a.left.jpg": as_jpeg(noise(8, 8, 0)), "a.cls": b"0"}
    write_tar(tmp_path / "train-0.tar", members, FORMATS["pax"])
    with pytest.raises(DataError, match=r"sample a lacks its image: it has \.left\.jpg, \.cls \(`--image` and `--label`"):
        adopt_shards(tmp_path, Adoption())


def test_a_folder_of_compressed_shards_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(b"x" * 1024))
    with pytest.raises(DataError, match=r"train-0\.tar\.gz: is compressed \(gzip\).*Decompress it"):
        adopt_shards(tmp_path, Adoption())


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shard that could be indexed"):
        adopt_shards(tmp_path, Adoption())
    with pytest.raises(DataError, match="no such folder of shards"):
        adopt_shards(tmp_path / "nowhere", Adoption())
    make_shard(tmp_path / "train.tar", range(0, 3, 3))
    with pytest.raises(DataError, match=r"has 1 classes \(0\); at least 2 are needed"):
        adopt_shards(tmp_path, Adoption())
