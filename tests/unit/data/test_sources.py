import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageSource, open_source
from pipeline.errors import DataError
from tests.unit.conftest import ImageFolder


@pytest.fixture
def folder(image_folder: ImageFolder, tmp_path: Path) -> Path:
    """Two classes of three images."""
    return image_folder(tmp_path / "source", {"red": 3, "blue": 3})


def opened(path: Path | str, class_level: int | None = None) -> ImageSource:
    return open_source(DatasetConfig(source=str(path), class_level=class_level))


def listed(path: Path | str, class_level: int | None = None) -> dict[str, str]:
    """Class and split of each image, by its name: `cat`, or `cat in val`."""
    source = opened(path, class_level)
    return {
        image.name: source.class_names[image.labels[0]] + (f" in {image.split}" if image.split else "")
        for image in source.images()
    }


def images_at(root: Path, *names: str) -> Path:
    """Files that listing takes for images."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_each_folder_is_a_class_in_alphabetical_order(folder: Path) -> None:
    source = opened(folder)
    assert (source.kind, source.task, source.class_names) == ("folder", "single", ["blue", "red"])
    assert [(image.name, image.labels, image.split) for image in source.images()] == [
        *((f"blue/{number:02d}.png", (0,), None) for number in range(3)),
        *((f"red/{number:02d}.png", (1,), None) for number in range(3)),
    ]
    assert source.read("red/01.png") == (folder / "red" / "01.png").read_bytes()
    assert source.num_ignored == 0


def test_files_that_are_no_images_are_ignored_and_counted(folder: Path) -> None:
    for name in ("Thumbs.db", "notes.txt", ".hidden.png"):
        (folder / "red" / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "picture.png").write_bytes(b"x")
    (folder / "readme.md").write_text("x")
    (folder / "loose.png").write_bytes(b"x")  # of no class
    shutil.copy(folder / "red" / "00.png", folder / "red" / "03.PNG")
    source = opened(folder)
    assert len(list(source.images())) == 7
    assert source.num_ignored == 6
    assert len(list(source.images())) == 7 and source.num_ignored == 6  # counted anew


def test_images_in_a_hidden_folder_of_a_class_are_ignored_and_counted(folder: Path) -> None:
    # Jupyter keeps copies in such folders: one half of a pair in train and the other in test would flatter the accuracy.
    hidden = folder / "red" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(folder / "red" / "00.png", hidden / "00-checkpoint.png")
    source = opened(folder)
    assert len(list(source.images())) == 6
    assert source.num_ignored == 1


def test_a_class_is_the_topmost_folder_that_holds_images(tmp_path: Path) -> None:
    images_at(tmp_path, "animals/cat/1.jpg", "animals/cat/2024/x/2.jpg", "animals/dog/1.jpg", "things/outside/car/1.jpg")
    assert listed(tmp_path) == {
        "animals/cat/1.jpg": "cat",
        "animals/cat/2024/x/2.jpg": "cat",
        "animals/dog/1.jpg": "dog",
        "things/outside/car/1.jpg": "car",
    }


def test_another_level_can_name_the_classes(tmp_path: Path) -> None:
    images_at(tmp_path, "cat/2023/1.jpg", "cat/2024/1.jpg", "dog/2024/1.jpg", "dog/2.jpg")
    assert set(listed(tmp_path, 1).values()) == {"cat", "dog"}
    source = opened(tmp_path, 2)
    assert source.class_names == ["2023", "cat/2024", "dog/2024"]
    assert len(list(source.images())) == 3 and source.num_ignored == 1


def test_class_folders_of_one_name_are_called_by_their_path(tmp_path: Path) -> None:
    images_at(tmp_path, "animals/bat/1.jpg", "sports/bat/1.jpg", "sports/ball/1.jpg")
    assert opened(tmp_path).class_names == ["animals/bat", "ball", "sports/bat"]


@pytest.mark.parametrize(
    ("pattern", "splits"),
    [
        ("{split}/{name}/1.jpg", ("train", "val", "test")),
        ("images/{split}/{name}/1.jpg", ("Training", "valid", "TEST")),
        ("{name}/{split}/1.jpg", ("train", "validation", "testing")),
        ("a/{name}/{split}/1.jpg", ("train", "dev", "test")),
    ],
)
def test_a_level_of_split_folders_names_the_split_wherever_it_is(
    pattern: str, splits: tuple[str, str, str], tmp_path: Path
) -> None:
    for split in splits:
        images_at(tmp_path, *(pattern.format(split=split, name=name) for name in ("cat", "dog")))
    assert opened(tmp_path).class_names == ["cat", "dog"]
    for plain, split in zip(("train", "val", "test"), splits, strict=True):
        assert listed(tmp_path)[pattern.format(split=split, name="dog")] == f"dog in {plain}"


def test_a_class_called_test_is_a_class_beside_others(tmp_path: Path) -> None:
    images_at(tmp_path, "test/1.jpg", "exam/1.jpg")
    assert listed(tmp_path) == {"exam/1.jpg": "exam", "test/1.jpg": "test"}


def test_images_beside_the_class_folders_of_a_split_belong_to_no_class(tmp_path: Path) -> None:
    images_at(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "train/loose.jpg")
    source = opened(tmp_path)
    assert len(list(source.images())) == 2 and source.num_ignored == 1


@pytest.mark.parametrize("name", ["with space", "Käfer", "漢字", "line\nbreak", os.fsdecode(b"latin-\xe4")])
def test_names_of_any_letters_work(name: str, tmp_path: Path) -> None:
    images_at(tmp_path, f"{name}/{name}.jpg", "other/1.jpg")
    assert listed(tmp_path)[f"{name}/{name}.jpg"] == name.replace("\udce4", r"\udce4")  # a class is called by text
    assert opened(tmp_path).read(f"{name}/{name}.jpg") == b"x"


def test_a_link_to_a_folder_above_does_not_go_round_for_ever(folder: Path) -> None:
    (folder / "red" / "again").symlink_to(folder)
    (folder / "green").symlink_to(folder / "blue")  # a link to another folder is a folder
    assert opened(folder).class_names == ["blue", "green", "red"]
    assert len(listed(folder)) < 30


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no folder with images; put the images of each class into a folder of its own"),
        (["1.jpg"], "holds no folder with images"),
        (["cat/1.jpg", "cat/sub/2.jpg"], r"holds 1 class folders \(images lie in cat, cat/sub\); at least 2 are needed"),
        (["train/cat/1.jpg"], r"holds 1 class folders \(images lie in train/cat\)"),
    ],
)
def test_a_folder_without_two_classes_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    images_at(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_a_class_level_without_two_classes_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 class folders at `dataset.class_level` 4 .* say with --dataset\.class_level"):
        opened(folder, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such folder. `dataset.source` is `digits`"),
        ("notes.txt", "is neither a table .* nor an archive"),
    ],
)
def test_what_is_no_source_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_a_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root may read everything, so modes alone would show nothing here
        if Path(path).name == "red":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("pipeline.data.sources.os.scandir", refuse)
    with pytest.raises(DataError, match=r"red: the folder cannot be read \(Permission denied\)\. Change its owner or mode"):
        opened(folder)


def test_an_image_that_changes_has_other_facts(folder: Path) -> None:
    def facts() -> set[tuple[str, tuple[int, int]]]:
        return {(image.name, image.facts) for image in opened(folder).images()}

    before = facts()
    assert facts() == before
    path = folder / "red" / "00.png"
    os.utime(path, ns=(1, 1))
    assert len(facts() - before) == 1
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(1, 1))
    assert {size for name, (size, _) in facts() - before if name == "red/00.png"} == {path.stat().st_size}


def test_the_digits_are_all_there() -> None:
    source = opened("digits")
    images = list(source.images())
    assert (len(images), source.class_names) == (1797, [str(digit) for digit in range(10)])
    assert images[5].name == "digit-0005"
    assert source.read("digit-0005").startswith(b"\x89PNG")
    assert dataclasses.asdict(images[0])["labels"] == (0,)


def test_links_that_lead_nowhere_are_listed_so_that_they_are_rejected_by_name(folder: Path) -> None:
    (folder / "red" / "loop.png").symlink_to("loop.png")
    (folder / "red" / "gone.png").symlink_to("/nowhere/gone.png")
    source = opened(folder)
    found = {image.name: image.facts for image in source.images()}
    assert len(found) == 8
    assert found["red/loop.png"] == found["red/gone.png"] == (0, 0)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        source.read("red/loop.png")
    with pytest.raises(FileNotFoundError):
        source.read("red/gone.png")


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test", "valid")])
def test_folders_of_which_only_some_name_splits_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    images_at(tmp_path, *(f"{split}/{kind}/1.jpg" for split in names for kind in ("cat", "dog")), "extra/1.jpg")
    with pytest.raises(DataError, match=r"images lie in \w+, .*which name splits, and beside them in extra\. Move that out"):
        opened(tmp_path)
    assert len(opened(tmp_path, class_level=1).class_names) == len(names) + 1


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    images_at(tmp_path, "train/1.jpg", "bus/1.jpg", "car/1.jpg")
    assert opened(tmp_path).class_names == ["bus", "car", "train"]
