import dataclasses
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.bench import serve
from pipeline.bench.load import Answer
from pipeline.bench.results import Benchmark
from pipeline.bench.serve import ALONE, add_verdicts, require_right, run_benchmark
from pipeline.bench.served_models import CASES, digits
from pipeline.bench.servers import FASTAPI, LITSERVE, MLFLOW, OURS
from pipeline.errors import ConfigError
from pipeline.predictor import Predictor


def figures(rate: float, p50_ms: float = 1.0) -> list[dict[str, float]]:
    """Two rounds."""
    return [{"requests_a_cpu_second": rate * noise, "p50_ms": p50_ms} for noise in (0.5, 1.0)]


def verdicts(ours: float, p50_ms: float) -> dict[str, bool]:
    """What is said of a server of our name with so many requests a CPU-second, beside others with 1,000 and 100."""
    rows = {f"{OURS}, multipart": figures(ours, p50_ms), f"{OURS}, raw": figures(ours, p50_ms)}
    others = {f"{FASTAPI}, multipart": figures(1_000), f"{LITSERVE}, multipart": figures(100)}
    benchmark = Benchmark({}, [], {})
    add_verdicts(benchmark, "digits", {ALONE: [{"run_ms": 0.25}] * 2}, {clients: {**rows, **others} for clients in (1, 16, 64)})
    return {target.what: target.met for target in benchmark.targets}


def test_a_verdict_is_passed_on_each_contender_that_was_there() -> None:
    found = verdicts(ours=1_499, p50_ms=1.2)
    assert found == {
        f"requests a CPU-second beside {FASTAPI}, 16 clients": False,
        f"requests a CPU-second beside {FASTAPI}, 64 clients": False,
        f"requests a CPU-second beside {LITSERVE}, 16 clients": True,
        f"requests a CPU-second beside {LITSERVE}, 64 clients": True,
        "p50 of one client above the model's time": True,
    }
    assert verdicts(ours=1_501, p50_ms=1.3)[f"requests a CPU-second beside {FASTAPI}, 16 clients"]
    assert not verdicts(ours=1_501, p50_ms=1.3)["p50 of one client above the model's time"]


def test_a_server_with_other_answers_is_no_contender(tmp_path: Path) -> None:
    case = digits(tmp_path)
    predictor, image = Predictor(case.model), case.images[0]
    answer = predictor.predict(image)

    def said(label: str, probability: float, status: int = 200) -> Answer:
        return Answer(status, {}, json.dumps({"top_k": [{"label": label, "probability": probability}]}).encode())

    require_right(predictor, image, said(answer.label, answer.probability))
    with pytest.raises(RuntimeError, match=r"of 000\.jpg, the model class-"):
        require_right(predictor, image, said("class-99", answer.probability))
    with pytest.raises(RuntimeError, match=r"of 000\.jpg, the model class-"):
        require_right(predictor, image, said(answer.label, answer.probability + 0.01))
    with pytest.raises(RuntimeError, match="answered 503"):
        require_right(predictor, image, said(answer.label, answer.probability, 503))


@pytest.mark.parametrize(("said", "reason"), [("", "ended with -9"), ("Traceback\nOSError: no port\n", "OSError: no port")])
def test_clients_that_break_down_are_an_error_that_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    done = subprocess.CompletedProcess([], -9, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    server: Any = SimpleNamespace(port=1, cpu_seconds=lambda: 0.0)
    with pytest.raises(RuntimeError, match=f"^16 clients: {reason}$"):
        serve._load(server, tmp_path, clients=16, seconds=1.0)


def test_one_core_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ConfigError, match="needs two cores"):
        run_benchmark(tmp_path, ["digits"], rounds=1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_our_server_is_measured_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.setattr(serve, "is_installed", lambda name: name in (OURS, FASTAPI))
    quick = dataclasses.replace(digits(tmp_path / "digits"), seconds=0.5)
    monkeypatch.setitem(CASES, "digits", lambda _: quick)
    benchmark = run_benchmark(tmp_path, ["digits"], rounds=1)
    assert benchmark.left_out == {LITSERVE: "not installed", MLFLOW: "not installed"}
    assert list(benchmark.figures) == ["digits", *(f"digits, clients: {clients}" for clients in (1, 16, 64))]
    for rows in list(benchmark.figures.values())[1:]:
        assert rows.keys() == {f"{OURS}, multipart", f"{OURS}, raw", f"{OURS}, json", f"{FASTAPI}, multipart"}
        assert all(row["requests_a_cpu_second"] > 10 for row in rows.values())
    assert len(benchmark.targets) == 3
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["versions"]["onnxruntime"]
