import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.config import Config
from pipeline.errors import GateError, ModelError, RunError
from pipeline.export import publish
from pipeline.files import sha256_of, write_json
from pipeline.golden import GoldenVectors
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.run import BEST, RunRecord
from pipeline.serving.predictor import verify_model
from pipeline.training.evaluate import RESULT
from tests.unit.export.test_parity import change_the_weights

METADATA = {
    *("format_version", "class_names", "task", "preprocess", "preprocess_hash", "data_digest", "job_id", "mlflow_run_id"),
    *("checkpoint_sha256", "git_commit", "versions", "metrics", "license", "precision"),
}


class Tracker:
    """Stands where MLflow would be told."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.models: list[dict[str, Any]] = []

    def log_model(self, entry: dict[str, Any]) -> None:
        self.models.append(json.loads(json.dumps(entry)))

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files.append(f"{folder}/{path.name}")

    def finish(self, status: str) -> None:
        pass


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    found = Tracker()
    monkeypatch.setattr(publish, "open_tracker", lambda config, record, status: found)
    return found


@pytest.fixture
def record(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, tiny_network: nn.Sequential
) -> RunRecord:
    """A finished training whose best checkpoint holds `tiny_network`."""
    identity = (tiny_config.identity(), tiny_dataset.digest, tiny_spec.hash())
    record = RunRecord("tiny", "a" * 32, *identity, git={"commit": None}, folder=tiny_config.run_dir)
    facts = dict(zip(("config_digest", "data_digest", "preprocess_hash"), identity, strict=True))
    weights = {f"network.{name}": tensor for name, tensor in tiny_network.state_dict().items()}
    path = tiny_config.run_dir / BEST
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": weights, "shardline": {"format_version": 1, **facts}}, path)
    record.outcome = "done"
    record.best = {"path": str(BEST), "sha256": sha256_of(path), "monitor": "val/accuracy", "value": 1.0}
    return record


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch, exported_model: onnx.ModelProto) -> None:
    """The model that was exported once, in place of an export of 3 seconds."""
    monkeypatch.setattr(publish, "export_graph", lambda *arguments: exported_model)


def exports(config: Config) -> list[str]:
    folder = config.run_dir / "export"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_proved_model_is_published_and_tracked(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> None:
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    assert exports(tiny_config) == ["example.npy", "golden.npz", "model.onnx", "parity.json"]
    parity = json.loads((tiny_config.run_dir / publish.PARITY).read_text())
    assert parity["passed"]
    assert parity["sha256"] == sha256_of(tiny_config.run_dir / publish.MODEL)
    assert tracker.files == ["export/parity.json", "export/golden.npz", "/report.html", "/model_card.md"]
    inputs = record.inputs_of("export", tiny_config, "test")
    assert record.stage_is_done("export", inputs)
    metadata = {entry.key: entry.value for entry in onnx.load(tiny_config.run_dir / publish.MODEL).metadata_props}
    assert set(metadata) == {f"shardline.{name}" for name in METADATA}
    assert record.best is not None
    assert metadata["shardline.checkpoint_sha256"] == record.best["sha256"]
    assert metadata["shardline.data_digest"] == tiny_dataset.digest
    assert metadata["shardline.job_id"] == record.job_id
    assert json.loads(metadata["shardline.preprocess"])["mean"] == tiny_spec.mean


@pytest.mark.usefixtures("quick_export")
def test_verify_replays_the_golden_vectors_of_the_trained_network(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> None:
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    model, golden = tiny_config.run_dir / publish.MODEL, tiny_config.run_dir / publish.GOLDEN_PATH
    assert verify_model(model)["replayed"].startswith("11 images of awkward kinds: the same pixels, probabilities within ")
    with golden.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match=r"golden\.npz: is not the file that was exported with the model"):
        verify_model(model)
    wrong = GoldenVectors(["plain"], [b""], np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros((1, 3), dtype=np.float32))
    golden.write_bytes(wrong.to_bytes())
    (tiny_config.run_dir / publish.PARITY).unlink()
    with pytest.raises(ModelError, match=r"golden\.npz: belongs to another model"):
        verify_model(model)


@pytest.mark.usefixtures("quick_export")
def test_the_model_is_registered_with_where_it_came_from_and_how_good_it_is(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> None:
    assert record.best is not None
    result = {"split": "test", "num_samples": 12, "accuracy": 0.75, "checkpoint_sha256": record.best["sha256"]}
    write_json(tiny_config.run_dir / RESULT, result)
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    (entry,) = tracker.models
    assert entry["name"] == "tiny"
    assert entry["metrics"]["onnx/top1_agreement"] == 1.0
    assert entry["description"].startswith("test accuracy 0.7500 on 12 images; ")
    assert entry["tags"] == {
        "onnx_sha256": sha256_of(tiny_config.run_dir / publish.MODEL),
        "checkpoint_sha256": record.best["sha256"],
        "data_digest": tiny_dataset.digest,
        "job_id": record.job_id,
        "run_name": "tiny",
        "git_commit": "",
        "accuracy": "0.75",
    }
    example = np.load(tiny_config.run_dir / entry["example"])
    assert (example.shape, example.dtype) == ((1, 3, 16, 16), np.uint8)
    assert example.std() > 5  # a picture, not an empty one

    write_json(tiny_config.run_dir / RESULT, {**result, "checkpoint_sha256": "0" * 64})
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    assert tracker.models[1]["description"].startswith("not evaluated before its export; ")
    assert "accuracy" not in tracker.models[1]["tags"]


@pytest.mark.usefixtures("quick_export")
def test_a_refused_model_has_no_file_under_a_final_name(
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    tiny_spec: PreprocessSpec,
    record: RunRecord,
    tracker: Tracker,
    exported_model: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)  # an earlier model is there, proved under other settings
    tracker.files.clear()
    monkeypatch.setattr(publish, "export_graph", lambda *arguments: change_the_weights(exported_model, 3.0))
    strict = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, tolerance=1e-5))
    with pytest.raises(GateError, match=r"does not give the trained network's answers: .* Nothing was published") as refusal:
        publish.export(strict, tiny_dataset, tiny_spec, record)
    assert refusal.value.exit_code == 3
    assert exports(tiny_config) == ["parity-refused.json"]
    assert not json.loads((tiny_config.run_dir / publish.REFUSED).read_text())["passed"]
    assert tracker.files == []
    assert not record.stage_is_done("export", record.inputs_of("export", strict, "test"))


@pytest.mark.usefixtures("quick_export")
def test_a_graph_that_fails_its_lint_is_not_published(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> None:
    other: Any = dataclasses.replace(tiny_config, export=dataclasses.replace(tiny_config.export, opset=21))
    with pytest.raises(GateError, match="its opset is 20, not 21"):
        publish.export(other, tiny_dataset, tiny_spec, record)
    assert exports(tiny_config) == []


@pytest.mark.usefixtures("quick_export")
def test_an_export_that_breaks_down_leaves_the_earlier_model_aside_and_none_in_its_place(
    tiny_config: Config,
    tiny_dataset: DatasetManifest,
    tiny_spec: PreprocessSpec,
    record: RunRecord,
    tracker: Tracker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    earlier = (tiny_config.run_dir / publish.MODEL).read_bytes()

    def break_down(*arguments: object) -> onnx.ModelProto:
        raise RuntimeError("the exporter broke down")

    monkeypatch.setattr(publish, "export_graph", break_down)
    with pytest.raises(RuntimeError, match="broke down"):
        publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    assert exports(tiny_config) == []
    (aside,) = tiny_config.run_dir.glob("export.*")
    assert (aside / "model.onnx").read_bytes() == earlier
    assert verify_model(aside / "model.onnx")["proof"].startswith("top-1 agreement 1.0000"), "its proof went with it"


@pytest.mark.usefixtures("quick_export")
def test_a_checkpoint_that_is_not_what_training_left_costs_no_published_model(
    tiny_config: Config, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec, record: RunRecord, tracker: Tracker
) -> None:
    publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    before = exports(tiny_config)
    with (tiny_config.run_dir / BEST).open("ab") as file:
        file.write(b"more")
    with pytest.raises(RunError, match=r"best\.ckpt: is not the file that training left"):
        publish.export(tiny_config, tiny_dataset, tiny_spec, record)
    assert exports(tiny_config) == before
    assert {"model.onnx", "parity.json"} <= set(before)
