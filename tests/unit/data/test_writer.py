import dataclasses
import errno
import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data.sources import ImageSource, LabelledImage, open_source
from pipeline.data.writer import prepare_dataset, split_images, write_dataset
from pipeline.errors import DataError, ShardlineError
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest, load_dataset, open_index, read_shard_rows, verify_dataset
from tests.unit.conftest import TINY_SPLIT, ImageFolder


def settings(source: Path, **changes: Any) -> DatasetConfig:
    return dataclasses.replace(TINY_SPLIT, source=str(source), **changes)


def write(source: Path, folder: Path, **changes: Any) -> DatasetManifest:
    return write_dataset(open_source(str(source)), settings(source, **changes), folder)


def sha256_by_name(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.name != "dataset.json"}


def images_by_key(manifest: DatasetManifest, split: str) -> dict[str, bytes]:
    """The encoded image of every sample of a split, by the file name that ends its key."""
    found = {}
    for shard in manifest.split(split).shards:
        content = (manifest.folder / shard.name).read_bytes()
        for key, offset, size, _ in read_shard_rows(manifest.folder / shard.name):
            found[key.split("-", 1)[1]] = content[offset : offset + size]
    return found


@pytest.fixture
def folder(image_folder: ImageFolder, tmp_path: Path) -> Path:
    """Two classes of five images."""
    return image_folder(tmp_path / "source", {"red": 5, "blue": 5})


# ---- the same bytes every time ----


def test_the_same_images_give_the_same_bytes_in_every_file(
    tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path
) -> None:
    again = write(tiny_source, tmp_path / "again")
    assert len(sha256_by_name(again.folder)) == 17  # 8 + 3 + 3 shards and 3 indices
    assert sha256_by_name(again.folder) == sha256_by_name(tiny_dataset.folder)
    assert again.digest == tiny_dataset.digest


def test_a_copy_of_the_images_elsewhere_and_later_gives_the_same_digest(
    tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_source, tmp_path / "copy", copy_function=shutil.copyfile)
    manifest = write(copied, tmp_path / "again")
    assert manifest.info["source_fingerprint"] != tiny_dataset.info["source_fingerprint"]
    assert manifest.digest == tiny_dataset.digest


def test_a_tar_says_nothing_of_who_wrote_it_and_when(tiny_dataset: DatasetManifest) -> None:
    with tarfile.open(tiny_dataset.folder / "train-000000.tar") as tar:
        facts = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar}
    assert facts == {(0, 0, 0, "", "")}


def test_another_seed_gives_another_split_and_another_digest(
    tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path
) -> None:
    other = write(tiny_source, tmp_path / "other", split_seed=1)
    assert other.digest != tiny_dataset.digest
    assert other.split("train").class_counts == tiny_dataset.split("train").class_counts
    assert (
        sha256_by_name(other.folder)
        .items()
        .isdisjoint((name, sha256) for name, sha256 in sha256_by_name(tiny_dataset.folder).items() if name.endswith(".tar"))
    )


def test_a_data_set_is_whole_as_soon_as_it_is_written(tiny_dataset: DatasetManifest) -> None:
    assert [entry for _, defects in verify_dataset(load_dataset(tiny_dataset.folder)) for entry in defects] == []
    names = {path.name for path in tiny_dataset.folder.iterdir()}
    listed = {shard.name for split in tiny_dataset.splits.values() for shard in split.shards}
    assert names == listed | {"dataset.json", "train.index.npy", "val.index.npy", "test.index.npy"}


# ---- the split ----


def source_of(*counts: int) -> ImageSource:
    """A source of so many images of each class; nothing can be read from it."""
    images = [
        LabelledImage(f"{label}/{number:04d}.png", label, bytes)
        for label, count in enumerate(counts)
        for number in range(count)
    ]
    return ImageSource("folder", [str(label) for label in range(len(counts))], images, "fingerprint")


