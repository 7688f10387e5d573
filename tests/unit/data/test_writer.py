import dataclasses
import errno
import io
import json
import os
import random
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data import listing as listing_module
from pipeline.data import native, writer
from pipeline.data.pack import Packer, ShardJob
from pipeline.data.partial import Partial
from pipeline.data.sources import open_source
from pipeline.data.verify import verify_dataset
from pipeline.data.writer import PartOutcome, merge_parts, prepare_dataset, write_dataset, write_part
from pipeline.errors import ConfigError, DataError, RunError, ShardlineError
from pipeline.files import locked, sha256_of
from pipeline.manifest import DatasetManifest, load_dataset, open_index, open_labels
from tests.processes import wait_until
from tests.unit.conftest import TINY_SPLIT, ImageFolder
from tests.unit.data.given import Given, GivenImages, classes
from tests.unit.data.images import as_jpeg, noise

needs_native = pytest.mark.skipif(not native.is_built(), reason="the native decoder is not built here")


def settings(source: Path, **changes: Any) -> DatasetConfig:
    return dataclasses.replace(TINY_SPLIT, source=str(source), **changes)


def write(source: Path, folder: Path, **changes: Any) -> DatasetManifest:
    config = settings(source, **changes)
    return write_dataset(open_source(config), config, folder)


def write_given(images: list[Given], folder: Path, **changes: Any) -> DatasetManifest:
    config = dataclasses.replace(TINY_SPLIT, **changes)
    return write_dataset(GivenImages(images), config, folder)


