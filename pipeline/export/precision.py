"""The gate of the smaller forms: each of `export.precisions` is judged beside the proved float32 model, and says why not.

The rule. A form is published where, on the whole evaluation split, it loses no more than `export.max_drop` of accuracy against
float32 and gives almost everywhere the same answers, all of them numbers; where real images stay within what it can hold; where
it answers alike however it is computed; and where it is smaller. INT8 is for CPUs and is timed on this one: it must be faster,
too, with one image and with more. float16 is for GPUs and saves a CPU only bytes, so the latency on a CPU is shown and not held
against it.

A form that was asked for and refused ends the export with exit code 3; the float32 model, proved before, stays published.
"""

import dataclasses
import hashlib
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch

from pipeline.config import ExportConfig, Precision
from pipeline.console import say
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError
from pipeline.export.activations import LOOK_BATCH, clipping_defects, float16_defects
from pipeline.export.contract import require_metadata
from pipeline.export.diagnosis import Outputs, max_abs
from pipeline.export.graph import PREFIX
from pipeline.export.latency import Latency, measure_latency
from pipeline.export.lint import require_clean
from pipeline.export.parity import (
    NUM_REFERENCE,
    OPTIMIZATIONS,
    Parity,
    ParityCase,
    ask_onnx,
    ask_reference,
    open_session,
    read_batches,
    repeat_to,
    same_answers,
)
from pipeline.export.proto import metadata
from pipeline.export.quantize import activation_ranges, to_float16, to_int8
from pipeline.golden import MOST_ABS, GoldenVectors
from pipeline.preprocess import PreprocessSpec
from pipeline.task import Task

# Fewer same answers are another model, of whatever accuracy. INT8 forms of ImageNet's networks that keep their accuracy still
# change an answer in fifteen or so, where two classes were nearly even.
LEAST_AGREEMENT = {"fp16": 0.99, "int8": 0.9}
# Of its probabilities from those of fp32, on average (their total variation): no rounding of a model that keeps its answers.
MOST_DISTANCE = 0.25
NUM_LOOKED_AT = 64  # images of which most of an activation must lie within the range that int8 gives it
LARGER_BATCH = 16  # that is timed beside one image


@dataclass(frozen=True)
class PrecisionResult:
    """A line of precisions.json. Figures are None where the form could not be made or loaded."""

    precision: Precision
    published: bool
    why: str
    num_bytes: int | None = None
    sha256: str | None = None
    num_samples: int | None = None
    accuracy: float | None = None
    drop: float | None = None  # of the accuracy, against fp32
    top1_agreement: float | None = None  # with fp32
    latency: list[Latency] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Form:
    """A judged form of the model, with what is published where it passed."""

    result: PrecisionResult
    content: bytes = b""
    parity: Parity | None = None
    golden: GoldenVectors | None = None


@dataclass(frozen=True)
class Figures:
    """What a model does on the whole evaluation split; the same answers are those of fp32."""

    num_samples: int
    accuracy: float
    top1_agreement: float
    num_not_finite: int
    distance: float  # of the probabilities from those of fp32: half of the sum of differences, or the mean of several labels


