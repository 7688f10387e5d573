"""`shardline export`: the best checkpoint becomes RUN/export/model.onnx, if and only if it passes lint and parity."""

import dataclasses
import functools
import hashlib
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from pipeline.console import say
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError, ModelError
from pipeline.export.calibration import calibration_batches, require_calibratable
from pipeline.export.contract import require_contract, require_metadata
from pipeline.export.graph import PREFIX, as_text, export_graph
from pipeline.export.lint import require_clean
from pipeline.export.parity import Parity, compare, decodable, describe_failure
from pipeline.export.precision import Judge
from pipeline.files import move_aside, write_bytes, write_json
from pipeline.golden import GOLDEN, GoldenVectors, awkward_images, decode_all
from pipeline.manifest import FORMAT_VERSION, DatasetManifest
from pipeline.models.sequential import network_for
from pipeline.predictor import verify_model
from pipeline.preprocess import PreprocessSpec
from pipeline.report.run_page import write_report
from pipeline.run import RunRecord
from pipeline.task import Task, task_of
from pipeline.tracking.run import open_tracker
from pipeline.training.checkpoint import load_network_weights
from pipeline.training.evaluate import RESULT as EVALUATION

FOLDER = Path("export")
MODEL = FOLDER / "model.onnx"
PARITY = FOLDER / "parity.json"
GOLDEN_PATH = FOLDER / GOLDEN
EXAMPLE = FOLDER / "example.npy"
REFUSED = FOLDER / "parity-refused.json"
PRECISIONS = FOLDER / "precisions.json"
# Between the accuracy of the evaluation, on its device in its precision, and that of the CPU in float32, of the same weights:
# TF32 and autocast put images that are near the edge of two answers on its other side.
EVALUATION_DIFFERENCE = {"32-true": 0.002, "bf16-mixed": 0.01, "16-mixed": 0.01}
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """The network of the best checkpoint and the images it is asked for: what every exported file is measured by."""

    config: Config
    manifest: DatasetManifest
    spec: PreprocessSpec
    record: RunRecord
    task: Task
    network: nn.Module
    dataset: ShardDataset  # of the evaluation split

    @classmethod
    def load(cls, config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> "Trained":
        """Read the best checkpoint of a run. Raises RunError where it is gone or not the one that training left."""
        network = network_for(config, manifest, spec, pretrained=False)
        network.load_state_dict(load_network_weights(record.best_checkpoint(), record))
        dataset = ShardDataset(manifest, manifest.evaluation_split, spec, config=config.data)
        return cls(config, manifest, spec, record, task_of(manifest, config), network.eval(), dataset)

    def probabilities(self, images: torch.Tensor) -> Probabilities:
        """What the trained network says of uint8 images (N, 3, H, W): (N, K)."""
        with torch.no_grad():
            return np.asarray(self.task.probabilities(self.network(images)).numpy())

    @functools.cached_property
    def example(self) -> torch.Tensor:
        """The first image of the evaluation split that can be decoded, uint8 (3, H, W)."""
        return next(decodable(self.dataset, range(len(self.dataset))))[1]


def export(config: Config, manifest: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> Parity:
    """Export, lint, compare on the evaluation split and publish. Raises GateError and publishes nothing when one says no."""
    require_calibratable(config, manifest)
    trained = Trained.load(config, manifest, spec, record)
    set_aside(config.run_dir / FOLDER)
    said = metadata_of(trained)
    model = export_graph(trained.network, trained.task, spec, config.export.opset, said)
    content = model.SerializeToString(deterministic=True)
    try:
        require_clean(model, spec, config.export.opset)
        require_contract(model, manifest, trained.task, spec)
        require_metadata(model, {f"{PREFIX}{key}": as_text(value) for key, value in said.items()})
        parity = prove(trained, content)
        golden = golden_vectors(trained.probabilities, spec, trained.example)
        require_verifiable(content, parity, golden)
    except GateError as error:
        raise _refused(trained, error) from error
    outputs = publish_folder(config.run_dir / FOLDER, content, parity, golden)
    outputs += publish_forms(trained, model, parity, golden)
    _log(trained, parity, outputs)
    record.finish_stage("export", record.inputs_of("export", config, manifest.evaluation_split), outputs)
    return parity


def prove(trained: Trained, content: bytes) -> Parity:
    """Compare the serialized model with the trained network, and that with its own evaluation. Raises GateError."""
    assert trained.record.best is not None
    sha256 = hashlib.sha256(content).hexdigest()
    parity = compare(trained.network, trained.task, content, sha256, trained.dataset, trained.config.export)
    parity = dataclasses.replace(
        parity,
        checkpoint_sha256=trained.record.best["sha256"],
        data_digest=trained.manifest.digest,
        preprocess_hash=trained.spec.hash(),
    )
    if not parity.passed:
        raise ParityError(describe_failure(parity), parity)
    parity = _beside_evaluation(trained, parity)
    if not parity.passed:
        raise ParityError(parity.reason, parity)
    return parity


class ParityError(GateError):
    """The model does not give the trained answers; `parity` says how far it is from them."""

    def __init__(self, message: str, parity: Parity) -> None:
        super().__init__(f"{message}.")
        self.parity = parity


def _beside_evaluation(trained: Trained, parity: Parity) -> Parity:
    """Hold the accuracy of the torch network against what `evaluate` measured of the same checkpoint.

    Where images are decoded or normalised otherwise than in training, the file and the network are wrong alike; this alone
    sees it.
    """
    evaluation = evaluation_of(trained)
    if not evaluation or evaluation["split"] != trained.dataset.split_name:
        return parity
    measured = float(evaluation["accuracy"])
    allowed = max(EVALUATION_DIFFERENCE[trained.config.trainer.precision], 1 / parity.num_samples)
    parity = dataclasses.replace(parity, evaluation={"accuracy": measured, "allowed_difference": allowed})
    if abs(parity.accuracy["torch"] - measured) <= allowed:
        return parity
    reason = (
        f"the trained network is right on {parity.accuracy['torch']:.4f} of the images here, but its evaluation says "
        f"{measured:.4f} ({EVALUATION}): pixels, normalisation or weights are not those that were evaluated"
    )
    return dataclasses.replace(parity, passed=False, reason=reason)


def _refused(trained: Trained, error: GateError) -> GateError:
    """Leave why the model was refused, in a file and on the run's page, which must not go on to praise an earlier one."""
    config, record = trained.config, trained.record
    parity = dataclasses.asdict(error.parity) if isinstance(error, ParityError) else {}
    write_json(config.run_dir / REFUSED, {"passed": False, "reason": str(error), **parity})
    tracker = open_tracker(config, record, status=None)
    write_report(config, trained.manifest, record, tracker)
    tracker.finish("FINISHED")
    return GateError(f"{error} Nothing was published; see {config.run_dir / REFUSED}.")


def set_aside(folder: Path) -> None:
    """Keep what an earlier export left, whole and with its proof, under another name: it is no longer the run's model."""
    if folder.is_dir() and any(path.name != REFUSED.name for path in folder.iterdir()):
        say(f"{folder}: the earlier export is kept as {move_aside(folder)}")


def require_verifiable(content: bytes, parity: Parity, golden: GoldenVectors) -> None:
    """Open the file and what goes with it as those do who get them. Raises GateError."""
    with tempfile.TemporaryDirectory() as folder:
        *_, model = publish_folder(Path(folder), content, parity, golden)
        try:
            verify_model(model)
        except ModelError as error:
            raise GateError(f"the exported file cannot be used: {str(error).replace(f'{folder}/', '')}") from error


def publish_folder(folder: Path, content: bytes, parity: Parity, golden: GoldenVectors) -> list[Path]:
    """Leave one proved model, of any precision, in a folder of its own: `model.onnx`, `parity.json`, `golden.npz`.

    The model is written last, so a folder that has one is complete. Returns the three paths.
    """
    vectors = golden.to_bytes()
    parity = dataclasses.replace(parity, golden_sha256=hashlib.sha256(vectors).hexdigest())
    paths = [folder / path.name for path in (GOLDEN_PATH, PARITY, MODEL)]
    write_bytes(paths[0], vectors)
    write_json(paths[1], dataclasses.asdict(parity))
    write_bytes(paths[2], content)
    (folder / REFUSED.name).unlink(missing_ok=True)
    return paths


def publish_forms(trained: Trained, model: onnx.ModelProto, parity: Parity, golden: GoldenVectors) -> list[Path]:
    """Publish the forms of the proved `model` that pass their gate, each in a folder of its own, and the table of all."""
    config = trained.config
    if not config.export.precisions:
        return []
    judge = Judge(config.export, trained.task, trained.spec, trained.dataset, model, parity, golden)
    forms = judge.judge(calibration_batches(config, trained.manifest, trained.spec))
    paths = []
    for form in forms:
        if form.parity and form.golden and form.result.published:
            paths += publish_folder(config.run_dir / FOLDER / form.result.precision, form.content, form.parity, form.golden)
    write_json(config.run_dir / PRECISIONS, [dataclasses.asdict(form.result) for form in forms])
    return [*paths, config.run_dir / PRECISIONS]


def golden_vectors(
    probabilities: Callable[[torch.Tensor], Probabilities], spec: PreprocessSpec, image: torch.Tensor
) -> GoldenVectors:
    """What `probabilities`, of uint8 (N, 3, H, W), says of one image, uint8 (3, H, W), in forms that are awkward to decode."""
    encoded = awkward_images(Image.fromarray(image.permute(1, 2, 0).numpy()))
    pixels = decode_all(encoded, spec)  # (N, H, W, 3)
    answers = probabilities(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    return GoldenVectors([*encoded], [*encoded.values()], pixels, answers)


def metadata_of(trained: Trained) -> dict[str, object]:
    """What a file of the trained network says of itself, under `shardline.`."""
    manifest, spec, record = trained.manifest, trained.spec, trained.record
    assert record.best is not None
    return {
        "format_version": FORMAT_VERSION,
        "class_names": manifest.class_names,
        "task": trained.task.kind,
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "data_digest": manifest.digest,
        "job_id": record.job_id,
        "mlflow_run_id": record.mlflow["run_id"] or "",
        "checkpoint_sha256": record.best["sha256"],
        "git_commit": record.git["commit"] or "",
        "metrics": evaluation_of(trained),
        "license": trained.config.export.license,
        "precision": "fp32",
        "versions": {
            "shardline": pipeline.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def evaluation_of(trained: Trained) -> dict[str, str | float]:
    """Split, number of samples and every figure of the evaluation of this very checkpoint on these data; empty without one."""
    path = trained.config.run_dir / EVALUATION
    result = json.loads(path.read_text()) if path.is_file() else {}
    assert trained.record.best is not None
    if result.get("checkpoint_sha256") != trained.record.best["sha256"]:
        return {}
    figures = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    return {"split": str(result["split"]), **figures}


def _log(trained: Trained, parity: Parity, outputs: list[Path]) -> None:
    """Have the model registered, with an image, (1, 3, H, W), as its example, and its smaller forms kept beside it."""
    config, record = trained.config, trained.record
    content = io.BytesIO()
    np.save(content, trained.example.unsqueeze(0).numpy())
    write_bytes(config.run_dir / EXAMPLE, content.getvalue())
    tracker = open_tracker(config, record, status=None)
    for path in outputs:
        if path != config.run_dir / MODEL:  # which is the run's one model
            tracker.log_file(path, str(path.parent.relative_to(config.run_dir)))
    tracker.log_model(_model_entry(trained, parity))
    write_report(config, trained.manifest, record, tracker)
    tracker.finish("FINISHED")


def _model_entry(trained: Trained, parity: Parity) -> dict[str, Any]:
    """What `registry.register_model` makes a version of. The `onnx/*` figures are told with the model, and nowhere else."""
    config, record = trained.config, trained.record
    assert record.best is not None
    worst = max(case.max_abs for case in parity.cases)
    evaluation = evaluation_of(trained)
    result = "not evaluated before its export"  # a version keeps its description
    if evaluation:
        result = f"{evaluation['split']} accuracy {float(evaluation['accuracy']):.4f} on {evaluation['num_samples']} images"
    return {
        "name": config.registered_model,
        "model": str(MODEL),
        "example": str(EXAMPLE),
        "task": trained.task.kind,
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
            **({"accuracy": str(evaluation["accuracy"])} if evaluation else {}),
        },
        "requirements": [f"onnxruntime=={onnxruntime.__version__}"],
        "time": int(time.time() * 1000),
    }