def files_of(folder: Path) -> dict[str, str]:
    """Sha256 of every file but the manifest, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "dataset.json"
    }


def images_by_key(manifest: DatasetManifest, split: str) -> dict[str, bytes]:
    """The encoded image of every sample of a split, by its key."""
    found = {}
    for shard in manifest.split(split).shards:
        with tarfile.open(manifest.folder / shard.name) as tar:
            for member in tar:
                if not member.name.endswith((".cls", ".json")):
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name.partition(".")[0]] = content.read()
    return found


@pytest.fixture
def folder(image_folder: ImageFolder, tmp_path: Path) -> Path:
    """Two classes of five images."""
    return image_folder(tmp_path / "source", {"red": 5, "blue": 5})


# ---- the same bytes every time ----


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int, tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path
) -> None:
    config = settings(tiny_source)
    again = write_dataset(open_source(config), config, tmp_path / "again", workers=workers)
    assert len(files_of(again.folder)) == 17  # 8 + 3 + 3 shards and 3 indices
    assert files_of(again.folder) == files_of(tiny_dataset.folder)
    assert again.digest == tiny_dataset.digest


def test_a_copy_of_the_images_elsewhere_and_later_gives_the_same_digest(
    tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_source, tmp_path / "copy", copy_function=shutil.copyfile)
    manifest = write(copied, tmp_path / "again")
    assert manifest.info["source_fingerprint"] != tiny_dataset.info["source_fingerprint"]
    assert manifest.digest == tiny_dataset.digest


def test_the_order_in_which_a_source_lists_its_images_changes_nothing(tmp_path: Path) -> None:
    images = classes(9, 7)
    first = write_given(images, tmp_path / "first")
    second = write_given(random.Random(5).sample(images, len(images)), tmp_path / "second")
    assert (second.digest, second.info["source_fingerprint"]) == (first.digest, first.info["source_fingerprint"])


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
    shards = {(name, sha256) for name, sha256 in files_of(tiny_dataset.folder).items() if name.endswith(".tar")}
    assert files_of(other.folder).items().isdisjoint(shards)


def test_a_data_set_is_whole_as_soon_as_it_is_written(tiny_dataset: DatasetManifest) -> None:
    assert [entry for _, defects in verify_dataset(load_dataset(tiny_dataset.folder)) for entry in defects] == []
    names = {path.name for path in tiny_dataset.folder.iterdir()}
    listed = {shard.name for split in tiny_dataset.splits.values() for shard in split.shards}
    assert names == listed | {"dataset.json", "train.index.npy", "val.index.npy", "test.index.npy"}


def test_every_class_has_its_share_in_every_split(tiny_dataset: DatasetManifest) -> None:
    counts = {name: split.class_counts for name, split in tiny_dataset.splits.items()}
    assert counts == {"train": [12, 12, 12], "val": [4, 4, 4], "test": [4, 4, 4]}


# ---- what is in the shards ----


def test_a_jpeg_is_kept_byte_for_byte_and_anything_else_becomes_one(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "photo.jpg").write_bytes(as_jpeg(noise(8, 24)))
    stored = images_by_key(write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0), "train")
    (photo,) = [encoded for key, encoded in stored.items() if key.endswith("-photo")]
    assert photo == (folder / "red" / "photo.jpg").read_bytes()
    assert {Image.open(io.BytesIO(encoded)).format for encoded in stored.values()} == {"JPEG"}


def test_on_request_everything_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0, keep_format=True)
    with tarfile.open(manifest.folder / "train-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "cls"}
    originals = {path.read_bytes() for path in folder.rglob("*.png")}
    assert set(images_by_key(manifest, "train").values()) == originals
    assert [defect for _, defects in verify_dataset(manifest) for defect in defects] == []


def test_names_in_any_script_become_keys_that_every_reader_stands(folder: Path, tmp_path: Path) -> None:
    (folder / "red" / "00.png").rename(folder / "red" / "猫.v2 (1).png")
    keys = images_by_key(write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0), "train").keys()
    assert len(keys) == 10
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)
    assert sum(key.endswith("-_v2_1_") for key in keys) == 1


def test_a_file_name_that_is_no_text_is_sharded_like_any_other(folder: Path, tmp_path: Path) -> None:
    # Archives from other systems hold such names; Python reads their odd bytes as surrogates.
    name = os.fsencode(folder / "red") + b"/caf\xe9.png"
    os.rename(os.fsencode(folder / "red" / "00.png"), name)  # noqa: PTH104 - pathlib takes no bytes
    manifest = write(folder, tmp_path / "dataset", val_fraction=0.0, test_fraction=0.0)
    assert manifest.split("train").num_samples == 10


def test_several_labels_an_image_lie_in_rows_of_their_own(tmp_path: Path) -> None:
    images = [Given(f"{number:02d}.jpg", ((), (0, 2), (1,), (2, 0, 1))[number % 4]) for number in range(40)]
    config = dataclasses.replace(TINY_SPLIT)
    manifest = write_dataset(GivenImages(images, task="multi"), config, tmp_path / "dataset")
    assert manifest.task == "multi"
    for split, expected in (("train", 6), ("val", 2), ("test", 2)):
        labels, rows = open_labels(manifest, split), open_index(manifest, split)
        assert labels.shape == (4 * expected, 3)
        assert manifest.split(split).class_counts == labels.sum(axis=0).tolist() == [2 * expected] * 3
        of_first = {-1: [0, 0, 0], 0: [1, 0, 1], 1: [0, 1, 0], 2: [1, 1, 1]}
        assert labels.tolist() == [of_first[label] for label in rows["label"].tolist()]
    assert [defect for _, defects in verify_dataset(load_dataset(manifest.folder)) for defect in defects] == []


@needs_native
def test_jpegs_with_restart_markers_are_written_and_those_without_counted(tmp_path: Path) -> None:
    good = Given("a/good.jpg", content=as_jpeg(noise(40, 40)))
    odd = Given("a/odd.jpg", content=as_jpeg(noise(40, 40, 1))[:-2] + bytes(99) + b"\xff\xd9")
    manifest = write_given([good, odd, *classes(0, 5)], tmp_path / "marked", restart=4, val_fraction=0, test_fraction=0)
    assert manifest.preparation["restart"] == 4
    assert manifest.info["num_kept"] == 1
    (kept,) = manifest.info["kept"]
    assert re.fullmatch(r"a/odd\.jpg \(Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9\)", kept)
    found = {key.partition("-")[2]: content for key, content in images_by_key(manifest, "train").items()}
    assert found["good"] == native.with_restarts(as_jpeg(noise(40, 40)), 4)
    assert found["odd"] == odd.content


def test_restart_markers_are_refused_before_anything_is_written_where_nothing_can_set_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_jpeg", None)
    with pytest.raises(ConfigError, match="needs the native decoder"):
        prepare_dataset(settings(folder, restart=4), tmp_path / "dataset")
    with pytest.raises(ConfigError, match="needs the native decoder"):
        write_part(settings(folder, restart=4), tmp_path / "dataset", 1, 2)
    assert not (tmp_path / "dataset").exists()


def training_images(manifest: DatasetManifest) -> list[bytes]:
    rows = open_index(manifest, "train")
    shards = [(manifest.folder / shard.name).read_bytes() for shard in manifest.split("train").shards]
    return [shards[row["shard"]][row["offset"] : row["offset"] + row["size"]] for row in rows]


def test_the_statistics_are_those_of_the_training_pixels_as_they_are_read(tiny_dataset: DatasetManifest) -> None:
    stored = [np.asarray(Image.open(io.BytesIO(encoded))) for encoded in training_images(tiny_dataset)]
    pixels = np.stack(stored).reshape(-1, 3) / 255  # (36 * 16 * 16, 3)
    # The manifest rounds to 6 digits.
    np.testing.assert_allclose(tiny_dataset.image_stats.mean, pixels.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(tiny_dataset.image_stats.std, pixels.std(axis=0), rtol=0, atol=1e-6)
    assert tiny_dataset.image_stats.split == "train"


def test_with_trust_the_statistics_are_of_some_images_and_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TRUSTED_STATISTICS", 4)
    source = GivenImages(classes(15, 15))
    manifest = write_dataset(source, TINY_SPLIT, tmp_path / "dataset", trust=True)
    assert manifest.preparation["trust"] == {"statistics_of_at_most": 4}
    some = [Image.open(io.BytesIO(encoded)) for encoded in training_images(manifest)][::5]  # 18 images, so every fifth
    pixels = np.stack([np.asarray(image) for image in some]).reshape(-1, 3) / 255
    np.testing.assert_allclose(manifest.image_stats.mean, pixels.mean(axis=0), rtol=0, atol=1e-6)


def test_the_webdataset_library_reads_our_shards_and_agrees_with_the_index(
    tiny_dataset: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset

    monkeypatch.setattr("webdataset.utils.enforce_security", True)

    paths = [str(tiny_dataset.folder / shard.name) for shard in tiny_dataset.split("train").shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    rows = open_index(tiny_dataset, "train")
    assert [label for _, label in samples] == rows["label"].tolist()
    for (pixels, _), encoded in zip(samples, training_images(tiny_dataset), strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(encoded))))


def test_what_there_is_to_tell_of_the_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_given(classes(9, 1), tmp_path / "dataset")
    assert "1 class has too few images for every split: class-1\n" in capsys.readouterr().out


# ---- images that cannot be decoded ----


def bad(name: str, content: bytes | Exception = b"\xff\xd8garbage") -> Given:
    return Given(name, (0,), None, content)


def test_a_few_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    images = [*classes(30, 30), bad("0/z.jpg"), bad("0/a.jpg", PermissionError(13, "Permission denied"))]
    manifest = write_given(images, tmp_path / "dataset", max_rejected=0.04)
    assert sum(split.num_samples for split in manifest.splits.values()) == 60
    lines = [json.loads(line) for line in (tmp_path / "dataset/rejected.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["0/a.jpg", "0/z.jpg"]
    assert lines[0]["reason"] == "Permission denied"
    assert manifest.info["num_rejected"] == 2
    assert manifest.info["rejected"] == {"Permission denied": 1, "cannot identify image file": 1}
    assert [defect for _, defects in verify_dataset(load_dataset(manifest.folder)) for defect in defects] == []


def test_too_many_bad_images_are_refused_and_named_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*classes(30, 30), *(bad(f"0/bad-{number}.jpg") for number in range(5))]
    target = tmp_path / "dataset"
    with pytest.raises(DataError) as refusal:
        write_given(images, target, max_rejected=0.07)
    assert str(refusal.value) == (
        "5 of 65 images cannot be decoded, more than the share of 0.07 that `dataset.max_rejected` allows: "
        "0/bad-0.jpg (cannot identify image file); 0/bad-1.jpg (cannot identify image file); "
        f"0/bad-2.jpg (cannot identify image file); and 2 more. All of them are in {target}/rejected.jsonl. "
        "Replace or remove them, or allow more with --max-rejected; the work done is kept."
    )
    assert len((target / "rejected.jsonl").read_text().splitlines()) == 5
    with pytest.raises(DataError, match="no data set there"):
        load_dataset(target)
    with monkeypatch.context() as patched:  # nothing but the assembly is left to do
        patched.setattr(Packer, "write", None)
        patched.setattr(writer, "hash_images", None)
        manifest = write_given(images, target, max_rejected=0.08)
    assert manifest.digest == write_given(images, tmp_path / "undisturbed", max_rejected=0.08).digest
    assert files_of(target) == files_of(tmp_path / "undisturbed")


def test_a_list_of_an_earlier_attempt_does_not_stay_when_all_is_well(tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    with pytest.raises(DataError, match="1 of 61 images"):
        write_given([*classes(30, 30), bad("0/z.jpg")], target, max_rejected=0.0)
    write_given(classes(30, 30), target, max_rejected=0.0)
    assert not (target / "rejected.jsonl").exists()


def test_a_class_that_loses_all_its_training_images_is_named(tmp_path: Path) -> None:
    images = [*classes(9), *(Given(f"1/{number}.jpg", (1,), None, b"\xff\xd8bad-%d" % number) for number in range(9))]
    with pytest.raises(
        DataError, match=r"class `class-1`: none of its 5 images for train can be decoded\. Rejected were 1/0\.jpg"
    ):
        write_given(images, tmp_path / "dataset", max_rejected=1.0)


def test_a_shard_of_which_nothing_is_left_is_left_out(tmp_path: Path) -> None:
    images = [*classes(9, 9), *(bad(f"0/{number}-bad.jpg", b"\xff\xd8bad-%d" % number) for number in range(6))]
    manifest = write_given(images, tmp_path / "dataset", samples_per_shard=1, max_rejected=1.0)
    for name, split in manifest.splits.items():
        assert [shard.name for shard in split.shards] == [f"{name}-{number:06d}.tar" for number in range(split.num_samples)]
    assert sum(len(split.shards) for split in manifest.splits.values()) == 18
    assert [defect for _, defects in verify_dataset(load_dataset(manifest.folder)) for defect in defects] == []


def test_bad_images_of_a_new_attempt_do_not_touch_the_data_set_that_is_there(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "dataset"
    first, _ = prepare_dataset(settings(folder), target)
    (folder / "red" / "bad.png").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"^1 of 11 images cannot be decoded.*\.partial/rejected\.jsonl\. "):
        prepare_dataset(settings(folder), target)
    assert load_dataset(target).digest == first.digest
    assert not (target / "rejected.jsonl").exists()


# ---- when it is interrupted ----


def full_disk(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("owner", "call"), [(os, "writev"), (os, "fsync"), (Path, "replace")])
def test_a_full_disk_is_one_clear_line_and_gives_nothing_its_name(
    owner: Any, call: str, workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder)
    with monkeypatch.context() as patched:
        patched.setattr(owner, call, full_disk)
        with pytest.raises(ShardlineError, match=r"dataset: No space left on device\. The disk is full: free some space"):
            write_dataset(open_source(config), config, tmp_path / "dataset", workers=workers)
    assert [path for path in files_of(tmp_path / "dataset") if not path.startswith(".partial/")] == []
    assert list((tmp_path / "dataset").rglob("*.tar")) == []
    assert write(folder, tmp_path / "dataset").digest == write(folder, tmp_path / "undisturbed").digest


class TwoAtOnce(GivenImages):
    """One shard is half written when the machine fails while another is."""

    shards_dir: Path

    def read(self, name: str) -> bytes:
        if self.shards_dir.exists():  # all is hashed
            wait_until(lambda: len(list(self.shards_dir.glob(".*.tmp"))) == 2, "two shards at once", seconds=20)
            try:
                (self.shards_dir / "somebody failed").touch(exist_ok=False)
            except FileExistsError:
                time.sleep(20)
            raise OSError(errno.EMFILE, "Too many open files")
        return super().read(name)


def test_a_process_that_ends_because_another_failed_leaves_nothing_half_written(tmp_path: Path) -> None:
    source = TwoAtOnce(classes(4))
    source.shards_dir = tmp_path / "dataset/.partial/shards"
    config = dataclasses.replace(TINY_SPLIT, val_fraction=0.0, test_fraction=0.0, samples_per_shard=2)
    with pytest.raises(ShardlineError, match="Too many open files"):
        write_dataset(source, config, tmp_path / "dataset", workers=2)
    assert [path.name for path in source.shards_dir.iterdir()] == ["somebody failed"]


class Interruption(BaseException):
    """Stands for a kill: nothing catches it."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int) -> None:
    """Raise Interruption in place of the `number`-th call."""
    whole = getattr(owner, call)
    calls = iter(range(1, 10**6))

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise Interruption
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, call, counted)


