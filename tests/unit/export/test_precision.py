import dataclasses
import itertools
import signal
import subprocess
from collections.abc import Iterable
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.config import ExportConfig
from pipeline.data.dataset import ShardDataset
from pipeline.errors import GateError
from pipeline.export import precision
from pipeline.export.diagnosis import Outputs
from pipeline.export.latency import Latency
from pipeline.export.parity import Parity, ParityCase, ask_onnx
from pipeline.export.precision import Figures, Form, Judge, PrecisionResult
from pipeline.golden import GoldenVectors
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from tests.unit.conftest import THREE_CLASSES, THREE_LABELS
from tests.unit.export.given import Images, scale_between

# Twelve untrained answers: one image more or less is 0.083 of accuracy.
CONFIG = ExportConfig(precisions=["fp16", "int8"], max_batch_size=5, max_drop=0.1)


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How many times as long as fp32 each form takes: measured, a network of 16 x 16 pixels would be a matter of luck."""
    times = {"fp32": 1.0, "fp16": 1.25, "int8": 0.5}

    def measured(contents: dict[str, bytes], images: Images) -> dict[str, list[Latency]]:
        return {name: [Latency(batch, 1, 2.0, 3.0, times[name]) for batch in (1, len(images))] for name in contents}

    monkeypatch.setattr(precision, "measure_latency", measured)
    return times


@pytest.fixture
def judge(exported_model: onnx.ModelProto, tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> Judge:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    golden = GoldenVectors(["a", "b", "c", "d"], [b"1", b"2", b"3", b"4"], pixels, np.zeros((4, 3), np.float32))
    dataset = ShardDataset(tiny_dataset, "test", tiny_spec)
    proof = Parity(True, [], 1.0, 12, "s" * 64, {}, 0.0, golden_sha256="g" * 64, data_digest="d" * 64)
    return Judge(CONFIG, THREE_CLASSES, tiny_spec, dataset, exported_model, proof, golden)


@pytest.fixture(scope="module")
def calibration(tiny_dataset: DatasetManifest, tiny_spec: PreprocessSpec) -> list[Images]:
    dataset = ShardDataset(tiny_dataset, "train", tiny_spec)
    return [np.stack([dataset.image(index).numpy() for index in range(len(dataset))])]


def forms(judge: Judge, calibration: Iterable[Images]) -> dict[str, Form]:
    return {form.result.precision: form for form in judge.judge(calibration)}


def only(judge: Judge, name: Literal["fp16", "int8"]) -> Judge:
    return dataclasses.replace(judge, config=dataclasses.replace(judge.config, precisions=[name]))


def test_sound_forms_pass_with_their_figures_beside_fp32(judge: Judge, calibration: list[Images]) -> None:
    found = forms(judge, calibration)
    assert list(found) == ["fp32", "fp16", "int8"]
    assert all(form.result.published for form in found.values())
    fp32, fp16, int8 = (form.result for form in found.values())
    assert fp32.num_bytes is not None and fp16.num_bytes is not None and int8.num_bytes is not None
    assert fp16.num_bytes < fp32.num_bytes and int8.num_bytes < fp32.num_bytes
    assert fp32.accuracy is not None
    for result in (fp16, int8):
        assert result.drop is not None and result.accuracy is not None and result.top1_agreement is not None
        assert result.accuracy == pytest.approx(fp32.accuracy - result.drop)
        assert result.top1_agreement > 0.9
        assert result.num_samples == 12
    assert fp16.why.endswith(
        "x smaller; made for GPUs, so that its time on a CPU, 1.25 and 1.25 times that of fp32, is not judged"
    )
    assert int8.why.endswith("x smaller; 2.0 x faster with 1 image and 2.0 x faster with 16 images")


def test_a_form_is_published_with_a_proof_and_golden_vectors_of_its_own(judge: Judge, calibration: list[Images]) -> None:
    form = forms(only(judge, "int8"), calibration)["int8"]
    assert form.parity is not None and form.golden is not None
    assert form.parity.passed
    assert (form.parity.sha256, form.parity.data_digest, form.parity.precision) == (form.result.sha256, "d" * 64, "int8")
    assert {(case.batch, case.optimization, case.run) for case in form.parity.cases} == {
        (batch, level, run) for batch in (1, 2, 3, 7, 20) for level in ("off", "on") for run in (1, 2)
    }
    assert {case.tolerance for case in form.parity.cases} == {0.05}
    assert form.parity.reference_max_abs < 0.05
    assert (form.golden.pixels == judge.golden.pixels).all()
    np.testing.assert_allclose(form.golden.probabilities.sum(axis=1), 1, rtol=0, atol=1e-5)
    assert forms(only(judge, "int8"), calibration)["int8"].content == form.content, "the same file every time"


def test_the_proof_of_a_form_says_how_far_two_runs_of_this_very_form_lie_apart(
    judge: Judge, calibration: list[Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = dataclasses.replace(only(judge, "int8"), proof=dataclasses.replace(judge.proof, repeat_max_abs=0.5))
    (parity,) = [form.parity for form in forms(steady, calibration).values() if form.parity]
    assert parity.repeat_max_abs < 1e-6, "that of fp32 is not handed on"
    noise = itertools.cycle([0.0, 0.003])

    def ask_noisily(session: onnxruntime.InferenceSession, images: torch.Tensor) -> Outputs:
        answers = ask_onnx(session, images)
        return {**answers, "probabilities": answers["probabilities"] + np.float32(next(noise))}

    monkeypatch.setattr(precision, "ask_onnx", ask_noisily)
    (parity,) = [form.parity for form in forms(steady, calibration).values() if form.parity]
    assert parity.repeat_max_abs == pytest.approx(0.003, abs=1e-6)


def test_calibration_on_black_images_is_refused_with_its_own_reason(judge: Judge, calibration: list[Images]) -> None:
    form = forms(only(judge, "int8"), [np.zeros_like(calibration[0])])["int8"]
    assert not form.result.published
    assert form.parity is not None and not form.parity.passed
    assert form.parity.reason == form.result.why
    assert form.result.why.startswith("it was calibrated on images unlike these: ")
    assert "lie outside of its range" in form.result.why


def test_calibration_on_another_data_set_is_refused_with_its_own_reason(judge: Judge, calibration: list[Images]) -> None:
    night = [images // 16 for images in calibration]
    assert "it was calibrated on images unlike these" in forms(only(judge, "int8"), night)["int8"].result.why


def test_an_overflow_that_a_cpu_hides_is_refused(judge: Judge, calibration: list[Images]) -> None:
    scaled = dataclasses.replace(only(judge, "fp16"), fp32=scale_between(judge.fp32, 1e5))
    result = forms(scaled, calibration)["fp16"].result
    assert not result.published
    assert result.why.startswith("float16 overflows: on real images `")
    assert result.top1_agreement == 1.0, "onnxruntime answers as if nothing were wrong"


def test_a_weight_beyond_float16_is_refused_and_the_others_are_judged(judge: Judge, calibration: list[Images]) -> None:
    found = forms(dataclasses.replace(judge, fp32=scale_between(judge.fp32, 1e7)), calibration)
    assert found["fp16"].result.why.startswith("the weight network.features.0.weight reaches ")
    assert found["fp16"].result.accuracy is None
    assert found["fp16"].content == b""
    assert found["int8"].result.published


def test_a_slower_form_is_refused_for_cpus_and_not_for_gpus(
    judge: Judge, calibration: list[Images], times: dict[str, float]
) -> None:
    times |= {"fp16": 1.5, "int8": 1.02}
    found = forms(judge, calibration)
    assert found["fp16"].result.published
    assert found["int8"].result.why == "it is not faster: 1.02 times as long as fp32 with 1 image"


def test_a_graph_that_fails_the_lint_is_refused(judge: Judge, calibration: list[Images]) -> None:
    other = dataclasses.replace(judge.config, opset=19)
    found = forms(dataclasses.replace(judge, config=other), calibration)
    assert "its opset is 20, not 19" in found["fp16"].result.why
    assert "its opset is 20, not 19" in found["int8"].result.why


def test_a_form_that_onnxruntime_cannot_load_or_dies_of_is_refused(judge: Judge) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(judge.fp32)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(GateError, match=r"onnxruntime cannot load it on a CPU \(.*NoSuchOperator"):
        precision._require_loadable(broken)
    precision._require_loadable(judge.fp32)


def test_a_form_that_ends_the_process_is_refused(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGSEGV, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: killed)
    found = forms(only(judge, "fp16"), [])
    assert found["fp16"].result.why == "onnxruntime cannot load it on a CPU (signal 11)"
    assert found["fp32"].result.published


def test_a_model_of_several_labels_is_judged_by_its_labels(
    judge: Judge, multi_model: onnx.ModelProto, calibration: list[Images]
) -> None:
    judge.dataset.label_rows = np.eye(3, dtype=np.uint8)[judge.dataset.rows["label"]]
    found = forms(dataclasses.replace(judge, task=THREE_LABELS, fp32=multi_model), calibration)
    assert found["fp16"].result.published, found["fp16"].result.why
    assert found["int8"].result.accuracy is not None


# ---- each reason for itself ----

FACTS = PrecisionResult("int8", published=True, why="", num_bytes=100, accuracy=0.9, drop=0.0, top1_agreement=1.0)
GOOD = Figures(num_samples=1000, accuracy=0.9, top1_agreement=1.0, num_not_finite=0, distance=0.01)


@pytest.mark.parametrize(
    ("facts", "asked", "reason"),
    [
        ({"drop": 0.0051}, {}, "accuracy 0.9000 is 0.0051 below that of fp32 (`export.max_drop` allows 0.005)"),
        ({}, {"distance": 0.26}, "its probabilities are not those of fp32: 0.26 apart on average (at most 0.25)"),
        ({}, {"distance": 0.24}, None),
        ({"drop": 0.005}, {}, None),
        ({"drop": -0.2}, {}, None),
        ({}, {"top1_agreement": 0.89}, "it answers as fp32 does on only 0.8900 of the images (at least 0.9)"),
        ({"precision": "fp16"}, {"top1_agreement": 0.98}, "only 0.9800 of the images (at least 0.99)"),
        ({}, {"num_not_finite": 3}, "3 of 1,000 images get answers that are no numbers"),
    ],
)
def test_answers_that_speak_against_a_form(facts: dict[str, object], asked: dict[str, object], reason: str | None) -> None:
    changed = dataclasses.replace(FACTS, **facts)  # type: ignore[arg-type]
    found = [*precision._answer_defects(changed, dataclasses.replace(GOOD, **asked), 0.005)]  # type: ignore[arg-type]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


@pytest.mark.parametrize(("case", "reference"), [(0.06, 0.0), (0.0, 0.06), (float("inf"), float("nan"))])
def test_answers_that_depend_on_who_computes_them_are_refused(case: float, reference: float) -> None:
    parity = Parity(False, [ParityCase(1, "off", 1, case, 0.05)], 1.0, 10, "", {}, reference)
    (reason,) = precision._parity_defects("int8", parity)
    assert "another machine would answer otherwise" in reason
    assert not [*precision._parity_defects("int8", dataclasses.replace(parity, cases=[], reference_max_abs=0.04))]


def test_a_form_that_is_not_smaller_is_refused() -> None:
    facts = dataclasses.replace(FACTS, latency=[Latency(1, 1, 1.0, 1.0, 0.5)])
    assert [*precision._gain_defects(facts, 101)] == []
    assert [*precision._gain_defects(facts, 100)] == ["its 100 bytes are no fewer than the 100 of fp32"]