def names_by_split(source: ImageSource, config: DatasetConfig) -> dict[str, set[str]]:
    return {split: {image.name for image in images} for split, images in split_images(source, config).items()}


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [(0.2, 20, 4), (0.2, 21, 5), (0.15, 20, 3), (0.1, 30, 3), (0.01, 50, 1), (0.28, 25, 7), (0.07, 100, 7)],
)
def test_each_class_gives_the_fraction_rounded_up_to_the_test_split(fraction: float, count: int, expected: int) -> None:
    # In binary 0.28 * 25 is 7.000000000000001 and 0.07 * 100 too: what was asked for is 7.
    config = DatasetConfig(val_fraction=0.0, test_fraction=fraction)
    splits = split_images(source_of(count, count), config)
    assert len(splits["train"]) == 2 * (count - expected)
    for label in (0, 1):
        assert sum(image.label == label for image in splits.get("test", [])) == expected


def test_every_class_has_its_share_in_every_split(tiny_dataset: DatasetManifest) -> None:
    counts = {name: split.class_counts for name, split in tiny_dataset.splits.items()}
    assert counts == {"train": [12, 12, 12], "val": [4, 4, 4], "test": [4, 4, 4]}


def test_the_splits_share_no_image_and_lose_none() -> None:
    source = source_of(37, 11, 5)
    splits = names_by_split(source, TINY_SPLIT)
    assert sum(map(len, splits.values())) == 53
    assert set.union(*splits.values()) == {image.name for image in source.images}


def test_a_fraction_of_nothing_makes_no_split() -> None:
    config = DatasetConfig(val_fraction=0.25, test_fraction=0.0)
    assert {name: len(names) for name, names in names_by_split(source_of(4, 4), config).items()} == {"train": 6, "val": 2}


@pytest.mark.parametrize("number", range(21, 27))  # the new image's name decides where it comes to lie
def test_a_new_image_moves_at_most_one_other_across_each_border(number: int) -> None:
    before = names_by_split(source_of(21, 21), TINY_SPLIT)  # 5, 5 and 11 of each class, of 22 images also 5, 5 and 12
    source = source_of(21, 21)
    source.images.append(LabelledImage(f"1/{number:04d}.png", 1, bytes))
    after = names_by_split(source, TINY_SPLIT)
    for split, names in before.items():
        assert len(names - after[split]) <= 1
        assert {name for name in names if name.startswith("0/")} <= after[split]  # the other class is not touched


def test_the_order_inside_the_shards_mixes_the_classes() -> None:
    labels = [image.label for image in split_images(source_of(50, 50), TINY_SPLIT)["train"]]
    changes = sum(first != second for first, second in itertools.pairwise(labels))
    # 60 images of two classes in random order: 30 changes on average, with a standard deviation of 3.8; sorted, 1.
    assert changes == pytest.approx(30, abs=4 * 3.8)


def test_a_class_that_is_too_small_for_every_split_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"class `1` has 2 images, too few for a share in every split"):
        split_images(source_of(9, 2), TINY_SPLIT)


# ---- what is in the shards ----


def test_a_jpeg_is_kept_byte_for_byte_and_anything_else_becomes_a_good_one(folder: Path, tmp_path: Path) -> None:
    pixels = Image.open(folder / "red" / "00.png")
    exif = Image.Exif()
    exif[274] = 6
    pixels.resize((8, 24)).save(folder / "red" / "photo.jpg", quality=30, exif=exif)
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    stored = images_by_key(manifest, "train")
    assert stored["photo"] == (folder / "red" / "photo.jpg").read_bytes()
    re_encoded = Image.open(io.BytesIO(stored["01"]))
    assert re_encoded.format == "JPEG"
    assert re_encoded.size == (16, 16)


