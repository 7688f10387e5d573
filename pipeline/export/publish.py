"""`shardline export`: the best checkpoint becomes RUN/export/model.onnx, if and only if it passes lint and parity."""

import dataclasses
import hashlib
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import nn

import pipeline
from pipeline.config import Config
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError
from pipeline.export.graph import export_graph, require_clean
from pipeline.export.parity import Parity, compare, decodable, describe_failure
from pipeline.files import move_aside, write_bytes, write_json
from pipeline.golden import GOLDEN, GoldenVectors, awkward_images, decode_all
from pipeline.manifest import FORMAT_VERSION, DatasetManifest
from pipeline.models.sequential import network_for
from pipeline.preprocess import PreprocessSpec
from pipeline.report.run_page import write_report
from pipeline.run import RunRecord
from pipeline.task import Task, task_of
from pipeline.tracking.run import open_tracker
from pipeline.training.checkpoint import load_network_weights
from pipeline.training.evaluate import RESULT as EVALUATION

MODEL = Path("export/model.onnx")
PARITY = Path("export/parity.json")
EXAMPLE = Path("export/example.npy")
GOLDEN_PATH = MODEL.with_name(GOLDEN)
REFUSED = Path("export/parity-refused.json")


def export(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> Parity:
    """Export, lint, compare on the evaluation split and publish. Raises GateError and publishes nothing when one says no."""
    task = task_of(manifest, config)
    network = network_for(config, manifest, spec, pretrained=False)
    network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
    for path in (MODEL, PARITY, GOLDEN_PATH):
        if (config.run_dir / path).is_file():
            move_aside(config.run_dir / path)
    model = export_graph(network, task, spec, config.export.opset, _metadata(manifest, task, spec, record))
    require_clean(model, spec, config.export.opset)
    content = model.SerializeToString(deterministic=True)
    dataset = ShardDataset(manifest, manifest.evaluation_split, spec, config=config.data)
    parity = compare(network, task, content, hashlib.sha256(content).hexdigest(), dataset, config.export)
    if not parity.passed:
        write_json(config.run_dir / REFUSED, dataclasses.asdict(parity))
        raise GateError(f"{describe_failure(parity)}. Nothing was published; see {config.run_dir / REFUSED}.")
    (config.run_dir / REFUSED).unlink(missing_ok=True)
    _, image = next(decodable(dataset, range(len(dataset))))  # (3, H, W)
    golden = golden_vectors(network, task, spec, image).to_bytes()
    parity = dataclasses.replace(parity, golden_sha256=hashlib.sha256(golden).hexdigest())
    write_bytes(config.run_dir / GOLDEN_PATH, golden)
    write_json(config.run_dir / PARITY, dataclasses.asdict(parity))
    write_bytes(config.run_dir / MODEL, content)
    _log(config, manifest, record, parity, task, image.unsqueeze(0).numpy())
    inputs = record.inputs_of("export", config, manifest.evaluation_split)
    record.finish_stage("export", inputs, [config.run_dir / path for path in (MODEL, PARITY, GOLDEN_PATH)])
    return parity


def golden_vectors(network: nn.Module, task: Task, spec: PreprocessSpec, image: torch.Tensor) -> GoldenVectors:
    """What the trained network says of one image, uint8 (3, H, W), in forms that are awkward to decode."""
    encoded = awkward_images(Image.fromarray(image.permute(1, 2, 0).numpy()))
    pixels = decode_all(encoded, spec)  # (N, H, W, 3)
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())  # (N, num_outputs)
    return GoldenVectors([*encoded], [*encoded.values()], pixels, task.probabilities(logits).numpy())


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


def _log(
    config: Config, manifest: DatasetManifest, record: RunRecord, parity: Parity, task: Task, image: npt.NDArray[np.uint8]
) -> None:
    """Have the model registered, with `image`, (1, 3, H, W), as its example."""
    content = io.BytesIO()
    np.save(content, image)
    write_bytes(config.run_dir / EXAMPLE, content.getvalue())
    tracker = open_tracker(config, record, status=None)
    for path in (PARITY, GOLDEN_PATH):
        tracker.log_file(config.run_dir / path, "export")
    tracker.log_model(_model_entry(config, record, parity, task))
    write_report(config, manifest, record, tracker)
    tracker.finish("FINISHED")


def _model_entry(config: Config, record: RunRecord, parity: Parity, task: Task) -> dict[str, Any]:
    """What `registry.register_model` makes a version of. The `onnx/*` figures are told with the model, and nowhere else."""
    assert record.best is not None
    worst = max(case.max_abs for case in parity.cases)
    evaluation = _evaluation_of(config, record)
    result = "not evaluated before its export"  # a version keeps its description
    if evaluation:
        result = f"{evaluation['split']} accuracy {float(evaluation['accuracy']):.4f} on {evaluation['num_samples']} images"
    return {
        "name": config.registered_model,
        "model": str(MODEL),
        "example": str(EXAMPLE),
        "task": task.kind,
        "description": f"{result}; answers as the trained network does (largest difference {worst:.0e})",
        "params": {"opset": str(config.export.opset)},
        "metrics": {
            "onnx/top1_agreement": parity.top1_agreement,
            "onnx/max_abs_difference": worst,
            "onnx/megabytes": (config.run_dir / MODEL).stat().st_size / 1e6,
        },
        "tags": {
            "onnx_sha256": parity.sha256,
            "checkpoint_sha256": record.best["sha256"],
            "data_digest": record.data_digest,
            "job_id": record.job_id,
            "run_name": config.name,
            "git_commit": record.git["commit"] or "",
            **({"accuracy": evaluation["accuracy"]} if evaluation else {}),
        },
        "requirements": [f"onnxruntime=={onnxruntime.__version__}"],
        "time": int(time.time() * 1000),
    }


def _evaluation_of(config: Config, record: RunRecord) -> dict[str, str]:
    """Accuracy, split and number of samples of the evaluation, where it was of this checkpoint."""
    path = config.run_dir / EVALUATION
    result = json.loads(path.read_text()) if path.is_file() else {}
    if record.best is None or result.get("checkpoint_sha256") != record.best["sha256"]:
        return {}
    return {name: str(result[name]) for name in ("split", "num_samples", "accuracy")}
