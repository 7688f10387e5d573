"""The server under load: good requests are answered rightly among bad ones, while the model is replaced, and to the end."""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from pipeline.files import sha256_of, write_bytes
from pipeline.golden import GOLDEN, GoldenVectors
from pipeline.predictor import Predictor
from tests.hostile import attacks, encoded
from tests.load import Plan
from tests.processes import children_of
from tests.serving import Served, serving

TIMEOUT_SECONDS = 2.0
STOP_SECONDS = 15.0
# Of a good request while attackers send bombs, floods and noise, and models are loaded. Two cores carry the server, its
# attackers, and the clients, who compare every answer. With five times as much other work on them it is up to 230 and 1,100 ms.
MOST_P99_MS = {16: 500.0, 64: 1500.0}
# From 20 % of the time to its end. It grows by a tenth to a sixth while every thread's allocator meets its largest batch, and
# stays there: 40,000 requests and nine reloads. A leak of 500 bytes a request would be a quarter, of each model a half.
MOST_GROWTH = 0.25
JPEG = encoded(Image.new("RGB", (8, 8)), "JPEG")


@pytest.fixture
def export_dir(workspace: Path, chain: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the digits' export, whose files a test may replace."""
    return Path(shutil.copytree(workspace / "runs/digits/export", tmp_path / "export"))


@pytest.fixture
def images(export_dir: Path, tmp_path: Path) -> list[str]:
    """The awkward images that went with the model, as files."""
    golden = GoldenVectors.read(export_dir / GOLDEN)
    paths = [tmp_path / f"image-{kind}" for kind in golden.kinds]
    for path, content in zip(paths, golden.encoded, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


@pytest.fixture
def sibling(export_dir: Path, tmp_path: Path) -> Path:
    """The export of a model that answers otherwise, with a proof of its own."""
    folder = tmp_path / "sibling"
    folder.mkdir()
    model = onnx.load(export_dir / "model.onnx")
    num_classes = len(Predictor(export_dir / "model.onnx").class_names)
    (bias,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [num_classes]]
    shifted = onnx.numpy_helper.to_array(bias) + np.linspace(0, 2, num_classes, dtype=np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    onnx.save(model, folder / "model.onnx")
    golden = GoldenVectors.read(export_dir / GOLDEN)
    answers = Predictor(folder / "model.onnx").probabilities([*golden.pixels])  # (N, K)
    assert np.abs(answers - golden.probabilities).max() > 0.01, "it would be taken for the other"
    (folder / GOLDEN).write_bytes(GoldenVectors(golden.kinds, golden.encoded, golden.pixels, answers).to_bytes())
    parity = json.loads((export_dir / "parity.json").read_text())
    proof = {"sha256": sha256_of(folder / "model.onnx"), "golden_sha256": sha256_of(folder / GOLDEN)}
    (folder / "parity.json").write_text(json.dumps({**parity, **proof}))
    return folder


@contextlib.contextmanager
def loaded(model: Path, *options: str) -> Iterator[Served]:
    """A server with short limits of time, which looks for another model all the time."""
    settings = [f"--timeout-seconds={TIMEOUT_SECONDS}", "--poll-seconds=0.2", "--threads=1", *options]
    with serving(str(model), *settings, cwd=model.parent, log=model.parent / "serve.log") as served:
        yield served


def start_load(plan: Plan) -> subprocess.Popen[str]:
    """The clients and attackers, in a process of their own, once they ask."""
    command = [sys.executable, "-m", "tests.load", json.dumps(asdict(plan))]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert load.stdout is not None
    assert load.stdout.readline() == "begun\n"  # its imports take seconds on a busy machine
    return load


def report_of(load: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """What the clients say in the end."""
    said, _ = load.communicate(timeout=seconds)
    assert load.returncode == 0
    report: dict[str, Any] = json.loads(said)
    return report


def replace(export_dir: Path, other: Path) -> None:
    """Put another model where the served one lies, as `shardline export` does: each file whole, the model last."""
    for name in (GOLDEN, "parity.json", "model.onnx"):
        write_bytes(export_dir / name, (other / name).read_bytes())


def memory_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes that a process and all its descendants have for themselves."""
    return sum(anonymous_bytes(pid) for pid in descendants(process.pid))


def descendants(pid: int) -> list[int]:
    """A process and what it started, and what that started."""
    return [pid, *(found for child in children_of(pid) for found in descendants(child))]


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def require_all_right(report: dict[str, Any]) -> None:
    """Nothing wrong, nothing lost, nothing left out."""
    assert report["num_failures"] == 0, "\n".join(report["failures"])
    assert report["wrong_outcomes"] == [], "\n".join(report["wrong_outcomes"])
    assert set(report["attacks"]) == {attack.name for attack in attacks("any", JPEG, side=8)}, "each came to its turn"
    assert min(report["answered"].values()) > 0 and len(report["answered"]) == 7, "every form was answered"
    assert len(report["by_model"]) == 2, "both models answered"


@pytest.fixture
def models(export_dir: Path, sibling: Path, tmp_path: Path) -> list[Path]:
    """Copies of both exports."""
    return [Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}")) for folder in (export_dir, sibling)]


def plan_of(served: Served, models: list[Path], images: list[str], clients: int, seconds: float) -> Plan:
    """Clients and attackers that know both models, and stop the server in the end."""
    paths = [str(folder / "model.onnx") for folder in models]
    return Plan(int(served.url.rsplit(":", 1)[1]), paths, images, clients, 8, seconds, TIMEOUT_SECONDS, stop=served.process.pid)


def test_good_requests_are_answered_rightly_among_bad_ones_through_a_reload_and_a_stop(
    export_dir: Path, models: list[Path], images: list[str]
) -> None:
    seconds = 10.0
    with loaded(export_dir / "model.onnx") as served:
        load = start_load(plan_of(served, models, images, 16, seconds))
        time.sleep(seconds / 2)
        replace(export_dir, models[1])
        report = report_of(load, seconds + 60)
        assert served.process.wait(timeout=STOP_SECONDS) == 0
    require_all_right(report)
    assert report["in_flight_at_stop"] > 0, "the stop came in the middle of nothing"
    assert served.log.read_text().count("has taken the place of") == 1
    assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("clients", [16, 64])
def test_memory_is_flat_and_answers_come_in_time(
    export_dir: Path, models: list[Path], images: list[str], clients: int, workers: int
) -> None:
    seconds, reloads = 60.0, 10
    with loaded(export_dir / "model.onnx", f"--workers={workers}") as served:
        load = start_load(plan_of(served, models, images, clients, seconds))
        sizes = []
        for number in range(1, reloads):
            time.sleep(seconds / reloads)
            sizes.append(memory_of(served.process))
            replace(export_dir, models[number % 2])
        report = report_of(load, seconds + 60)
        assert served.process.wait(timeout=STOP_SECONDS) == 0
    require_all_right(report)
    said = f"p99 {report['p99_ms']:.0f} ms, memory {', '.join(f'{size / 1e6:.0f}' for size in sizes)} MB"
    assert served.log.read_text().count("has taken the place of") >= reloads / 2
    assert report["p99_ms"] <= MOST_P99_MS[clients], said
    assert statistics.median(sizes[-3:]) <= statistics.median(sizes[1:4]) * (1 + MOST_GROWTH), said
    print(said)
