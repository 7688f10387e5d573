"""Everything a user can get wrong: exit code 2, one line that names the thing and the remedy, and nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.files import locked
from tests.processes import shardline

DATA = "--dataset.path=data/digits"


@pytest.fixture(scope="module")
def bare_workspace(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of the digits, and no run."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(workspace / "data/digits", folder / "data/digits")
    return folder


@pytest.fixture
def inside(bare_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace as the current folder, with no PROCS from outside."""
    monkeypatch.chdir(bare_workspace)
    monkeypatch.delenv("PROCS", raising=False)
    return bare_workspace


@pytest.fixture
def own_data(inside: Path, tmp_path: Path) -> Path:
    """A copy of the digits' shards that a test may damage."""
    return Path(shutil.copytree(inside / "data/digits", tmp_path / "digits"))


def fails_with(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """`arguments` must end with exit code 2 and exactly one line on stderr that matches `message`."""
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no verb 'trian'. Did you mean 'train'"),
        (["train", "--trainer.max_epoch=3"], "unknown option `--trainer.max_epoch`. Did you mean `--trainer.max_epochs`"),
        (["train", "--trainer.max_epochs=few"], "`trainer.max_epochs`: Expected a int. Got value: few"),
        (["train", DATA, "--optimizer.name=SDG"], "`optimizer.name` is 'SDG'.* Did you mean 'SGD'"),
        (["train", DATA, "--scheduler.name=OneCycle"], "`scheduler.name` is 'OneCycle'.* Did you mean 'OneCycleLR'"),
        (["train", DATA, '--optimizer.args={"momentun": 0.9}'], "SGD has no such argument. Did you mean 'momentum'"),
        (["train", DATA, "--data.global_batch_size=63"], "63, which 2 processes cannot share equally. Set it to 62 or 64"),
        (["train", DATA, "--data.global_batch_size=2000"], "train split has 1069 samples, fewer than"),
        (["train", DATA, "--model.channels=[8,8,8,8,8]"], "5 stages, but a 16 x 16 image .* Use at most 4 stages"),
        (["train", "--dataset.path=nowhere"], "nowhere: no data set there .* Make it with `shardline shard`"),
        (["check", DATA, "--check.skip=[overfitt]"], "names 'overfitt', which is no check. Did you mean 'overfit'"),
        (["evaluate", DATA, "--name=never"], "runs/never: no run there .* Run `shardline train` first"),
        (["export", DATA, "--name=never"], "runs/never: no run there .* Run `shardline train` first"),
        (["shard", "--dataset.source=nowhere", "--name=new"], "nowhere: no such folder. `dataset.source` is"),
        (["train", "--config=nowhere.yaml"], "nowhere.yaml: no such configuration file. Bundled ones: cifar10, digits,"),
        (["train", DATA, "--name=../elsewhere"], "`name` is '../elsewhere'; it must be a plain folder name"),
        (["predict", "nowhere.onnx", "image.jpg"], "nowhere.onnx: no such model file"),
        (["verify", "nowhere.onnx"], "nowhere.onnx: no such data set folder or model file"),
        (["verify", "n" * 300], "File name too long. No file can have such a name"),
        (["predict", "n" * 300, "image.jpg"], "File name too long. No file can have such a name"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(
    inside: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:

    def runs() -> set[str]:
        # What other tests have trained may still be on its way to MLflow.
        names = {path.name for path in (inside / "runs").glob("*") if path.suffix != ".lock"}
        return {name for name in names if not name.removeprefix(".").startswith(("mlflow.db", "mlartifacts"))}

    before = runs()
    fails_with(capfd, arguments, message)
    assert runs() == before


def test_a_misspelt_key_in_the_file_is_named_with_the_nearest(
    inside: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  chanels: [8]\n")
    fails_with(capfd, ["train", f"--config={config}"], "mine.yaml: unknown key `model.chanels`. Did you mean `model.channels`")


@pytest.mark.parametrize("verb", ["verify", "check", "train"])
def test_a_truncated_shard_is_named(own_data: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    shard = own_data / "train-000000.tar"
    os.truncate(shard, shard.stat().st_size - 1000)
    fails_with(
        capfd,
        [verb, f"--dataset.path={own_data}"],
        "train-000000.tar: holds .* bytes but the manifest says .* [Cc]opy it again",
    )


@pytest.mark.parametrize("verb", ["verify", "check", "train"])
def test_a_label_outside_the_classes_is_named(own_data: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    rows = np.load(own_data / "train.index.npy")
    rows["label"][17] = 10
    np.save(own_data / "train.index.npy", rows)
    assert main([verb, f"--dataset.path={own_data}"]) == 2
    assert "train.index.npy: sample 17 has label 10, outside the 10 classes (0 to 9)" in capfd.readouterr().err


def test_verify_finds_a_label_outside_the_classes_in_a_shard(own_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shard = own_data / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    name = content.index(b".cls")
    content[(name // 512 + 1) * 512] = ord("x")
    shard.write_bytes(content)
    assert main(["verify", str(own_data)]) == 2
    assert re.search(r"val-000000.tar: sample \S+ has 'x' in its .cls member, not a class number", capfd.readouterr().err)


def test_too_many_corrupt_images_are_named_and_no_data_set_is_made(
    inside: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for class_name in ("cat", "dog"):
        folder = tmp_path / "images" / class_name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.jpg")
    bad = tmp_path / "images/dog/3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    destination = tmp_path / "shards"
    arguments = ["shard", f"--dataset.source={tmp_path / 'images'}", f"--dataset.path={destination}"]
    fails_with(
        capfd, arguments, r"1 of 10 images cannot be decoded, .*: dog/3.jpg \(.*\). All of them are in .*/rejected.jsonl"
    )
    assert sorted(path.name for path in destination.iterdir()) == [".partial", "rejected.jsonl"]
    assert main([*arguments, "--max-rejected=0.1"]) == 0
    assert "rejected  1 " in capfd.readouterr().out
    assert not (destination / ".partial").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_without_an_image_that_rots_in_its_shard_and_names_it(own_data: Path, workers: int) -> None:
    rows = np.load(own_data / "train.index.npy")
    with (own_data / "train-000000.tar").open("r+b") as shard:
        shard.seek(int(rows[5]["offset"]))
        shard.write(b"no image")
    arguments = ["train", f"--dataset.path={own_data}", f"--data.num_workers={workers}", "--trainer.max_epochs=2"]
    done = shardline(*arguments, cwd=own_data.parent)
    assert done.returncode == 0, done.stderr
    ledgers = sorted((own_data.parent / "runs/digits/bad_samples").glob("*.jsonl"))
    found = [json.loads(line) for path in ledgers for line in path.read_text().splitlines()]
    assert found  # the tail that an epoch drops may hold it, but not that of both
    assert {(line["shard"], line["index"]) for line in found} == {("train-000000.tar", 5)}
    assert re.fullmatch(r"00000005-digit-\d+", found[0]["key"])
    done = shardline(*arguments, "--fresh", "--data.max_bad_share=0", cwd=own_data.parent)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(r"1 of an epoch's \d+ samples can no longer be decoded .* `shardline verify`", line)


def test_a_run_folder_locked_by_another_job_is_refused(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with locked(inside / "runs/busy"):
        for verb in ("check", "train"):
            fails_with(
                capfd, [verb, DATA, "--name=busy"], r"runs/busy is locked by another job \(process \d+ on .*\). Wait until"
            )


def with_mount(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own; skip the test where that is not allowed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    script = f'set -e; shardline() {{ {sys.executable} -m pipeline "$@"; }}; {script}'
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", ["shard --dataset.path=frozen/digits", f"check --runs_dir=frozen {DATA}"])
def test_a_read_only_folder_is_named(inside: Path, command: str) -> None:
    done = with_mount(
        f"mkdir -p frozen; mount -t tmpfs none frozen; mount -o remount,ro frozen; shardline {command}", cwd=inside
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search("frozen/.*: Read-only file system. .* choose another folder", line)


def test_a_full_disk_leaves_nothing_half_written_and_a_larger_one_is_gone_on_with(inside: Path) -> None:
    done = with_mount(
        "mkdir -p small; mount -t tmpfs -o size=2500k none small;"
        "shardline shard --dataset.path=small/digits || code=$?; find small -type f; echo $code;"
        "mount -o remount,size=20m small; shardline shard --dataset.path=small/digits; ls -A small/digits",
        cwd=inside,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search("small/digits: No space left on device. The disk is full: free some space", line)
    left, after = done.stdout.split("\n2\n")
    assert all(path == "small/.digits.lock" or "/.partial/" in path for path in left.split())
    assert ".tmp" not in left
    assert "going on with what an interrupted run has done" in after
    assert after.split()[-8:] == sorted(path.name for path in (inside / "data/digits").iterdir())


def test_predict_answers_for_the_good_images_and_names_the_bad(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], chain: dict[str, str]
) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    model = str(workspace / "runs/digits/export/model.onnx")
    assert main(["predict", model, str(tmp_path / "bad.png"), str(tmp_path / "good.png"), "--json"]) == 2
    said = capfd.readouterr()
    bad, good = json.loads(said.out)
    assert "error" in bad
    assert good["label"] in good["probabilities"]
    (line,) = said.err.splitlines()
    assert "bad.png: cannot be decoded" in line