def test_an_image_that_becomes_a_jpeg_keeps_its_colours(image_folder: ImageFolder, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", {"red": 1, "blue": 1})
    smooth = np.linspace(0, 255, 16).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(smooth[:, None], smooth[None, :], np.uint8(99)), axis=-1)  # (H, W, 3)
    Image.fromarray(pixels).save(source / "red" / "00.png")
    manifest = write(source, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    rows = open_index(manifest, "train")
    row = rows[rows["label"] == 1][0]
    shard = (manifest.folder / "train-000000.tar").read_bytes()
    stored = np.asarray(Image.open(io.BytesIO(shard[row["offset"] :])))
    # Quality 95 without chroma subsampling: quantisation steps of at most 10 move a smooth image by a few of 255.
    np.testing.assert_allclose(stored.astype(int), pixels.astype(int), rtol=0, atol=6)


def test_a_grey_image_stays_grey(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 77).save(folder / "red" / "grey.png")
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    stored = Image.open(io.BytesIO(images_by_key(manifest, "train")["grey"]))
    assert (stored.mode, stored.getpixel((3, 3))) == ("L", 77)


def test_names_in_any_script_become_keys_that_every_reader_stands(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "00.png").rename(folder / "red" / "猫.v2 (1).png")
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    keys = [key for shard in manifest.split("train").shards for key, *_ in read_shard_rows(manifest.folder / shard.name)]
    assert len(keys) == len(set(keys)) == 10
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)
    assert sum(key.endswith("-_v2_1_") for key in keys) == 1


def test_a_file_name_that_is_no_text_is_sharded_like_any_other(folder: Path, tmp_path: Path) -> None:
    # Archives from other systems hold such names; Python reads their odd bytes as surrogates.
    name = os.fsencode(folder / "red") + b"/caf\xe9.png"
    os.rename(os.fsencode(folder / "red" / "00.png"), name)  # noqa: PTH104 - pathlib takes no bytes
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    assert manifest.split("train").num_samples == 10


