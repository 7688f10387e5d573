"""`shardline export`: the best checkpoint becomes RUN/export/model.onnx, if and only if it passes lint and parity."""

import dataclasses
import hashlib
import platform
from pathlib import Path

import onnx
import onnxruntime
import torch

import pipeline
from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError
from pipeline.export.graph import export_graph, require_clean
from pipeline.export.parity import Parity, compare, describe_failure
from pipeline.files import move_aside, write_bytes, write_json
from pipeline.manifest import FORMAT_VERSION, DatasetManifest
from pipeline.models.sequential import network_for
from pipeline.preprocess import PreprocessSpec
from pipeline.run import RunRecord
from pipeline.task import Task, task_of
from pipeline.tracking.run import open_tracker
from pipeline.training.checkpoint import load_network_weights

MODEL = Path("export/model.onnx")
PARITY = Path("export/parity.json")
REFUSED = Path("export/parity-refused.json")


def export(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> Parity:
    """Export, lint, compare on the evaluation split and publish. Raises GateError and publishes nothing when one says no."""
    task = task_of(manifest, config)
    network = network_for(config, manifest, spec, pretrained=False)
    network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
    for path in (config.run_dir / MODEL, config.run_dir / PARITY):
        if path.is_file():
            move_aside(path)
    model = export_graph(network, task, spec, config.export.opset, _metadata(manifest, task, spec, record))
    require_clean(model, spec, config.export.opset)
    content = model.SerializeToString(deterministic=True)
    dataset = ShardDataset(manifest, manifest.evaluation_split, spec, config=config.data)
    parity = compare(network, task, content, hashlib.sha256(content).hexdigest(), dataset, config.export)
    if not parity.passed:
        write_json(config.run_dir / REFUSED, dataclasses.asdict(parity))
        raise GateError(f"{describe_failure(parity)}. Nothing was published; see {config.run_dir / REFUSED}.")
    (config.run_dir / REFUSED).unlink(missing_ok=True)
    write_json(config.run_dir / PARITY, dataclasses.asdict(parity))
    write_bytes(config.run_dir / MODEL, content)
    _log(config, record, parity, len(content))
    inputs = record.inputs_of("export", config, manifest.evaluation_split)
    record.finish_stage("export", inputs, [config.run_dir / MODEL, config.run_dir / PARITY])
    return parity


def _metadata(manifest: DatasetManifest, task: Task, spec: PreprocessSpec, record: RunRecord) -> dict[str, object]:
    assert record.best is not None
    return {
        "format_version": FORMAT_VERSION,
        "class_names": manifest.class_names,
        "task": task.kind,
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "data_digest": manifest.digest,
        "job_id": record.job_id,
        "mlflow_run_id": record.mlflow["run_id"] or "",
        "checkpoint_sha256": record.best["sha256"],
        "git_commit": record.git["commit"] or "",
        "versions": {
            "shardline": pipeline.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _log(config: Config, record: RunRecord, parity: Parity, num_bytes: int) -> None:
    tracker = open_tracker(config, record, status=None)
    worst = max(case.max_abs for case in parity.cases)
    figures = {
        "onnx/top1_agreement": parity.top1_agreement,
        "onnx/max_abs_difference": worst,
        "onnx/megabytes": num_bytes / 1e6,
    }
    tracker.log_final(figures)
    for name in (MODEL, PARITY):
        tracker.log_file(config.run_dir / name, "export")
    tracker.finish()
