import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.config import Config, DatasetConfig, LossConfig, ModelConfig, OptimizerConfig, SchedulerConfig
from pipeline.manifest import DatasetManifest
from pipeline.run import RunRecord
from pipeline.tracking import provenance
from pipeline.tracking.provenance import describe_dataset, describe_run, parameters, settings


def test_parameters_are_few_and_name_what_differs() -> None:
    plain = parameters(Config())
    assert len(plain) <= 6
    assert {"model", "lr", "seed", "max_epochs"} <= plain.keys()
    other = parameters(Config(loss=LossConfig(pos_weight="balanced"), model=ModelConfig(width=0.5)))
    assert other.keys() - plain.keys() == {"pos_weight", "width"}


def test_two_settings_of_one_name_have_their_whole_keys() -> None:
    both = Config(optimizer=OptimizerConfig(args={"x": 1}), scheduler=SchedulerConfig(args={"x": 2, "y": 3}))
    found = parameters(both)
    assert (found["optimizer.args.x"], found["scheduler.args.x"], found["y"]) == ("1", "2", "3")
    assert "x" not in found


def test_settings_that_cannot_change_the_weights_are_no_parameters() -> None:
    assert parameters(Config(name="another", runs_dir="elsewhere")) == parameters(Config())


def test_a_run_says_its_code_packages_machine_and_command(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "train", "--dataset.path", "https://ann:secret@host/data"])
    tags = describe_run(dataclasses.replace(record, world_size=16))
    assert tags["mlflow.source.name"] == "shardline train --dataset.path https://***@host/data"
    assert tags["world_size"] == "16"
    assert "cores" in tags["hardware"]
    assert "GiB" in tags["hardware"]
    assert "torch 2" in tags["versions"]
    assert len(tags["packages.sha256"]) == 64


def test_packages_have_a_digest_without_a_lock_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked = provenance.packages_sha256()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a/b/c.py"))
    assert len(provenance.packages_sha256()) == 64
    assert provenance.packages_sha256() != locked


def test_no_password_of_an_address_gets_into_the_configuration() -> None:
    merged = [{"path": "s3://key:secret@bucket/a"}]
    config = Config(dataset=DatasetConfig(path="https://ann:secret@host/data", merge=merged))
    assert "secret" not in json.dumps([settings(config), parameters(config)])


def test_a_remote_data_set_says_where_it_lies(tiny_dataset: DatasetManifest) -> None:
    remote = dataclasses.replace(tiny_dataset, url="s3://ann:secret@bucket/pets")
    train = next(entry for entry in describe_dataset(remote) if entry["context"] == "train")
    assert (train["name"], train["source_type"], train["source"]) == ("pets/train", "s3", '{"uri": "s3://***@bucket/pets"}')
    assert train["digest"] == tiny_dataset.digest[:36]
