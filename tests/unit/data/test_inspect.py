import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.config import DataConfig
from pipeline.data.inspect import as_json, format_bytes, inspect_dataset, require_writable, say_summary
from pipeline.data.partial import OWN_NAMES
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest, load_dataset
from tests.unit.data.handmade import Sample, make_dataset
from tests.unit.data.images import encode, noise


def picture(seed: int) -> bytes:
    return encode(Image.fromarray(noise(6, 8, seed)).resize((60, 45), Image.Resampling.BICUBIC), "JPEG", quality=90)


@pytest.fixture
def manifest(tmp_path: Path) -> DatasetManifest:
    """Two classes; one image of test is also in train, under the other class; one is broken."""
    train = [Sample(f"t{seed}", picture(seed), seed % 2) for seed in range(12)]
    test = [Sample("leak", picture(4), 1), Sample("own", picture(30), 0), Sample("broken", b"no image", 1)]
    return make_dataset(tmp_path / "data", {"train": train, "test": test}, ["cat", "dog"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_figure_is_in_the_file_for_machines(manifest: DatasetManifest) -> None:
    values = as_json(inspect_dataset(manifest, DataConfig(), 1))
    assert json.loads(json.dumps(values))["data_digest"] == manifest.digest
    test = values["splits"]["test"]
    assert test["class_counts"] == {"cat": 1, "dog": 2}
    assert test["class_shares"] == {"cat": 0.333333, "dog": 0.666667}
    assert (test["imbalance"], test["absent_classes"]) == (2.0, [])
    assert values["duplicates"]["leaks"] == [{"split": "test", "of": "train", "same_bytes": 1, "near_copies": 0}]
    (group,) = values["duplicates"]["groups"]
    assert (group["same_bytes"], group["labels_differ"], group["num_samples"]) == (True, True, 2)
    assert group["samples"] == [
        {"split": "train", "key": "t4", "labels": ["cat"]},
        {"split": "test", "key": "leak", "labels": ["dog"]},
    ]
    broken = values["suspicious"]["undecodable"]
    assert broken["number"] == 1
    assert broken["samples"] == [{"split": "test", "key": "broken", "labels": ["dog"], "reason": "cannot identify image file"}]
    assert values["findings"][0]["level"] == "problem"


def test_blank_images_are_no_copies_of_each_other(tmp_path: Path) -> None:
    white = encode(Image.new("RGB", (60, 45), "white"), "PNG")
    samples = [Sample(f"{n}", white, n % 2) for n in range(4)]
    inspection = inspect_dataset(
        make_dataset(tmp_path / "blank", {"train": samples, "test": samples}, ["a", "b"]), DataConfig(), 1
    )
    assert inspection.duplicates.groups == []
    assert len(inspection.figures.suspicious["blank"]) == 8


def test_the_verb_writes_two_files_whatever_it_finds_and_names_the_next_command(
    manifest: DatasetManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(manifest.folder)
    assert main(["inspect", str(manifest.folder), "--workers", "1", "--seed", "5"]) == 0
    after = files_of(manifest.folder)
    assert set(after) - set(before) == {"inspect.html", "inspect.json"}
    assert all(after[name] == content for name, content in before.items())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem  1 image (33.3 %) of test is byte-identical to images of train")
    assert lines[-5:] == [
        "data set inspected",
        f"  page      {manifest.folder}/inspect.html",
        f"  figures   {manifest.folder}/inspect.json",
        f"  findings  {len(json.loads(after['inspect.json'])['findings'])}",
        f"  next      shardline check --seed 5 --dataset.path {manifest.folder}",
    ]


def test_the_data_set_stays_whole_and_the_files_are_its_own(manifest: DatasetManifest) -> None:
    assert main(["inspect", str(manifest.folder / "dataset.json"), "--workers", "1"]) == 0
    assert load_dataset(manifest.folder).digest == manifest.digest
    assert [defects for _, defects in verify_dataset(manifest, 1) if defects] == []
    for name in ("inspect.html", "inspect.json", ".inspect.html.tmp", ".inspect.json.tmp"):
        assert OWN_NAMES.fullmatch(name)


def test_the_files_are_the_same_for_any_number_of_processes(manifest: DatasetManifest) -> None:
    found = set()
    for workers in ("1", "3", "1"):
        assert main(["inspect", str(manifest.folder), f"--workers={workers}"]) == 0
        found.add((manifest.folder / "inspect.html").read_bytes() + (manifest.folder / "inspect.json").read_bytes())
    assert len(found) == 1


def test_the_figures_do_not_depend_on_where_the_data_set_lies(manifest: DatasetManifest, tmp_path: Path) -> None:
    moved = load_dataset(shutil.copytree(manifest.folder, tmp_path / "elsewhere"))
    assert as_json(inspect_dataset(moved, DataConfig(), 1)) == as_json(inspect_dataset(manifest, DataConfig(), 1))


def test_the_page_can_go_elsewhere(manifest: DatasetManifest, tmp_path: Path) -> None:
    before = files_of(manifest.folder)
    (tmp_path / "out").mkdir()
    assert main(["inspect", str(manifest.folder), "--workers", "1", "--output", str(tmp_path / "out")]) == 0
    assert set(files_of(tmp_path / "out")) == {"inspect.html", "inspect.json"}
    assert files_of(manifest.folder) == before


def test_the_data_set_of_the_run_is_looked_at_where_none_is_named(
    manifest: DatasetManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--dataset.path", str(manifest.folder), "--workers", "1"]) == 0
    assert f"  next      shardline check --dataset.path {manifest.folder}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "no data set there"),
        (lambda folder: (folder / "train-000001.tar").unlink(), "train-000001.tar: shard is missing"),
        (lambda folder: (folder / "train-000001.tar").write_bytes(b"short"), "train-000001.tar: holds 5 bytes"),
        (lambda folder: (folder / "test.index.npy").write_bytes(b"short"), "test.index.npy: not an index"),
    ],
)
def test_a_damaged_data_set_is_a_mistake_to_mend(
    manifest: DatasetManifest, capsys: pytest.CaptureFixture[str], damage: object, line: str
) -> None:
    assert callable(damage)
    damage(manifest.folder)
    assert main(["inspect", str(manifest.folder), "--workers", "1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert not (manifest.folder / "inspect.html").exists()


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--output", "{}/no/such/folder"]])
def test_wrong_options_are_refused_before_the_work(
    manifest: DatasetManifest, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    arguments = [argument.format(manifest.folder.parent) for argument in arguments]
    assert main(["inspect", str(manifest.folder), *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(DataError, match="no permission to write"):
        require_writable(tmp_path)


def test_streamed_shards_cannot_be_looked_at(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", {}, ["a", "b"], streams={"train": ["https://example.org/a.tar"]})
    with pytest.raises(DataError, match="streamed and have no index"):
        inspect_dataset(manifest, DataConfig())


def test_the_summary_has_a_row_for_each_split(manifest: DatasetManifest, capsys: pytest.CaptureFixture[str]) -> None:
    say_summary(inspect_dataset(manifest, DataConfig(), 1))
    lines = capsys.readouterr().out.splitlines()
    header, train, test = lines[-3:]
    assert header.split()[:4] == ["split", "samples", "classes", "imbalance"]
    assert train.split()[:6] == ["train", "12", "2", "of", "2", "1"]
    assert test.split()[:6] == ["test", "3", "2", "of", "2", "2"]
    assert " 60 x 45 " in test


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1000, "1 kB"),
        (71_234, "71.2 kB"),
        (2.5e6, "2.5 MB"),
        (3e9, "3 GB"),
        (4e12, "4 TB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(number: float, text: str) -> None:
    assert format_bytes(number) == text