def test_the_statistics_are_those_of_the_training_pixels_as_they_are_read(tiny_dataset: DatasetManifest) -> None:
    stored = [np.asarray(Image.open(io.BytesIO(encoded))) for encoded in training_images(tiny_dataset)]
    pixels = np.stack(stored).reshape(-1, 3) / 255  # (36 * 16 * 16, 3)
    # The manifest rounds to 6 digits.
    np.testing.assert_allclose(tiny_dataset.image_stats.mean, pixels.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(tiny_dataset.image_stats.std, pixels.std(axis=0), rtol=0, atol=1e-6)
    assert tiny_dataset.image_stats.split == "train"


def training_images(manifest: DatasetManifest) -> list[bytes]:
    rows = open_index(manifest, "train")
    shards = [(manifest.folder / shard.name).read_bytes() for shard in manifest.split("train").shards]
    return [shards[row["shard"]][row["offset"] : row["offset"] + row["size"]] for row in rows]


def test_a_channel_that_never_changes_can_still_be_divided_by(image_folder: ImageFolder, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", {"red": 1, "blue": 1})
    for path in source.rglob("*.png"):
        Image.new("RGB", (4, 4), (255, 255, 255)).save(path)
    stats = write(source, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0).image_stats
    assert (stats.mean, stats.std) == ([1.0] * 3, [round(1 / 255, 6)] * 3)


def test_the_webdataset_library_reads_our_shards_and_agrees_with_the_index(
    tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    paths = [str(tiny_dataset.folder / shard.name) for shard in tiny_dataset.split("train").shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    rows = open_index(tiny_dataset, "train")
    assert [label for _, label in samples] == rows["label"].tolist()
    for (pixels, _), encoded in zip(samples, training_images(tiny_dataset), strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(encoded))))


# ---- when it fails ----


def test_every_bad_image_is_named_and_nothing_is_left_behind(folder: Path, tmp_path: Path) -> None:
    (folder / "blue" / "00.png").write_bytes(b"garbage")
    cut = (folder / "red" / "01.png").read_bytes()
    (folder / "red" / "01.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(DataError, match=r"^2 images cannot be decoded: .*nothing was written") as refusal:
        write(folder, tmp_path / "dataset", samples_per_shard=1)
    assert "blue/00.png (cannot identify image file)" in str(refusal.value)
    assert "red/01.png (" in str(refusal.value)
    assert list((tmp_path / "dataset").rglob("*")) == []


def test_many_bad_images_are_counted_and_the_first_three_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"^10 images cannot be decoded: (\S+\.png \([^)]*\); ){3}and 7 more\."):
        write(folder, tmp_path / "dataset")


def full_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("owner", "call"), [(tarfile.TarFile, "addfile"), (np, "save"), (os, "fsync")])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(
    owner: Any, call: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(owner, call, full_disk)
        with pytest.raises(ShardlineError, match=r"dataset: No space left on device\. The disk is full: free some space"):
            write(folder, tmp_path / "dataset")
    assert list((tmp_path / "dataset").rglob("*")) == []


def without_the_last_step(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Write a data set up to the point where everything but dataset.json is there, as a power cut would leave it."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(ShardlineError, match="The disk is full"):
            write(folder, target, **changes)


def test_a_data_set_without_its_last_file_is_none_and_is_written_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dataset"
    without_the_last_step(folder, target, monkeypatch)
    with pytest.raises(DataError, match="no data set there"):
        load_dataset(target)
    manifest, made = prepare_dataset(settings(folder), target)
    assert made
    assert load_dataset(target) == manifest


def test_no_shard_of_an_interrupted_attempt_stays_among_those_of_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever reads `train-*.tar`, as the webdataset library is used, would train on samples twice, and on test images.
    target = tmp_path / "dataset"
    without_the_last_step(folder, target, monkeypatch, samples_per_shard=1)
    manifest, _ = prepare_dataset(settings(folder, samples_per_shard=100), target)
    assert sorted(path.name for path in target.glob("*.tar")) == sorted(
        shard.name for split in manifest.splits.values() for shard in split.shards
    )


# ---- made once, and again when something changed ----


def test_an_unchanged_data_set_is_not_written_again(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    first, made = prepare_dataset(settings(folder), target)
    assert made
    times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    again, made = prepare_dataset(settings(folder), target)
    assert not made
    assert again == first
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == times


def new_image(folder: Path) -> dict[str, Any]:
    shutil.copy(folder / "red" / "00.png", folder / "red" / "05.png")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"split_seed": 1},
        lambda _: {"val_fraction": 0.4},
        lambda _: {"test_fraction": 0.4},
        lambda _: {"samples_per_shard": 2},
        lambda _: {"jpeg_quality": 50},
        new_image,
    ],
    ids=["seed", "val", "test", "shards", "quality", "new-image"],
)
def test_a_changed_data_set_is_written_anew_and_the_old_one_kept(
    change: Callable[[Path], dict[str, Any]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "dataset"
    first, _ = prepare_dataset(settings(folder), target)
    second, made = prepare_dataset(settings(folder, **change(folder)), target)
    assert made
    assert second.digest != first.digest
    (aside,) = [path for path in target.parent.iterdir() if path != target]
    assert load_dataset(aside).digest == first.digest
    said = capsys.readouterr().out
    assert "dataset: the images or the settings of `dataset` changed\n" in said
    assert f"the earlier data set is kept as {aside}\n" in said


def test_a_fresh_start_writes_even_an_unchanged_data_set_anew(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "dataset"
    prepare_dataset(settings(folder), target)
    _, made = prepare_dataset(settings(folder), target, fresh=True)
    assert made
    assert len(list(target.parent.iterdir())) == 2


def test_images_that_cannot_be_read_do_not_cost_the_data_set_that_was_there(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "dataset"
    first, _ = prepare_dataset(settings(folder), target)
    (folder / "red" / "bad.png").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"^1 image cannot be decoded: red/bad\.png"):
        prepare_dataset(settings(folder), target)
    assert load_dataset(target).digest == first.digest


def test_a_damaged_data_set_is_reported_and_not_silently_replaced(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    prepare_dataset(settings(folder), target)
    (target / "train-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000000\.tar: holds 0 bytes"):
        prepare_dataset(settings(folder), target)


def test_a_folder_with_somebody_elses_files_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(DataError, match=r"home: is not a data set but holds thesis\.tex\. Choose another --dataset\.path"):
            prepare_dataset(settings(folder), target, fresh=fresh)
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]