@pytest.mark.parametrize("with_earlier", [False, True])
@pytest.mark.parametrize("call", ["replace", "rename", "unlink"])
def test_wherever_it_is_interrupted_it_goes_on_to_the_same_end(
    call: str, with_earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*classes(8, 8), bad("0/bad.jpg")]
    config = dataclasses.replace(TINY_SPLIT, max_rejected=0.1)
    expected = write_dataset(GivenImages(images), config, tmp_path / "undisturbed")
    target = tmp_path / "made" / "dataset"
    if with_earlier:
        earlier = write_given(classes(3, 3), target)
    rounds = 0
    for rounds in range(1, 200):
        try:
            with monkeypatch.context() as patched:
                # One more step each time: every step is once the one that is not done, and what follows a step is done often.
                interrupt_at(patched, Path, call, 1 + rounds % 23)
                manifest = write_dataset(GivenImages(images), config, target)
            break
        except Interruption:
            if (target / "dataset.json").exists():
                assert load_dataset(target).digest in ({earlier.digest} if with_earlier else set()) | {expected.digest}
    assert rounds > 3
    assert manifest.digest == expected.digest
    assert files_of(target) == files_of(tmp_path / "undisturbed")
    aside = [path for path in target.parent.iterdir() if path != target]
    assert [load_dataset(path).digest for path in aside] == ([earlier.digest] if with_earlier else [])