@dataclass(frozen=True)
class Judge:
    """What the forms of a model are judged by: itself, its proof, the images it was proved on, and its golden vectors."""

    config: ExportConfig
    task: Task
    spec: PreprocessSpec
    dataset: ShardDataset  # of the evaluation split
    fp32: onnx.ModelProto
    proof: Parity
    golden: GoldenVectors

    def judge(self, calibration: Iterable[npt.NDArray[np.uint8]]) -> list[Form]:
        """Make, ask, time and judge what the configuration names; fp32 comes first. `calibration` are the batches for int8."""
        made: dict[Precision, onnx.ModelProto] = {"fp32": self.fp32}
        judged: dict[Precision, Form] = {}
        for precision in dict.fromkeys(self.config.precisions):
            say(f"making the {precision} form of the model, to be judged beside fp32")
            try:
                made[precision] = self._make(precision, calibration)
            except GateError as error:
                judged[precision] = Form(PrecisionResult(precision, published=False, why=str(error).rstrip(".")))
        contents = {name: model.SerializeToString(deterministic=True) for name, model in made.items()}
        figures = ask_all(contents, self.task, self.dataset, self.config.max_batch_size)
        latencies = measure_latency(contents, repeat_to(self.dataset, LARGER_BATCH).numpy())
        for name, content in contents.items():
            facts = _facts(name, content, figures, latencies[name])
            judged[name] = Form(facts) if name == "fp32" else self._judge(facts, content, made[name], figures)
        return [judged["fp32"], *(judged[name] for name in dict.fromkeys(self.config.precisions))]

    def _make(self, precision: Precision, calibration: Iterable[npt.NDArray[np.uint8]]) -> onnx.ModelProto:
        made = to_float16(self.fp32) if precision == "fp16" else to_int8(self.fp32, calibration, self.config.calibration)
        require_metadata(made, metadata(self.fp32) | {f"{PREFIX}precision": precision})
        require_clean(made, self.spec, self.config.opset)
        _require_loadable(made)
        return made

    def _judge(
        self, facts: PrecisionResult, content: bytes, model: onnx.ModelProto, figures: Mapping[Precision, Figures]
    ) -> Form:
        parity, golden = self._prove(facts, content)
        fp32_bytes = self.fp32.ByteSize()
        defects = [
            *self._range_defects(facts.precision, model),
            *_answer_defects(facts, figures[facts.precision], self.config.max_drop),
            *_parity_defects(facts.precision, parity),
            *_gain_defects(facts, fp32_bytes),
        ]
        facts = dataclasses.replace(facts, published=not defects, why="; ".join(defects) or _gain(facts, fp32_bytes))
        parity = dataclasses.replace(parity, passed=not defects, reason="; ".join(defects))
        return Form(facts, content, parity, golden)

    def _prove(self, facts: PrecisionResult, content: bytes) -> tuple[Parity, GoldenVectors]:
        """How far the form's own answers move with batch size, optimisation and implementation; and its golden vectors."""
        sessions = {name: open_session(content, level) for name, level in OPTIMIZATIONS.items()}
        awkward = torch.from_numpy(self.golden.pixels).permute(0, 3, 1, 2)
        images = torch.cat([repeat_to(self.dataset, LARGER_BATCH), awkward])  # (N, 3, H, W)
        wanted = _probabilities(ask_onnx(sessions["on"], images))
        cases, repeats = list[ParityCase](), list[float]()
        for size, name in itertools.product((1, 2, 3, 7, len(images)), sessions):
            tries = [_probabilities(ask_onnx(sessions[name], images[:size])) for _ in range(2)]
            for run, found in enumerate(tries, start=1):
                cases.append(ParityCase(size, name, run, max_abs(found, _first(wanted, size)), MOST_ABS[facts.precision]))
            repeats.append(max_abs(*tries))
        reference = math.nan  # numpy's float16 takes minutes for a network of ordinary size
        if facts.precision == "int8":
            found = _probabilities(ask_reference(content, images[:NUM_REFERENCE]))
            reference = max_abs(found, _first(wanted, NUM_REFERENCE))
        assert facts.accuracy is not None and facts.drop is not None
        assert facts.top1_agreement is not None and facts.sha256 is not None
        parity = dataclasses.replace(
            self.proof,
            cases=cases,
            top1_agreement=facts.top1_agreement,
            sha256=facts.sha256,
            accuracy={"fp32": facts.accuracy + facts.drop, facts.precision: facts.accuracy},
            reference_max_abs=reference,
            precision=facts.precision,
            tolerance_reason=f"probabilities of {facts.precision} on any machine",
            repeat_max_abs=max(repeats),
            allowed_accuracy_difference=self.config.max_drop,
        )
        return parity, dataclasses.replace(self.golden, probabilities=wanted["probabilities"][LARGER_BATCH:])

    def _range_defects(self, precision: Precision, model: onnx.ModelProto) -> Iterator[str]:
        batches = (images for images, _ in read_batches(self.dataset, LOOK_BATCH))
        if precision == "fp16":  # one image that overflows has no answer, so all of them are looked at
            return float16_defects(self.fp32, model, batches)
        return clipping_defects(self.fp32, activation_ranges(model), itertools.islice(batches, NUM_LOOKED_AT // LOOK_BATCH))


def _require_loadable(model: onnx.ModelProto) -> None:
    """Raises GateError where onnxruntime cannot load the model, or dies of it, as 1.32 does of float16 attention on a CPU."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        script = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
        done = subprocess.run([sys.executable, "-c", script, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        said = f"signal {-done.returncode}" if done.returncode < 0 else " ".join(done.stderr.split())[-200:]
        raise GateError(f"onnxruntime cannot load it on a CPU ({said})")


def ask_all(
    contents: Mapping[Precision, bytes], task: Task, dataset: ShardDataset, batch_size: int
) -> dict[Precision, Figures]:
    """Ask every model, of which one is `fp32`, for the whole split, reading it once."""
    sessions = {name: open_session(content, OPTIMIZATIONS["on"]) for name, content in contents.items()}
    num_samples = 0
    right, same, not_finite = (dict.fromkeys(contents, 0) for _ in range(3))
    distance = dict.fromkeys(contents, 0.0)
    for images, labels in read_batches(dataset, batch_size):
        answers = {name: ask_onnx(session, images) for name, session in sessions.items()}
        num_samples += len(images)
        for name, answer in answers.items():
            right[name] += int(task.correct(torch.from_numpy(answer["logits"]), labels).sum())
            same[name] += int(same_answers(task, answers["fp32"], answer).sum())
            finite = np.isfinite(answer["logits"]).all(axis=1) & np.isfinite(answer["probabilities"]).all(axis=1)
            not_finite[name] += int((~finite).sum())
            apart = np.abs(answer["probabilities"] - answers["fp32"]["probabilities"])  # (N, K)
            distance[name] += float((apart.mean(axis=1) if task.kind == "multi" else apart.sum(axis=1) / 2).sum())
    return {
        name: Figures(
            num_samples, right[name] / num_samples, same[name] / num_samples, not_finite[name], distance[name] / num_samples
        )
        for name in contents
    }


def _facts(
    precision: Precision, content: bytes, figures: Mapping[Precision, Figures], latency: list[Latency]
) -> PrecisionResult:
    asked = figures[precision]
    return PrecisionResult(
        precision,
        published=True,
        why="proved equal to the trained network",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_samples=asked.num_samples,
        accuracy=asked.accuracy,
        drop=figures["fp32"].accuracy - asked.accuracy,
        top1_agreement=asked.top1_agreement,
        latency=latency,
    )


def _probabilities(outputs: Outputs) -> Outputs:
    """Without the logits, which a form may move where that changes no probability."""
    return {"probabilities": outputs["probabilities"]}


def _first(outputs: Outputs, number: int) -> Outputs:
    return {name: answers[:number] for name, answers in outputs.items()}


# ---- what speaks against a form, and for it ----


def _answer_defects(facts: PrecisionResult, asked: Figures, max_drop: float) -> Iterator[str]:
    assert facts.drop is not None
    if asked.num_not_finite:
        yield f"{asked.num_not_finite:,} of {asked.num_samples:,} images get answers that are no numbers"
    if facts.drop > max_drop:
        lost = f"accuracy {asked.accuracy:.4f} is {facts.drop:.4f} below that of fp32"
        yield f"{lost} (`export.max_drop` allows {max_drop:g})"
    if asked.distance > MOST_DISTANCE:
        yield f"its probabilities are not those of fp32: {asked.distance:.2f} apart on average (at most {MOST_DISTANCE:g})"
    least = LEAST_AGREEMENT[facts.precision]
    if asked.top1_agreement < least:
        yield f"it answers as fp32 does on only {asked.top1_agreement:.4f} of the images (at least {least:g})"


def _parity_defects(precision: Precision, parity: Parity) -> Iterator[str]:
    found = [*(case.max_abs for case in parity.cases), parity.reference_max_abs]
    worst = max(difference for difference in found if not math.isnan(difference))
    if worst > MOST_ABS[precision]:
        yield (
            f"its probabilities differ by {worst:.1e} with how they are computed (at most {MOST_ABS[precision]:.0e}), "
            "so another machine would answer otherwise"
        )


def _gain_defects(facts: PrecisionResult, fp32_bytes: int) -> Iterator[str]:
    assert facts.num_bytes is not None
    if facts.num_bytes >= fp32_bytes:
        yield f"its {facts.num_bytes:,} bytes are no fewer than the {fp32_bytes:,} of fp32"
    slowest = max(facts.latency, key=lambda latency: latency.times_fp32)
    if facts.precision == "int8" and slowest.times_fp32 >= 1:
        yield f"it is not faster: {slowest.times_fp32:.2f} times as long as fp32 {_with_images(slowest)}"


def _gain(facts: PrecisionResult, fp32_bytes: int) -> str:
    assert facts.num_bytes is not None
    smaller = f"{fp32_bytes / facts.num_bytes:.1f} x smaller"
    if facts.precision == "int8":
        faster = " and ".join(f"{1 / each.times_fp32:.1f} x faster {_with_images(each)}" for each in facts.latency)
        return f"{smaller}; {faster}"
    times = " and ".join(f"{each.times_fp32:.2f}" for each in facts.latency)
    return f"{smaller}; made for GPUs, so that its time on a CPU, {times} times that of fp32, is not judged"


def _with_images(latency: Latency) -> str:
    return "with 1 image" if latency.batch == 1 else f"with {latency.batch} images"
