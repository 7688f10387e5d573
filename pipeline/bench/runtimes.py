"""The ways to ask a model that `shardline bench model` compares: torch, torch.compile, onnxruntime and OpenVINO.

Each is told its number of threads, and to compute float32 in float32: on processors that have bfloat16 OpenVINO uses it
unasked, and would be compared for other answers.
"""

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Precision, load_config
from pipeline.errors import ModelError, RunError
from pipeline.export.latency import open_timed
from pipeline.manifest import load_dataset
from pipeline.pretraining import spec_for
from pipeline.run import CONFIG_NAME, RunRecord

if TYPE_CHECKING:
    from pipeline.export.publish import Trained

FORMS: dict[Precision, Path] = {"fp32": Path("model.onnx"), "fp16": Path("fp16/model.onnx"), "int8": Path("int8/model.onnx")}
Images = npt.NDArray[np.uint8]
# From uint8 images (N, 3, H, W) to probabilities (N, K).
Answer = Callable[[Images], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Runtime:
    """A way to ask the model of a precision; `make` opens it for a number of threads, or raises what keeps it from that."""

    precision: Precision
    make: Callable[[int], Answer]


def runtimes(export_dir: Path, run_dir: Path | None) -> dict[str, Runtime]:
    """Every way to ask a model and its forms by name; `run_dir` holds the trained network, where it is known."""
    found = {
        "torch": Runtime("fp32", lambda threads: _open_torch(run_dir, threads)),
        "torch.compile": Runtime("fp32", lambda threads: _open_compiled(run_dir, threads)),
    }
    for precision, form in FORMS.items():
        found[f"onnxruntime {precision}"] = Runtime(precision, _opener(_open_onnxruntime, export_dir / form))
        found[f"OpenVINO {precision}"] = Runtime(precision, _opener(_open_openvino, export_dir / form))
    return found


def _opener(open_file: Callable[[Path, int], Answer], path: Path) -> Callable[[int], Answer]:
    def make(threads: int) -> Answer:
        if not path.is_file():
            raise ModelError(f"no {path}; `export.precisions` names what is exported")
        return open_file(path, threads)

    return make


def _open_onnxruntime(path: Path, threads: int) -> Answer:
    session = open_timed(path.read_bytes(), threads)

    def answer(images: Images) -> npt.NDArray[np.float32]:
        (probabilities,) = session.run(["probabilities"], {"image": images})
        return np.asarray(probabilities)

    return answer


@functools.cache
def openvino_core() -> Any:
    """The one OpenVINO of this process.

    Each brings an alternate signal stack along, and of two that live at the same time the first frees what the second then
    restores: the next signal with a handler ends the process (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _open_openvino(path: Path, threads: int) -> Answer:
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino_core().compile_model(str(path), "CPU", settings)
    return lambda images: np.asarray(compiled({"image": images})["probabilities"])


def _open_torch(run_dir: Path | None, threads: int) -> Answer:
    import torch

    trained = _load_trained(run_dir)
    torch.set_num_threads(threads)

    @torch.inference_mode()
    def answer(images: Images) -> npt.NDArray[np.float32]:
        probabilities = trained.task.probabilities(trained.network(torch.from_numpy(images)))
        return np.asarray(probabilities.numpy())

    return answer


def _open_compiled(run_dir: Path | None, threads: int) -> Answer:
    import torch

    trained = _load_trained(run_dir)
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler) and not shutil.which("clang++"):
        raise RunError(f"torch.compile needs a C++ compiler, and there is no {compiler} here")
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # compiled code knows its number of threads
    # For each batch size its own, as the best case.
    network: Callable[[torch.Tensor], torch.Tensor] = torch.compile(trained.network, dynamic=False)

    @torch.inference_mode()
    def answer(images: Images) -> npt.NDArray[np.float32]:
        return np.asarray(trained.task.probabilities(network(torch.from_numpy(images))).numpy())

    return answer


def _load_trained(run_dir: Path | None) -> "Trained":
    """The network of the run's best checkpoint."""
    if run_dir is None:
        raise RunError("the model lies in no run folder, so there is no checkpoint to ask")
    from pipeline.export.publish import Trained

    config = load_config(run_dir / CONFIG_NAME)
    record = RunRecord.require(run_dir)
    manifest = load_dataset(config.dataset_location, config.data.cache_folder)
    return Trained.load(config, manifest, spec_for(config, manifest), record)
