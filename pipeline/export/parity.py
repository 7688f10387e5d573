"""Does the ONNX file give the trained network's answers on real images? Asked before anybody can use it.

onnxruntime's optimiser removes a dropout that was left in training mode, so a comparison with optimisation on alone proves
nothing: both settings are asked, and each twice, because noise differs between two runs. How far answers may lie apart is
reasoned from the arithmetic (`pipeline.export.tolerance`), unless the configuration says a number.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnxruntime
import torch
from torch import nn

from pipeline.config import ExportConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import DataError, GateError
from pipeline.export.diagnosis import REPEATED, Evidence, Outputs, explain, max_abs
from pipeline.export.graph import evaluating
from pipeline.export.tolerance import Tolerance, tolerance_of
from pipeline.task import Task

OPTIMIZATIONS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "on": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
OUTPUTS = ("logits", "probabilities")
NUM_REFERENCE = 2  # images for the reference evaluator
NUM_NOISE = 8  # images of coloured noise, which a data set of grey ones has none of
# Two answers whose probabilities lie nearer than this are one to a runtime's rounding, and among millions of images some do.
ON_THE_EDGE = 1e-5
# What those images may cost or gain; of a small split it is one image.
ACCURACY_DIFFERENCE = 1e-4


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
    """parity.json. `sha256` is the file that was asked, `reason` why it was refused.

    `top1_agreement` is the share of images with the same answer; of several labels an image, with the same set of them. Images
    that cannot be decoded are not counted. What was trained, on what and with which preprocessing is named by its digest.
    """

    passed: bool
    cases: list[ParityCase]
    top1_agreement: float
    num_samples: int
    sha256: str
    # Share of right answers over the whole split: of `torch` and `onnx`; in the proof of a smaller form, of `fp32` and it.
    accuracy: dict[str, float]
    reference_max_abs: float  # of the ONNX project's own evaluator, on a few images
    golden_sha256: str = ""  # of the golden vectors beside the model
    reason: str = ""
    precision: str = "fp32"
    tolerance_reason: str = ""
    repeat_max_abs: float = 0.0  # between two runs over the same images
    allowed_accuracy_difference: float = 0.0  # of the two in `accuracy`
    # What the earlier evaluation of the same checkpoint measured, and how far `torch` may lie from it; empty without one.
    evaluation: dict[str, float] = field(default_factory=dict)
    checkpoint_sha256: str = ""
    data_digest: str = ""
    preprocess_hash: str = ""


@dataclass(frozen=True)
class _Sides:
    """The two that are asked: the trained network, and the serialized model in a session for each optimisation."""

    network: nn.Module
    task: Task
    content: bytes
    sessions: dict[str, onnxruntime.InferenceSession]
    tolerance: Tolerance


def compare(network: nn.Module, task: Task, content: bytes, sha256: str, dataset: ShardDataset, config: ExportConfig) -> Parity:
    """Ask the torch network and the serialized ONNX model `content` for the same images: of `dataset`, and coloured noise.

    Raises GateError where onnxruntime cannot load the model at all.
    """
    with evaluating(network) as plain:
        sessions = {name: open_session(content, level) for name, level in OPTIMIZATIONS.items()}
        tolerance = tolerance_of(onnx.load_model_from_string(content), config.tolerance)
        sides = _Sides(plain, task, content, sessions, tolerance)
        sizes = sorted({1, 2, 3, 7, config.max_batch_size})
        asked = [*(repeat_to(dataset, size) for size in sizes), coloured_images(dataset)]
        batches = [_compare_batch(sides, images) for images in asked]
        parity = Parity(
            passed=False,
            cases=[case for batch in batches for case in batch.cases],
            top1_agreement=0.0,
            num_samples=0,
            sha256=sha256,
            accuracy={},
            reference_max_abs=float("inf"),
            tolerance_reason=tolerance.reason,
            repeat_max_abs=max(batch.repeat_max_abs for batch in batches),
            reason=next((batch.error for batch in batches if batch.error), ""),
        )
        if parity.reason:  # nothing more can be asked of it
            return parity
        parity, farthest = _ask_whole_split(sides, dataset, config.max_batch_size, parity)
        batches.append(farthest)
        images = repeat_to(dataset, NUM_REFERENCE)
        wanted = _ask_torch(plain, task, images)
        parity = replace(parity, reference_max_abs=max_abs(ask_reference(content, images), wanted))
        reason = _reason(sides, batches, parity, tolerance.of(_scale(wanted)))
    return replace(parity, passed=not reason, reason=reason)


def describe_failure(parity: Parity) -> str:
    """What a person needs to know of a red comparison."""
    worst = max(parity.cases, key=lambda case: case.max_abs)
    return (
        f"the ONNX model does not give the trained network's answers: {parity.reason} (largest difference {worst.max_abs:.2e}, "
        f"batch {worst.batch}, optimization {worst.optimization}; tolerance {worst.tolerance:.1e}; top-1 agreement "
        f"{parity.top1_agreement:.4f} on {parity.num_samples:,} images; reference evaluator {parity.reference_max_abs:.2e})"
    )


@dataclass(frozen=True)
class _BatchResult:
    cases: list[ParityCase]
    repeat_max_abs: float = 0.0
    evidence: Evidence | None = None  # of the case that differs most
    error: str = ""


def _compare_batch(sides: _Sides, images: torch.Tensor) -> _BatchResult:
    wanted = _ask_torch(sides.network, sides.task, images)
    scale, cases, repeats, evidence = _scale(wanted), list[ParityCase](), list[float](), list[Evidence]()
    allowed = sides.tolerance.of(scale)
    for name, session in sides.sessions.items():
        try:
            first, second = ask_onnx(session, images), ask_onnx(session, images)
        except Exception as error:  # onnxruntime has no common base for its errors
            cases += [ParityCase(len(images), name, run, float("inf"), allowed) for run in (1, 2)]
            said = " ".join(str(error).split())[:200]
            return _BatchResult(cases, error=f"it cannot take a batch of {len(images)}, as where a size is frozen ({said})")
        for run, found in enumerate((first, second), start=1):
            cases.append(ParityCase(len(images), name, run, max_abs(found, wanted), allowed))
        repeats.append(max_abs(second, first))
        evidence.append(Evidence(images, wanted, first, second))
    worst = max(evidence, key=lambda each: (max_abs(each.found, wanted), max_abs(each.again, each.found)))
    return _BatchResult(cases, max(repeats), worst)


def _ask_whole_split(sides: _Sides, dataset: ShardDataset, batch_size: int, parity: Parity) -> tuple[Parity, _BatchResult]:
    """The same answer to every image, and the accuracy of both; and the batch whose answers lie farthest apart, as one case."""
    agreeing, num_samples, right = 0, 0, {"torch": 0, "onnx": 0}
    farthest, excess = _BatchResult([]), -1.0
    for images, labels in read_batches(dataset, batch_size):
        answers = {"torch": _ask_torch(sides.network, sides.task, images), "onnx": ask_onnx(sides.sessions["on"], images)}
        num_samples += len(images)
        wanted, found = answers["torch"], answers["onnx"]
        case = ParityCase(len(images), "on", 1, max_abs(found, wanted), sides.tolerance.of(_scale(wanted)))
        if not case.max_abs / case.tolerance <= excess:
            farthest, excess = _BatchResult([case], 0.0, Evidence(images, wanted, found, found)), case.max_abs / case.tolerance
        if answers["onnx"]["logits"].shape == answers["torch"]["logits"].shape:  # else it is of another task
            agreeing += int(same_answers(sides.task, answers["torch"], answers["onnx"]).sum())
            for name, answer in answers.items():
                right[name] += int(sides.task.correct(torch.from_numpy(answer["logits"]), labels).sum())
    parity = replace(
        parity,
        cases=[*parity.cases, *farthest.cases],
        top1_agreement=agreeing / num_samples,
        num_samples=num_samples,
        accuracy={name: number / num_samples for name, number in right.items()},
        allowed_accuracy_difference=max(ACCURACY_DIFFERENCE, 1 / num_samples),
    )
    return parity, farthest


def _reason(sides: _Sides, batches: list[_BatchResult], parity: Parity, allowed_of_reference: float) -> str:
    """Why the model is refused; empty for one that passes."""
    for batch in batches:
        assert batch.evidence is not None
        case, scale = max(batch.cases, key=lambda case: case.max_abs), _scale(batch.evidence.wanted)
        if not (case.max_abs <= case.tolerance and batch.repeat_max_abs <= REPEATED * (1 + scale)):  # nan is neither
            found = explain(sides.network, batch.evidence, case.tolerance)
            return found or f"its answers differ by {case.max_abs:.2e}, more than {case.tolerance:.1e}"
    if parity.top1_agreement < 1.0:
        return f"it gives another answer to {1 - parity.top1_agreement:.2%} of the images"
    difference = abs(parity.accuracy["torch"] - parity.accuracy["onnx"])
    if difference > parity.allowed_accuracy_difference:
        return f"its accuracy differs by {difference:.4f}, more than {parity.allowed_accuracy_difference:.4f}"
    if not parity.reference_max_abs <= allowed_of_reference:
        return f"the ONNX project's own evaluator answers otherwise, by {parity.reference_max_abs:.2e}"
    return ""


def _scale(wanted: Outputs) -> float:
    """The largest logit of a batch, without its sign."""
    return float(np.abs(wanted["logits"]).max())


def open_session(content: bytes, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    """A session on the CPU with so much optimisation. Raises GateError where onnxruntime cannot load the model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3  # errors; warnings are of what it cannot make faster
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise GateError(f"onnxruntime cannot load the exported model ({' '.join(str(error).split())[:200]}).") from error


