import os
import shutil
from pathlib import Path

import pytest

from pipeline.data.sources import open_source
from pipeline.errors import DataError
from tests.unit.conftest import ImageFolder


@pytest.fixture
def folder(image_folder: ImageFolder, tmp_path: Path) -> Path:
    """Two classes of three images."""
    return image_folder(tmp_path / "source", {"red": 3, "blue": 3})


def names_of(folder: Path) -> list[str]:
    return [image.name for image in open_source(str(folder)).images]


def test_each_folder_is_a_class_in_alphabetical_order(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.class_names == ["blue", "red"]
    assert [(image.name, image.label) for image in source.images] == [
        *((f"blue/{number:02d}.png", 0) for number in range(3)),
        *((f"red/{number:02d}.png", 1) for number in range(3)),
    ]
    assert source.images[4].read() == (folder / "red" / "01.png").read_bytes()
    assert source.num_ignored == 0


def test_images_in_deeper_folders_belong_to_their_class(folder: Path) -> None:
    deeper = folder / "red" / "2024" / "x"
    deeper.mkdir(parents=True)
    (folder / "red" / "00.png").rename(deeper / "00.png")
    assert "red/2024/x/00.png" in names_of(folder)


def test_files_that_are_no_images_are_ignored_and_counted(folder: Path) -> None:
    before = names_of(folder)
    for name in ("Thumbs.db", "notes.txt", ".hidden.png"):
        (folder / "red" / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    shutil.copy(folder / "red" / "00.png", folder / "red" / "03.PNG")
    source = open_source(str(folder))
    assert [image.name for image in source.images] == [*before, "red/03.PNG"]
    assert source.num_ignored == 3


def test_images_in_a_hidden_folder_of_a_class_are_ignored_and_counted(folder: Path) -> None:
    # Jupyter keeps copies in such folders: one half of a pair in train and the other in test would flatter the accuracy.
    hidden = folder / "red" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(folder / "red" / "00.png", hidden / "00-checkpoint.png")
    source = open_source(str(folder))
    assert len(source.images) == 6
    assert source.num_ignored == 1


def test_images_beside_the_class_folders_are_counted_as_ignored(folder: Path) -> None:
    shutil.copy(folder / "red" / "00.png", folder / "forgotten.png")
    source = open_source(str(folder))
    assert len(source.images) == 6
    assert source.num_ignored == 1


def test_names_in_any_script_are_read(folder: Path) -> None:
    (folder / "red").rename(folder / "красный")
    (folder / "красный" / "00.png").rename(folder / "красный" / "猫 é.png")
    source = open_source(str(folder))
    assert source.class_names == ["blue", "красный"]
    assert "красный/猫 é.png" in [image.name for image in source.images]


def test_folders_that_look_like_splits_are_refused_before_they_become_classes(folder: Path) -> None:
    (folder / "red").rename(folder / "Train")
    (folder / "blue").rename(folder / "val")
    with pytest.raises(DataError, match=r"its folders \(Train, val\) look like splits, not classes"):
        open_source(str(folder))


def test_a_class_that_is_called_test_is_a_class_beside_others(folder: Path) -> None:
    (folder / "red").rename(folder / "test")
    assert open_source(str(folder)).class_names == ["blue", "test"]


def test_one_class_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "red")
    with pytest.raises(DataError, match=r"source: holds 1 class folders; at least 2 are needed"):
        open_source(str(folder))


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder\. `dataset\.source` is `digits` or a folder"):
        open_source(str(tmp_path / "nowhere"))


def test_the_home_folder_can_be_written_as_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source("~/source").class_names == ["blue", "red"]


def test_the_fingerprint_changes_when_an_image_is_added_removed_or_rewritten(folder: Path) -> None:
    seen = [open_source(str(folder)).fingerprint]
    assert open_source(str(folder)).fingerprint == seen[0]
    shutil.copy(folder / "red" / "00.png", folder / "red" / "new.png")
    seen.append(open_source(str(folder)).fingerprint)
    (folder / "blue" / "00.png").unlink()
    seen.append(open_source(str(folder)).fingerprint)
    os.utime(folder / "blue" / "01.png", ns=(1, 1))  # as after a rewrite of the same length
    seen.append(open_source(str(folder)).fingerprint)
    assert len(set(seen)) == 4
