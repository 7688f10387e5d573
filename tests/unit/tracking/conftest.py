"""One MLflow database for all tests of this folder: importing mlflow costs seconds, and so does making its tables."""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

if TYPE_CHECKING:
    from mlflow import MlflowClient

SIDE = 16


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
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A database with an experiment, and a folder of artifacts."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("registry", artifact_location=(folder / "artifacts").as_uri())
    return Registry(client, uri, str(experiment_id))


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
