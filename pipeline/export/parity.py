"""Does the ONNX file give the trained network's answers on real images? Asked before anybody can use it.

onnxruntime's optimiser removes a dropout that was left in training mode, so a comparison with optimisation on alone proves
nothing: both settings are asked, and each twice, because noise differs between two runs.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnxruntime
import torch
from torch import nn

from pipeline.config import ExportConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import DataError
from pipeline.task import Task

OPTIMIZATIONS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "on": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
OUTPUTS = ("logits", "probabilities")
NUM_REFERENCE = 2  # images for the reference evaluator
# Nearer to 0.5 than this, two runtimes may round to different sides, and among millions of labels some do.
ON_THE_EDGE = 1e-5
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ParityCase:
    """One comparison: `max_abs` is the largest difference of any logit or probability, `run` the first or second try."""

    batch: int
    optimization: str
    run: int
    max_abs: float
    tolerance: float


@dataclass(frozen=True)
class Parity:
    """parity.json. `sha256` is the file that was asked.

    `top1_agreement` is the share of images with the same answer; of several labels an image, with the same set of them. Images
    that cannot be decoded are not counted.
    """

    passed: bool
    cases: list[ParityCase]
    top1_agreement: float
    num_samples: int
    sha256: str
    accuracy: dict[str, float]  # share of right answers of `torch` and `onnx` over the whole split
    reference_max_abs: float  # of the ONNX project's own evaluator, on a few images
    golden_sha256: str = ""  # of the golden vectors beside the model


def compare(network: nn.Module, task: Task, content: bytes, sha256: str, dataset: ShardDataset, config: ExportConfig) -> Parity:
    """Ask the torch network and the serialized ONNX model `content` for the same images of `dataset`."""
    network = network.cpu().eval()
    sessions = {name: _open_session(content, level) for name, level in OPTIMIZATIONS.items()}
    cases = [
        case
        for size in sorted({1, 2, 3, 7, config.max_batch_size})
        for case in _compare_batch(network, task, sessions, _repeat_to(dataset, size), config.tolerance)
    ]
    agreeing, num_samples, right = 0, 0, {"torch": 0, "onnx": 0}
    for images, labels in _batches(dataset, config.max_batch_size):
        answers = {"torch": _ask_torch(network, task, images), "onnx": _ask_onnx(sessions["on"], images)}
        agreeing += int(_same_answers(task, answers["torch"], answers["onnx"]).sum())
        num_samples += len(images)
        for name, answer in answers.items():
            if answer["logits"].shape == answers["torch"]["logits"].shape:  # else it is of another task
                right[name] += int(task.correct(torch.from_numpy(answer["logits"]), labels).sum())
    agreement, accuracy = agreeing / num_samples, {name: number / num_samples for name, number in right.items()}
    reference = _ask_reference(network, task, content, _repeat_to(dataset, NUM_REFERENCE))
    passed = agreement == 1.0 and all(case.max_abs <= case.tolerance for case in cases) and reference <= config.tolerance
    return Parity(passed, cases, agreement, num_samples, sha256, accuracy, reference)


def describe_failure(parity: Parity) -> str:
    """What a person needs to know of a red comparison."""
    worst = max(parity.cases, key=lambda case: case.max_abs if case.max_abs == case.max_abs else float("inf"))
    return (
        f"the ONNX model does not give the trained network's answers: largest difference {worst.max_abs:.2e} "
        f"(batch {worst.batch}, optimization {worst.optimization}; tolerance {worst.tolerance:.0e}), "
        f"top-1 agreement {parity.top1_agreement:.4f} on {parity.num_samples} images, reference evaluator "
        f"{parity.reference_max_abs:.2e}"
    )


def _open_session(content: bytes, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _compare_batch(
    network: nn.Module, task: Task, sessions: dict[str, onnxruntime.InferenceSession], images: torch.Tensor, tolerance: float
) -> Iterator[ParityCase]:
    wanted = _ask_torch(network, task, images)
    for name, session in sessions.items():
        for run in (1, 2):
            found = _ask_onnx(session, images)
            difference = max(_max_abs(found[output], wanted[output]) for output in OUTPUTS)
            yield ParityCase(len(images), name, run, difference, tolerance)


def _same_answers(task: Task, wanted: dict[str, Array], found: dict[str, Array]) -> npt.NDArray[np.bool_]:
    """Whether the answer to each image is the same, (N,): the most probable class, or every label on the same side of 0.5."""
    if task.kind == "single":
        return np.asarray(wanted["logits"].argmax(axis=1) == found["logits"].argmax(axis=1))
    one, other = wanted["probabilities"], found["probabilities"]  # (N, K)
    same = ((one >= 0.5) == (other >= 0.5)) | (np.abs(one - other) < ON_THE_EDGE)
    return np.asarray(same.all(axis=1))


def _max_abs(found: Array, wanted: Array) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max())


def _ask_torch(network: nn.Module, task: Task, images: torch.Tensor) -> dict[str, Array]:
    with torch.no_grad():
        logits = network(images)  # (N, num_outputs)
    return {"logits": logits.numpy(), "probabilities": task.probabilities(logits).numpy()}


def _ask_onnx(session: onnxruntime.InferenceSession, images: torch.Tensor) -> dict[str, Array]:
    answers = session.run(list(OUTPUTS), {"image": images.numpy()})
    return {name: np.asarray(answer) for name, answer in zip(OUTPUTS, answers, strict=True)}


def _ask_reference(network: nn.Module, task: Task, content: bytes, images: torch.Tensor) -> float:
    """Largest difference of the ONNX project's own evaluator, which shares no code with onnxruntime; it takes its time."""
    session = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(content))
    answers = session.run(list(OUTPUTS), {"image": images.numpy()})
    wanted = _ask_torch(network, task, images)
    return max(_max_abs(np.asarray(answer), wanted[name]) for name, answer in zip(OUTPUTS, answers, strict=True))


def _batches(dataset: ShardDataset, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 3, H, W) and labels (n,) or (n, K) of the samples that can still be decoded."""
    for first in range(0, len(dataset), size):
        found = [*decodable(dataset, range(first, min(first + size, len(dataset))))]
        if found:
            labels = dataset.labels(np.array([index for index, _ in found]))
            yield torch.stack([image for _, image in found]), labels


def _repeat_to(dataset: ShardDataset, size: int) -> torch.Tensor:
    """The first `size` images (N, 3, H, W), from the start again where the split has fewer."""
    images = [image for _, image in itertools.islice(decodable(dataset, range(len(dataset))), size)]
    if not images:
        raise DataError("no image of the evaluation split can be decoded. Look at the shards with `shardline verify`.")
    return torch.stack([images[index % len(images)] for index in range(size)])


def decodable(dataset: ShardDataset, indices: range) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and image, uint8 (3, H, W), of those of the samples that can still be decoded."""
    for index in indices:
        with contextlib.suppress(DataError):
            yield index, dataset.image(index)
