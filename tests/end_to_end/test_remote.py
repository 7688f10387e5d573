"""Training from a real S3 server that fails as servers and networks do, and from shards without an index."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import shardline
from tests.s3 import Faults, environment, faulty_proxy, s3_server, upload
from tests.web import web_server

SHORT = ("--trainer.max_epochs", "2", "--data.shuffle_shards", "1")


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The network's tensors at the end of a training."""
    checkpoint = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    return dict(checkpoint["state_dict"])


@pytest.fixture(scope="module")
def shards(workspace: Path) -> Path:
    """The digits in many small shards."""
    done = shardline("shard", "--dataset.path=data/small", "--dataset.samples_per_shard=150", cwd=workspace)
    assert done.returncode == 0, done.stderr
    return workspace / "data/small"


@pytest.fixture(scope="module")
def local(workspace: Path, shards: Path) -> dict[str, torch.Tensor]:
    """What training on the shards on disk ends with."""
    done = shardline("train", "--name=local", f"--dataset.path={shards}", *SHORT, cwd=workspace)
    assert done.returncode == 0, done.stderr
    return weights_of(workspace / "runs/local")


@pytest.fixture
def s3(shards: Path, tmp_path: Path) -> Iterator[int]:
    """An S3 server that holds the shards in the bucket `digits`."""
    with s3_server(tmp_path) as port:
        upload(port, shards, "digits")
        yield port


def test_training_from_a_failing_s3_server_ends_with_the_weights_of_local_training(
    workspace: Path, local: dict[str, torch.Tensor], s3: int, tmp_path: Path
) -> None:
    faults = Faults(share_failing=0.1, cut_once=lambda path: path.endswith(".tar"))
    with faulty_proxy(s3, faults) as proxy:
        done = shardline(
            "train",
            "--name=s3",
            "--dataset.path=s3://digits",
            "--data.num_workers=1",
            f"--data.cache_dir={tmp_path / 'cache'}",
            *SHORT,
            cwd=workspace,
            **environment(proxy),
        )
    assert done.returncode == 0, done.stderr
    what = [what for _, what in faults.log]
    assert what.count("cut") == 11  # eight training shards, three of validation
    assert what.count("500") + what.count("503") > 0
    remote = weights_of(workspace / "runs/s3")
    assert remote.keys() == local.keys()
    assert all(torch.equal(remote[name], local[name]) for name in local)
    assert not list((tmp_path / "cache/shards").glob("*.part"))


@pytest.mark.parametrize(
    ("path", "port", "message"),
    [
        ("s3://digits/nowhere", "", r"s3://digits/nowhere/dataset.json: is not there. Check the address"),
        ("s3://digits", "1", r"s3://digits/dataset.json: could not be read in 8 attempts"),
    ],
)
def test_a_remote_data_set_that_cannot_be_read_is_one_line(
    path: str, port: str, message: str, workspace: Path, s3: int, tmp_path: Path
) -> None:
    done = shardline(
        "train",
        f"--dataset.path={path}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        cwd=workspace,
        **environment(int(port or s3)),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert "loopback-only" not in line


def test_shards_without_an_index_are_trained_on_from_the_web(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "streamed"
    folder.mkdir()
    for name in ("val-000000.tar", "test-000000.tar"):
        os.link(workspace / "data/digits" / name, folder / name)
    settings = (f"--dataset.path={folder}", "--name=streamed", "--data.num_workers=1", "--trainer.max_epochs=3")
    with web_server(workspace / "data/digits") as port:
        stream = f"http://127.0.0.1:{port}/train-{{000000..000001}}.tar"
        done = shardline("index", str(folder), "--stream", stream, cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert "a sample may come twice or not at all" in " ".join(done.stdout.split())
        done = shardline("train", *settings, cwd=workspace)
        assert done.returncode == 2
        assert "say `data.steps_per_epoch`" in done.stderr
        done = shardline("train", *settings, "--data.steps_per_epoch=16", cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert "its shards have no index" in done.stdout
        done = shardline("replay", "runs/streamed", "--step=3", cwd=workspace)
        assert done.returncode == 2
        assert "were streamed" in done.stderr


@pytest.mark.slow
def test_the_whole_chain_runs_on_a_stream(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "streamed"
    folder.mkdir()
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar", "test-000000.tar"):
        os.link(workspace / "data/digits" / name, folder / name)
    settings = (f"--dataset.path={folder}", "--name=chain-of-streams", "--trainer.max_epochs=6", "--data.steps_per_epoch=16")
    assert shardline("index", str(folder), "--stream", "train-*.tar", cwd=workspace).returncode == 0
    for verb in ("check", "train", "evaluate", "export"):
        done = shardline(verb, *settings, cwd=workspace)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
    result = json.loads((workspace / "runs/chain-of-streams/evaluation/test.json").read_text())
    assert result["accuracy"] > 0.9
