import dataclasses
import io
import re
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.config import DataConfig, DatasetConfig
from pipeline.data import native
from pipeline.data.adopt import Adoption, adopt_shards
from pipeline.data.encode import PixelSums, stats_of
from pipeline.data.merge import merge_datasets
from pipeline.data.native import with_restarts
from pipeline.data.repack import Repacker, RepackJob, repack_dataset
from pipeline.data.verify import verify_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DatasetManifest, load_dataset, open_index, open_labels
from pipeline.preprocess import WHITE, open_image
from tests.unit.data.given import Given
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import as_jpeg, as_png, encode, noise
from tests.unit.data.test_adopt import make_shard
from tests.unit.data.test_shards import FORMATS
from tests.unit.data.test_writer import files_of, write, write_given

needs_native = pytest.mark.skipif(not native.is_built(), reason="the native decoder is not built here")
ODD = as_jpeg(noise(40, 30, 9))[:-2] + bytes(99) + b"\xff\xd9"  # decodes, with a warning

Member = tuple[str, bytes]


def repack(source: DatasetManifest, folder: Path, workers: int = 1, **changes: Any) -> DatasetManifest:
    """The data set that `source` becomes, as whole as `verify` can tell."""
    manifest, made = repack_dataset(source, folder, DatasetConfig(**changes), DataConfig(), workers)
    assert made
    assert [defect for _, defects in verify_dataset(manifest, workers=1) for defect in defects] == []
    return manifest


def members_of(manifest: DatasetManifest) -> dict[str, list[Member]]:
    """Names and contents of all members of each split's shards, in their order."""
    found: dict[str, list[Member]] = {}
    for name, split in manifest.splits.items():
        found[name] = []
        for shard in split.shards:
            with tarfile.open(manifest.folder / shard.name) as tar:
                found[name] += [(member.name, file.read()) for member in tar if (file := tar.extractfile(member))]
    return found


def labels_of(manifest: DatasetManifest) -> dict[str, list[int]]:
    return {split: open_index(manifest, split)["label"].tolist() for split in manifest.splits}


def pixels(encoded: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.fixture
def photos(tmp_path: Path) -> DatasetManifest:
    """JPEGs of many kinds, a PNG and a text that is called an image, in two splits of two classes and shards of four."""
    turned = Image.Exif()
    turned[274] = 6
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 2}, {"exif": turned}, {"quality": 20}]
    images = [encode(Image.fromarray(noise(40, 50 + n, n)), "JPEG", **kinds[n % 5]) for n in range(10)]
    images += [as_png(noise(40, 30)), b"no image", ODD]
    samples = [Sample(f"{n:03d}", image, n % 2) for n, image in enumerate(images)]
    return make_dataset(tmp_path / "photos", {"train": samples[2:], "test": samples[:2]}, ["cat", "dog"])


# ---- what stays ----


@needs_native
def test_everything_but_the_bytes_of_jpegs_stays(photos: DatasetManifest, tmp_path: Path) -> None:
    manifest = repack(photos, tmp_path / "marked", restart=4)
    before, after = members_of(photos), members_of(manifest)
    assert before.keys() == after.keys()
    num_changed = 0
    for (name, old), (new_name, new) in zip(chain(*before.values()), chain(*after.values()), strict=True):
        assert name == new_name
        if old.startswith(b"\xff\xd8") and old != ODD:
            num_changed += 1
            assert new == with_restarts(old, 4) != old
            assert np.array_equal(pixels(new), pixels(old))
        else:
            assert new == old
    assert num_changed == 10
    assert labels_of(manifest) == labels_of(photos)
    assert (manifest.class_names, manifest.image_stats) == (photos.class_names, photos.image_stats)
    assert manifest.digest != photos.digest
    assert manifest.preparation == {"repack": {"of": photos.digest, "restart": 4}}


