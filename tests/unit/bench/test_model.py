import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.bench import model as bench
from pipeline.bench import runtimes
from pipeline.bench.model import bench_model, find_model, golden_batch, require_same
from pipeline.errors import ConfigError, ModelError, RunError
from pipeline.export.quantize import to_float16
from pipeline.golden import GoldenVectors
from pipeline.verbs.machine import bench as bench_verb
from tests.unit.conftest import THREE_CLASSES
from tests.unit.export.sabotage import change_weight, node_of, weight_of


@pytest.fixture
def golden(tiny_network: nn.Sequential) -> GoldenVectors:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        logits = tiny_network(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    return GoldenVectors(["a", "b", "c"], [b"1", b"2", b"3"], pixels, THREE_CLASSES.probabilities(logits).numpy())


@pytest.fixture
def model_path(exported_model: onnx.ModelProto, golden: GoldenVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its golden vectors, outside of any run; its bench takes a moment."""
    monkeypatch.setattr(bench, "SECONDS_A_TURN", 0.001)
    monkeypatch.setattr(bench, "thread_counts", lambda: [1])
    return leave(tmp_path / "model", exported_model, golden)


def leave(folder: Path, model: onnx.ModelProto, golden: GoldenVectors) -> Path:
    folder.mkdir(parents=True)
    (folder / "golden.npz").write_bytes(golden.to_bytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_every_runtime_that_is_there_is_timed_and_the_others_are_named(
    model_path: Path, exported_model: onnx.ModelProto, golden: GoldenVectors, tmp_path: Path
) -> None:
    leave(model_path.parent / "fp16", to_float16(exported_model), golden)
    found = bench_model(model_path, tmp_path / "out", rounds=1)
    timed = {figures.contender for figures in found.figures}
    assert (
        {"onnxruntime fp32", "onnxruntime fp16"}
        <= timed
        <= {"onnxruntime fp32", "onnxruntime fp16", "OpenVINO fp32", "OpenVINO fp16"}
    )
    assert {(figures.batch, figures.threads) for figures in found.figures} == {(1, 1), (8, 1), (32, 1)}
    assert all(0 < row.p50_ms <= row.p90_ms <= row.p99_ms and row.images_a_second > 0 for row in found.figures)
    assert [row.times for row in found.figures if row.contender == "onnxruntime fp32"] == [1, 1, 1]
    assert found.left_out["torch"] == "the model lies in no run folder, so there is no checkpoint to ask"
    assert found.left_out["onnxruntime int8"].endswith("int8/model.onnx; `export.precisions` names what is exported")
    kept = json.loads((tmp_path / "out/model.json").read_text())
    assert len(kept["figures"]) == len(found.figures)
    assert kept["machine"]["versions"]["onnxruntime"]
    assert (tmp_path / "out/model.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_answers_otherwise_is_not_timed(
    model_path: Path, exported_model: onnx.ModelProto, golden: GoldenVectors, tmp_path: Path
) -> None:
    other = to_float16(exported_model)
    (last,) = [node for node in other.graph.node if node.op_type == "Gemm"]
    change_weight(weight_of(other, last), lambda values: -values)
    leave(model_path.parent / "fp16", other, golden)
    found = bench_model(model_path, tmp_path / "out", rounds=1)
    assert "onnxruntime fp16" not in {figures.contender for figures in found.figures}
    assert found.left_out["onnxruntime fp16"].startswith("answers otherwise: probabilities differ by ")


def test_a_model_that_is_not_what_it_was_is_an_error_and_not_a_figure(
    model_path: Path, exported_model: onnx.ModelProto, tmp_path: Path
) -> None:
    changed = onnx.load(model_path)
    change_weight(weight_of(changed, node_of(changed, "logits")), lambda values: -values)
    model_path.write_bytes(changed.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx: answers otherwise: .* `shardline verify` says more"):
        bench_model(model_path, tmp_path / "out", rounds=1)
    assert not (tmp_path / "out").exists()


def test_a_model_without_golden_vectors_has_nothing_to_be_compared_with(model_path: Path, tmp_path: Path) -> None:
    model_path.with_name("golden.npz").unlink()
    with pytest.raises(ModelError, match=r"has no golden\.npz beside it to compare answers with"):
        bench_model(model_path, tmp_path / "out", rounds=1)


def test_a_run_its_model_and_a_form_of_it_are_the_same_subject(
    exported_model: onnx.ModelProto, golden: GoldenVectors, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    leave(run / "export", exported_model, golden)
    leave(run / "export/int8", exported_model, golden)
    assert find_model(run / "export/model.onnx") == (run / "export", None)
    with pytest.raises(RunError, match=r"run: no run there \(no run\.json\)"):
        find_model(run)
    (run / "run.json").write_text("{}")
    for path in (run, run / "export/model.onnx", run / "export/int8/model.onnx"):
        assert find_model(path) == (run / "export", run)
    with pytest.raises(ModelError, match="no such model file"):
        find_model(tmp_path / "none.onnx")


def test_golden_images_are_repeated_to_the_batch(golden: GoldenVectors) -> None:
    images, wanted = golden_batch(golden, 5)
    assert (images.shape, wanted.shape) == ((5, 3, 16, 16), (5, 3))
    assert (images[3] == golden.pixels[0].transpose(2, 0, 1)).all()
    require_same(wanted + np.float32(1e-3), wanted, "fp16")
    for found in (wanted + np.float32(1e-3), wanted[:4], np.full_like(wanted, np.nan)):
        with pytest.raises(ModelError, match="answers otherwise"):
            require_same(found, wanted, "fp32")


@pytest.mark.parametrize("name", ["torch", pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_the_trained_network_answers_as_it_did(
    tiny_network: nn.Sequential, golden: GoldenVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(runtimes, "_load_trained", lambda run_dir: SimpleNamespace(network=tiny_network, task=THREE_CLASSES))
    answer = runtimes.runtimes(tmp_path, tmp_path)[name].make(1)
    for size in (1, 4):
        images, wanted = golden_batch(golden, size)
        require_same(answer(images), wanted, "fp32")


def test_without_a_compiler_torch_compile_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtimes, "_load_trained", lambda run_dir: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RunError, match=r"torch\.compile needs a C\+\+ compiler, and there is no g\+\+ here"):
        runtimes.runtimes(tmp_path, tmp_path)["torch.compile"].make(1)


def test_only_a_model_is_benched_by_its_path() -> None:
    with pytest.raises(ConfigError, match="`bench step` takes no path, but 'runs/digits' was given"):
        bench_verb(["step", "runs/digits"])


# One signal that Python handles, on whatever stack OpenVINO has left for it.
SIGNAL_AFTER_OPENVINO = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from pipeline.bench.runtimes import _open_openvino
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
answers = [_open_openvino(Path(sys.argv[1]), 1) for _ in range(2)]
while answers:
    answers.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_openvino_was_asked_is_handled(model_path: Path) -> None:
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", SIGNAL_AFTER_OPENVINO, str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