def same_answers(task: Task, wanted: Outputs, found: Outputs) -> npt.NDArray[np.bool_]:
    """Whether the answer to each image is the same, (N,): the most probable class, or every label on the same side of 0.5."""
    one, other = wanted["probabilities"], found["probabilities"]  # (N, K)
    if task.kind == "multi":
        same = ((one >= 0.5) == (other >= 0.5)) | (np.abs(one - other) < ON_THE_EDGE)
        return np.asarray(same.all(axis=1))
    rows = np.arange(len(one))
    return np.asarray(one.max(axis=1) - one[rows, other.argmax(axis=1)] < ON_THE_EDGE)


def _ask_torch(network: nn.Module, task: Task, images: torch.Tensor) -> Outputs:
    with torch.no_grad():
        logits = network(images)  # (N, num_outputs)
    return {"logits": logits.numpy(), "probabilities": task.probabilities(logits).numpy()}


def ask_onnx(session: onnxruntime.InferenceSession, images: torch.Tensor) -> Outputs:
    """Logits and probabilities of images, uint8 (N, 3, H, W)."""
    answers = session.run(list(OUTPUTS), {"image": images.numpy()})
    return {name: np.asarray(answer) for name, answer in zip(OUTPUTS, answers, strict=True)}


def ask_reference(content: bytes, images: torch.Tensor) -> Outputs:
    """Answers of the ONNX project's own evaluator, which shares no code with onnxruntime; it takes its time."""
    session = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(content))
    with np.errstate(all="ignore"):  # what comes of an overflow is seen in the answers
        answers: Any = session.run(list(OUTPUTS), {"image": images.numpy()})
    return {name: np.asarray(answer) for name, answer in zip(OUTPUTS, answers, strict=True)}