def written_shards(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """A list that fills with the names of the shards that are written; an interruption after so many."""
    names: list[str] = []
    whole = Packer.write

    def noted(packer: Packer, job: ShardJob) -> None:
        if stop_after is not None and len(names) == stop_after:
            raise Interruption
        whole(packer, job)
        names.append(job.shard.name)

    monkeypatch.setattr(Packer, "write", noted)
    return names


def test_what_is_done_is_not_done_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched:
        first = written_shards(patched, stop_after=2)
        with pytest.raises(Interruption):
            write(folder, target, samples_per_shard=2)
    (target / ".partial/shards/.train-000002.tar.tmp").write_bytes(b"half a shard")
    with monkeypatch.context() as patched:
        rest = written_shards(patched)
        manifest = write(folder, target, samples_per_shard=2)
    assert (len(first), len(rest)) == (2, 3)
    assert sorted(first + rest) == sorted(shard.name for split in manifest.splits.values() for shard in split.shards)
    assert "dataset: going on with what an interrupted run has done\n" in capsys.readouterr().out
    assert files_of(target) == files_of(write(folder, tmp_path / "undisturbed", samples_per_shard=2).folder)


@pytest.mark.parametrize(
    "change", [{"split_seed": 1}, {"samples_per_shard": 3}, {"background": [0, 0, 0]}, {"val_fraction": 0.4}], ids=str
)
def test_work_on_other_settings_is_not_used(
    change: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched:
        written_shards(patched, stop_after=2)
        with pytest.raises(Interruption):
            write(folder, target, samples_per_shard=2)
    again = {"samples_per_shard": 2, **change}
    assert files_of(write(folder, target, **again).folder) == files_of(write(folder, tmp_path / "undisturbed", **again).folder)
    assert "changed since a run was interrupted; starting over\n" in capsys.readouterr().out


def test_no_shard_of_an_attempt_that_was_cut_short_at_the_end_stays_among_those_of_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever reads `train-*.tar`, as the webdataset library is used, would train on samples twice, and on test images.
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched:
        interrupt_at(patched, Path, "rename", 8)  # shards are on their way to their final names
        with pytest.raises(Interruption):
            write(folder, target, samples_per_shard=1)
    assert len(list(target.glob("*.tar"))) == 7
    manifest, _ = prepare_dataset(settings(folder, samples_per_shard=100), target)
    assert sorted(path.name for path in target.glob("*.tar")) == sorted(
        shard.name for split in manifest.splits.values() for shard in split.shards
    )


def test_a_run_that_was_killed_among_the_last_renames_has_nothing_to_do_but_the_rest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, Path, "rename", 8)
        with pytest.raises(Interruption):
            write(folder, tmp_path / "dataset", samples_per_shard=1)
    monkeypatch.setattr(Packer, "write", None)
    monkeypatch.setattr(writer, "assemble", None)
    manifest = write(folder, tmp_path / "dataset", samples_per_shard=1)
    assert load_dataset(tmp_path / "dataset") == manifest


def test_a_run_that_was_killed_while_it_cleaned_up_is_finished_by_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched:
        patched.setattr(Partial, "remove", lambda _: None)
        prepare_dataset(settings(folder), target)
    assert (target / ".partial").exists()
    _, made = prepare_dataset(settings(folder), target)
    assert not made
    assert not (target / ".partial").exists()


def test_a_mistake_before_anything_is_done_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        prepare_dataset(settings(tmp_path / "nowhere"), tmp_path / "made" / "dataset")
    source = GivenImages(classes(2))
    listed = [*source.images()]
    source.images = lambda: iter([*listed, *listed])  # type: ignore[method-assign]
    with pytest.raises(DataError, match="under one name"):
        write_dataset(source, TINY_SPLIT, tmp_path / "made" / "dataset")
    assert not (tmp_path / "made" / "dataset").exists()


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


def test_a_data_set_that_was_written_with_trust_is_not_written_again_without(folder: Path, tmp_path: Path) -> None:
    # The verbs after `shard` are often called by `make`, which knows nothing of how the shards were once written.
    prepare_dataset(settings(folder), tmp_path / "dataset", trust=True)
    assert not prepare_dataset(settings(folder), tmp_path / "dataset")[1]


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
        lambda _: {"keep_format": True},
        lambda _: {"max_side": 8},
        pytest.param(lambda _: {"restart": 4}, marks=needs_native, id="restart"),
        lambda _: {"background": [0, 0, 0]},
        lambda _: {"class_level": 1},
        new_image,
    ],
    ids=["seed", "val", "test", "shards", "quality", "format", "side", None, "background", "level", "new-image"],
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