@needs_native
@pytest.mark.parametrize("workers", [1, 2])
def test_a_repacked_data_set_has_the_bytes_of_one_that_was_made_with_markers(tmp_path: Path, workers: int) -> None:
    images = [Given(f"{n % 3}/{n:02d}.jpg", (n % 3,), content=as_jpeg(noise(30, 40 + n, n))) for n in range(30)]
    plain, marked = write_given(images, tmp_path / "plain"), write_given(images, tmp_path / "marked", restart=4)
    repacked = repack(plain, tmp_path / "repacked", workers, restart=4)
    assert files_of(repacked.folder) == files_of(marked.folder)
    assert repacked.image_stats == marked.image_stats


@needs_native
def test_rows_of_several_labels_stay(multi_dataset: DatasetManifest, tmp_path: Path) -> None:
    manifest = repack(multi_dataset, tmp_path / "marked", restart=4)
    for split in multi_dataset.splits:
        assert np.array_equal(open_labels(manifest, split), open_labels(multi_dataset, split))
        assert manifest.split(split).class_counts == multi_dataset.split(split).class_counts
    assert labels_of(manifest) == labels_of(multi_dataset)


@needs_native
def test_the_webdataset_library_reads_the_same_pixels_and_labels(
    photos: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset

    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    manifest = repack(photos, tmp_path / "marked", restart=4)

    def read(manifest: DatasetManifest) -> list[tuple[str, Any, int]]:
        paths = [str(manifest.folder / shard.name) for shard in manifest.split("test").shards]
        dataset = webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8")
        return list(dataset.to_tuple("__key__", "jpg", "cls"))

    assert len(read(manifest)) == 2
    for (key, image, label), (old_key, old_image, old_label) in zip(read(manifest), read(photos), strict=True):
        assert (key, label) == (old_key, old_label)
        assert np.array_equal(image, old_image)


@needs_native
@pytest.mark.parametrize("labels", ["cls", "multi"])
@pytest.mark.parametrize("form", FORMATS)
def test_shards_of_any_tar_keep_their_members(form: str, labels: str, tmp_path: Path) -> None:
    key = "f" * 60 + "/" + "k" * 60 + "{}" if form == "ustar" else "folder/" + "k" * 120 + "ü{}"
    for split in ("train", "val"):
        make_shard(tmp_path / "foreign" / f"shards/{split}-0.tar", range(9), form=form, key=key, labels=labels)
    source, _ = adopt_shards(tmp_path / "foreign", Adoption(label="json:labels" if labels == "multi" else labels))
    manifest = repack(source, tmp_path / "marked", restart=4)
    assert [shard.name for shard in manifest.split("train").shards] == ["train-000000.tar"]
    for split in ("train", "val"):
        before, after = members_of(source)[split], members_of(manifest)[split]
        assert [name for name, _ in after] == [name for name, _ in before]
        for (name, old), (_, new) in zip(before, after, strict=True):
            assert new == (with_restarts(old, 4) if name.endswith("jpg") else old)


@needs_native
def test_members_around_the_images_stay(tmp_path: Path) -> None:
    """A readme, a depth map behind each image, and at the end a file that ends like a tar."""
    (tmp_path / "foreign").mkdir()
    with tarfile.open(tmp_path / "foreign" / "train-0.tar", "w") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(content), 77, "somebody"
            tar.addfile(member, io.BytesIO(content))

        add("README", b"of cats")
        for n in range(4):
            add(f"{n}.cls", str(n % 2).encode())
            add(f"{n}.jpg", as_jpeg(noise(30, 30, n)))
            add(f"{n}.depth", noise(9, 9, n).tobytes())
        add("zeros.bin", bytes(3000))
    source, _ = adopt_shards(tmp_path / "foreign", Adoption())
    manifest = repack(source, tmp_path / "marked", restart=2)
    before, after = members_of(source)["train"], members_of(manifest)["train"]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(old == new for (name, old), (_, new) in zip(before, after, strict=True) if not name.endswith("jpg"))
    with tarfile.open(manifest.folder / "train-000000.tar") as tar:
        assert {(member.mtime, member.uname) for member in tar} == {(77, "somebody")}


# ---- smaller images ----


@pytest.mark.parametrize("restart", [None, pytest.param(4, marks=needs_native)])
def test_on_request_jpegs_become_smaller_and_the_statistics_are_theirs(
    photos: DatasetManifest, tmp_path: Path, restart: int | None
) -> None:
    manifest = repack(photos, tmp_path / "small", max_side=32, jpeg_quality=90, restart=restart)
    sums = PixelSums()
    for (name, old), (_, new) in zip(members_of(photos)["train"], members_of(manifest)["train"], strict=True):
        if name.endswith(".jpg") and new != b"no image":
            image = open_image(new, WHITE)
            assert max(image.size) == (32 if old.startswith(b"\xff\xd8") else 40)
            sums.add(image)
    assert manifest.image_stats == stats_of(*sums.totals(), "train")
    changes = {"max_side": 32, "jpeg_quality": 90} | ({"restart": 4} if restart else {})
    assert manifest.preparation["repack"] == {"of": photos.digest, **changes}
    assert "num_kept" not in manifest.info
    assert members_of(manifest)["train"][-6:-4] == members_of(photos)["train"][-6:-4]  # the PNG


# ---- what is kept ----


@needs_native
def test_a_jpeg_that_cannot_be_rewritten_is_kept_counted_and_said(
    photos: DatasetManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["repack", str(photos.folder), str(tmp_path / "marked"), "--restart", "4", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"kept as is  1 that cannot be rewritten: 012 \(Corrupt JPEG data: \d+ extraneous bytes before", said)
    assert f"next        shardline inspect {tmp_path / 'marked'}\n" in said
    assert load_dataset(tmp_path / "marked").info["num_kept"] == 1
    assert main(["repack", str(photos.folder), str(tmp_path / "marked"), "--restart", "4"]) == 0
    assert capsys.readouterr().out == f"repack: nothing to do, {tmp_path / 'marked'} is up to date\n"


# ---- interruptions ----


class Interruption(BaseException):
    pass


@needs_native
def test_an_interrupted_run_goes_on_where_it_was(
    photos: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    whole = Repacker.write

    def noted(repacker: Repacker, job: RepackJob) -> None:
        if len(names) == 2:
            raise Interruption
        whole(repacker, job)
        names.append(job.shard.name)

    monkeypatch.setattr(Repacker, "write", noted)
    with pytest.raises(Interruption):
        repack(photos, tmp_path / "marked", restart=4)
    assert not list((tmp_path / "marked").glob("*.tar"))
    first = names.copy()
    names.clear()
    manifest = repack(photos, tmp_path / "marked", restart=4)  # two of four are left
    monkeypatch.setattr(Repacker, "write", whole)
    assert sorted(first + names) == ["test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert files_of(manifest.folder) == files_of(repack(photos, tmp_path / "undisturbed", restart=4).folder)


@needs_native
def test_another_data_set_in_its_place_is_kept_beside(photos: DatasetManifest, tmp_path: Path, tiny_source: Path) -> None:
    target = tmp_path / "made" / "dataset"
    earlier = write(tiny_source, target)
    repack(photos, target, restart=4)
    (aside,) = [path for path in target.parent.iterdir() if path != target]
    assert load_dataset(aside).digest == earlier.digest


@needs_native
def test_a_repacked_data_set_is_not_replaced_by_the_images_it_came_from(
    photos: DatasetManifest, tmp_path: Path, tiny_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repack(photos, tmp_path / "marked", restart=4)
    assert main(["shard", f"--dataset.path={tmp_path / 'marked'}", f"--dataset.source={tiny_source}"]) == 0
    assert "holds shards that `shardline repack` wrote; they stay unless --fresh is given\n" in capsys.readouterr().out


# ---- what is refused ----


def damage(manifest: DatasetManifest, at: int) -> None:
    path = manifest.folder / manifest.split("train").shards[1].name
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@needs_native
@pytest.mark.parametrize("at", [0, 130, 1500, -1], ids=["name", "size", "image", "end"])
def test_a_shard_that_is_not_the_manifests_is_named_and_nothing_published(
    photos: DatasetManifest, tmp_path: Path, at: int
) -> None:
    damage(photos, at)
    with pytest.raises(DataError, match=r"train-000001\.tar: .*\. Copy it again or rebuild"):
        repack(photos, tmp_path / "marked", restart=4)
    assert [path.name for path in (tmp_path / "marked").iterdir()] == [".partial"]
    assert not list((tmp_path / "marked").rglob("*.tmp"))


def test_labels_that_changed_since_they_were_written_are_not_handed_on(photos: DatasetManifest, tmp_path: Path) -> None:
    path = photos.folder / "train.index.npy"
    rows = np.load(path)
    rows["label"] = 1 - rows["label"]
    np.save(path, rows)
    with pytest.raises(DataError, match=r"train\.index\.npy: its sha256 is not the manifest's"):
        repack(photos, tmp_path / "small", max_side=32)


@needs_native
def test_a_tar_that_says_sizes_in_another_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    with tarfile.open(tmp_path / "foreign" / "train-0.tar", "w") as tar:
        for n in range(2):
            image = as_jpeg(noise(30, 30, n))
            for name, content in ((f"{n}.jpg", image), (f"{n}.cls", str(n).encode())):
                member = tarfile.TarInfo(name)
                member.size, member.pax_headers = len(content), {"size": str(len(content))}
                tar.addfile(member, io.BytesIO(content))
    source, _ = adopt_shards(tmp_path / "foreign", Adoption())
    with pytest.raises(DataError, match=r"train-0\.tar: its members have headers of a kind that cannot be rewritten"):
        repack(source, tmp_path / "marked", restart=4)
    assert not list((tmp_path / "marked").rglob("*.tar"))


Change = Callable[[DatasetManifest, Path], DatasetManifest]


def merged(manifest: DatasetManifest, folder: Path) -> DatasetManifest:
    return merge_datasets([{"path": str(manifest.folder)}], folder / "merged", folder)[0]


def streamed(manifest: DatasetManifest, _: Path) -> DatasetManifest:
    return dataclasses.replace(manifest, streams={"train": ["https://host/0.tar"]})


@pytest.mark.parametrize(
    ("change", "message"), [(merged, "refers to shards of other data sets"), (streamed, "are streamed and have no index")]
)
def test_what_has_no_shards_of_its_own_is_refused(
    change: Change, message: str, photos: DatasetManifest, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        repack(change(photos, tmp_path), tmp_path / "marked", restart=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which data set and where to: `shardline repack IN OUT --restart 4`."),
        (["IN"], "say which data set and where to"),
        (["IN", "OUT"], "nothing to change: say --restart N, --max-side PIXELS, or both."),
        (["IN", "IN", "--restart=4"], "IN: a data set cannot be repacked into its own folder; give another one."),
        (["IN", "s3://bucket/out", "--restart=4"], "s3://bucket/out: a data set cannot be written there."),
        (["OUT", "IN", "--restart=4"], "OUT: no data set there"),
        (["IN", "OUT", "--restart=0"], "`dataset.restart` is 0; it must be 1 or more and at most 65535."),
        (["IN", "OUT", "--restart=4", "--workers=0"], "`--workers` is 0; it must be 1 or more."),
        (["IN", "OUT", "--restrat=4"], "unknown option `--restrat`. Did you mean `--restart`?"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, photos: DatasetManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"IN": str(photos.folder), "OUT": str(tmp_path / "out")}
    assert main(["repack", *(places.get(word, word) for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word, path in places.items():
        line = line.replace(path, word)
    assert line.startswith(f"shardline: error: {message}")


def test_where_nothing_can_set_markers_one_line_says_so(
    photos: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_jpeg", None)
    assert main(["repack", str(photos.folder), str(tmp_path / "out"), "--restart=4"]) == 2
    assert capsys.readouterr().err.startswith("shardline: error: `dataset.restart` needs the native decoder")
    with pytest.raises(ConfigError):
        repack(photos, tmp_path / "out", restart=4)
    assert not (tmp_path / "out").exists()