def read_batches(dataset: ShardDataset, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 3, H, W) and labels (n,) or (n, K) of the samples that can still be decoded."""
    for first in range(0, len(dataset), size):
        found = [*decodable(dataset, range(first, min(first + size, len(dataset))))]
        if found:
            labels = dataset.labels(np.array([index for index, _ in found]))
            yield torch.stack([image for _, image in found]), labels


def repeat_to(dataset: ShardDataset, size: int) -> torch.Tensor:
    """The first `size` images (N, 3, H, W), from the start again where the split has fewer."""
    images = [image for _, image in itertools.islice(decodable(dataset, range(len(dataset))), size)]
    if not images:
        raise DataError("no image of the evaluation split can be decoded. Look at the shards with `shardline verify`.")
    return torch.stack([images[index % len(images)] for index in range(size)])


def coloured_images(dataset: ShardDataset) -> torch.Tensor:
    """Images (N, 3, H, W) of coloured noise, always the same, and of each colour alone.

    A file that turns colours round, or leaves one out, answers grey images as it should.
    """
    assert dataset.spec.fixed_size is not None
    height, width = dataset.spec.fixed_size
    noise = np.random.default_rng(0).integers(0, 256, (NUM_NOISE, 3, height, width), dtype=np.uint8)
    colours = np.zeros((3, 3, height, width), np.uint8)
    colours[range(3), range(3)] = 255
    return torch.from_numpy(np.concatenate([noise, colours]))


def decodable(dataset: ShardDataset, indices: range) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and image, uint8 (3, H, W), of those of the samples that can still be decoded."""
    for index in indices:
        with contextlib.suppress(DataError):
            yield index, dataset.image(index)