def test_more_allowed_rejects_are_no_change(folder: Path, tmp_path: Path) -> None:
    prepare_dataset(settings(folder), tmp_path / "dataset")
    assert not prepare_dataset(settings(folder, max_rejected=0.5), tmp_path / "dataset")[1]


def test_a_fresh_start_writes_even_an_unchanged_data_set_anew(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "dataset"
    prepare_dataset(settings(folder), target)
    _, made = prepare_dataset(settings(folder), target, fresh=True)
    assert made
    assert len(list(target.parent.iterdir())) == 2


def test_a_fresh_start_uses_nothing_of_an_interrupted_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dataset"
    with monkeypatch.context() as patched:
        written_shards(patched, stop_after=2)
        with pytest.raises(Interruption):
            write(folder, target, samples_per_shard=2)
    names = written_shards(monkeypatch)
    prepare_dataset(settings(folder, samples_per_shard=2), target, fresh=True)
    assert len(names) == 5


def test_shards_that_were_adopted_are_not_replaced_by_images(
    tiny_dataset: DatasetManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # `make train` runs `shard` first, and a configuration that only names the shards has the digits as its source.
    target = tmp_path / "made" / "dataset"
    shutil.copytree(tiny_dataset.folder, target)
    adopted = dataclasses.replace(tiny_dataset, folder=target, preparation={"source": "index"}).save()
    assert prepare_dataset(DatasetConfig(source="digits"), target) == (load_dataset(target), False)
    assert "holds shards that `shardline index` adopted; they stay unless --fresh" in capsys.readouterr().out
    assert load_dataset(target).digest == adopted.digest


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
    refusal = r"home: is not a data set but holds thesis\.tex\. Choose another folder"
    for fresh in (False, True):
        with pytest.raises(DataError, match=refusal):
            prepare_dataset(settings(folder), target, fresh=fresh)
    with pytest.raises(DataError, match=refusal):
        write_part(settings(folder), target, 1, 2)
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]


def test_a_mount_point_that_holds_an_earlier_data_set_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(settings(folder), tmp_path / "dataset")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(
        DataError, match=r"dataset: is a mount point, so the data set in it cannot be moved aside\. Use a folder below"
    ):
        prepare_dataset(settings(folder, split_seed=1), tmp_path / "dataset")


# ---- many machines ----


@pytest.fixture
def undisturbed(tiny_source: Path, tiny_dataset: DatasetManifest) -> dict[str, str]:
    """The files of `tiny_dataset`, 14 shards, by their hashes."""
    return files_of(tiny_dataset.folder)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_parts_in_any_order_make_the_data_set_of_one_run(
    order: tuple[int, ...], tiny_source: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "CHUNK_IMAGES", 7)
    target, config = tmp_path / "dataset", settings(tiny_source)
    left: dict[int, int] = {1: 5, 2: 5, 3: 4}
    for part in order:
        del left[part]
        assert write_part(config, target, part, 3) == PartOutcome(14, left)
        with pytest.raises(DataError, match="no data set there"):
            load_dataset(target)
    manifest, made = merge_parts(config, target)
    assert made
    assert files_of(target) == undisturbed
    assert not merge_parts(config, target)[1]
    assert write_part(config, target, 1, 3) is None
    assert prepare_dataset(config, target) == (manifest, False)


def test_a_merge_names_the_parts_that_are_missing(tiny_source: Path, tmp_path: Path) -> None:
    target, config = tmp_path / "dataset", settings(tiny_source)
    with pytest.raises(DataError, match=r"dataset: no part of a data set is there\. Run `shardline shard --part 1/N`"):
        merge_parts(config, target)
    write_part(config, target, 2, 4)
    with pytest.raises(
        DataError, match=r"dataset: 4 of 14 shards are there\. Missing: 4 of part 1/4, 3 of part 3/4, 3 of part 4/4\. Run"
    ):
        merge_parts(config, target)
    with pytest.raises(DataError, match=r"its parts were made with other settings of `dataset`"):
        merge_parts(settings(tiny_source, split_seed=1), target)


def test_a_single_part_is_a_part_like_any_other(tiny_source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    target, config = tmp_path / "dataset", settings(tiny_source)
    for _ in range(2):
        assert write_part(config, target, 1, 1) == PartOutcome(14, {})
    assert merge_parts(config, target)[1]
    assert files_of(target) == undisturbed


def test_a_part_that_was_interrupted_goes_on_where_it_was(
    tiny_source: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, config = tmp_path / "dataset", settings(tiny_source)
    with monkeypatch.context() as patched:
        written_shards(patched, stop_after=3)
        with pytest.raises(Interruption):
            write_part(config, target, 1, 2)
    with monkeypatch.context() as patched:
        names = written_shards(patched)
        write_part(config, target, 1, 2)
        assert len(names) == 4
    write_part(config, target, 2, 2)
    merge_parts(config, target)
    assert files_of(target) == undisturbed


def test_an_undivided_run_goes_on_with_what_parts_have_done(
    tiny_source: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, config = tmp_path / "dataset", settings(tiny_source)
    write_part(config, target, 1, 2)
    names = written_shards(monkeypatch)
    prepare_dataset(config, target)
    assert len(names) == 7
    assert files_of(target) == undisturbed


def test_the_same_part_twice_at_once_is_refused_and_others_are_not(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SECONDS_TO_END", 0.0)
    target, config = tmp_path / "dataset", settings(tiny_source)
    with locked(target, shared=True), locked(target / ".partial" / "part-1-of-2"):
        with pytest.raises(RunError, match="part-1-of-2 is locked by another job"):
            write_part(config, target, 1, 2)
        assert write_part(config, target, 2, 2) is not None
        with pytest.raises(RunError, match="dataset is locked by another job"), locked(target):
            pass
    with locked(target), pytest.raises(RunError, match="dataset is locked by another job"):
        write_part(config, target, 1, 2)


def test_a_part_of_other_settings_waits_for_nobody_and_takes_over_when_alone(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, other = tmp_path / "dataset", settings(tiny_source, split_seed=1)
    write_part(settings(tiny_source), target, 1, 2)
    monkeypatch.setattr(writer, "SECONDS_FOR_OTHERS", 0.0)
    with (
        locked(target, shared=True),
        pytest.raises(RunError, match="other parts are being written from other images or settings"),
    ):
        write_part(other, target, 1, 2)
    for part in (1, 2):
        write_part(other, target, part, 2)
    assert "starting over\n" in capsys.readouterr().out
    assert merge_parts(other, target)[0].digest == write(tiny_source, tmp_path / "undisturbed", split_seed=1).digest


def test_a_merge_replaces_an_earlier_data_set(tiny_source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "made" / "dataset"
    earlier = write(tiny_source, target, split_seed=1)
    for part in (1, 2):
        write_part(settings(tiny_source), target, part, 2)
    assert load_dataset(target).digest == earlier.digest
    merge_parts(settings(tiny_source), target)
    assert files_of(target) == undisturbed
    (aside,) = [path for path in target.parent.iterdir() if path != target and path.is_dir()]
    assert load_dataset(aside).digest == earlier.digest
