"""Importing MLflow costs seconds and making its database as many, so all tests share one file; each test has its own job."""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from pipeline.config import Config, ModelConfig, OptimizerConfig
from pipeline.run import RunRecord
from pipeline.tracking.deliver import Delivery
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import ARTIFACTS, DATABASE, Server, server_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

SIDE = 16


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds MLflow's database and artifacts."""
    return tmp_path_factory.mktemp("tracked") / "runs"


@pytest.fixture
def config(runs_dir: Path) -> Config:
    """A run of its own, with some settings that are not the defaults."""
    return Config(
        name=f"run-{uuid.uuid4().hex[:8]}",
        runs_dir=str(runs_dir),
        model=ModelConfig(channels=[8, 16]),
        optimizer=OptimizerConfig(args={"momentum": 0.5}),
    )


@pytest.fixture
def server(config: Config) -> Server:
    """The sqlite file in the runs folder."""
    return server_of(config)


@pytest.fixture
def record(config: Config) -> RunRecord:
    """A new job."""
    git = {"commit": "0" * 40, "dirty": True}
    made = RunRecord(config.name, uuid.uuid4().hex, "c" * 64, "d" * 64, "p" * 64, git=git, folder=config.run_dir)
    made.save()
    return made


@pytest.fixture
def open_here(config: Config, record: RunRecord, server: Server) -> Callable[[], RunTracker]:
    """A tracker of the job as a new try opens it, without the process that delivers."""

    def open_it() -> RunTracker:
        tracker = RunTracker(config.run_dir, server)
        tracker.begin(config, record, "RUNNING", [])
        return tracker

    return open_it


@pytest.fixture
def deliver_here(config: Config, server: Server) -> Callable[[], Delivery]:
    """Delivers what there is in this process."""

    def deliver() -> Delivery:
        delivery = Delivery(config.run_dir, server)
        delivery.round()
        return delivery

    return deliver


# ---- models ----


@dataclass(frozen=True)
class Registry:
    """MLflow, its address, and an experiment."""

    client: "MlflowClient"
    uri: str
    experiment_id: str

    def run(self, job_id: str = "") -> str:
        """A new run of its own job, which is going on."""
        run = self.client.create_run(self.experiment_id, tags={"shardline.job_id": job_id or uuid.uuid4().hex})
        return str(run.info.run_id)


@pytest.fixture(scope="session")
def registry(runs_dir: Path) -> Registry:
    """The same database, with an experiment of models."""
    server = Server(f"sqlite:///{runs_dir / DATABASE}", "registry", (runs_dir / ARTIFACTS).as_uri())
    client = server.client()
    return Registry(client, server.uri, str(client.create_experiment("registry", server.artifacts)))


@pytest.fixture
def run_dir(tmp_path: Path, exported_model: onnx.ModelProto) -> Path:
    """RUN with an exported model and its example."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "export").mkdir(parents=True)
    (folder / "export/model.onnx").write_bytes(exported_model.SerializeToString(deterministic=True))
    np.save(folder / "export/example.npy", np.full((1, 3, SIDE, SIDE), 40, np.uint8))
    return folder


def model_entry(run_dir: Path, name: str, **tags: str) -> dict[str, Any]:
    """What an export writes into the journal."""
    sha256 = hashlib.sha256((run_dir / "export/model.onnx").read_bytes()).hexdigest()
    facts = {"onnx_sha256": sha256, "checkpoint_sha256": "c" * 64, "data_digest": "d" * 64, "job_id": "a" * 32}
    return {
        "name": name,
        "model": "export/model.onnx",
        "example": "export/example.npy",
        "task": "single",
        "description": "**test accuracy 0.9722** on 360 images",
        "params": {"opset": "20"},
        "metrics": {"onnx/top1_agreement": 1.0, "onnx/megabytes": 0.25},
        "tags": {**facts, "accuracy": "0.9722", "split": "test", "num_samples": "360", **tags},
        "requirements": ["onnxruntime==1.32.0"],
        "time": 1_700_000_000_000,
    }
