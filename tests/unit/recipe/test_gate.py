import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.errors import ConfigError, GateError
from pipeline.recipe import gate
from pipeline.recipe.baselines import BASELINES
from pipeline.recipe.gate import CHECKS, OUTPUTS, PICTURE, VERDICTS, examine, left_out, require_green, run_checks
from pipeline.recipe.page import PAGE
from pipeline.recipe.verdict import Subject, Verdict
from tests.unit.recipe.conftest import ChangeNetwork


def verdict_of(check: str, verdict: Literal["green", "red", "skipped"], why: str = "") -> Verdict:
    return Verdict(check, verdict, 0.5, "", why)


def run_only(subject: Subject, *names: str) -> list[Verdict]:
    return run_checks(subject.config, subject.manifest, subject.spec, left_out([], names))


class Tracker:
    """Stands where MLflow would be told."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.files: list[str] = []

    def log_final(self, metrics: dict[str, float], headline: str = "") -> None:
        self.figures |= metrics

    def log_file(self, path: Path, folder: str = "") -> None:
        assert path.is_file()
        self.files.append(f"{folder}/{path.name}")


def test_a_sound_run_is_green_and_leaves_verdicts_pictures_and_baselines(subject: Subject) -> None:
    tracker = Tracker()
    verdicts = run_checks(subject.config, subject.manifest, subject.spec, {}, tracker)  # type: ignore[arg-type]
    require_green(verdicts)
    run_dir = subject.config.run_dir
    saved = json.loads((run_dir / VERDICTS).read_text())
    assert saved == [verdict.as_json() for verdict in verdicts]
    assert [list(verdict) for verdict in saved] == [["check", "verdict", "value", "expected", "why"]] * len(CHECKS)
    assert [verdict["check"] for verdict in saved] == list(CHECKS)
    assert [verdict["verdict"] for verdict in saved] == ["green"] * (len(CHECKS) - 1) + ["skipped"], "nothing is pretrained"
    with Image.open(run_dir / PICTURE) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 96, "at least one tile and its caption"
    accuracy = json.loads((run_dir / BASELINES).read_text())["accuracy"]
    assert accuracy["majority"] == {"val": 4 / 12, "test": 4 / 12}
    page = (run_dir / PAGE).read_text()
    for verdict in verdicts:
        assert verdict.check in page
    assert tracker.files == [f"check/{path.name}" for path in OUTPUTS]
    assert tracker.figures == {
        "check/red": 0.0,
        "baseline/majority": 4 / 12,
        "baseline/logistic_regression": accuracy["logistic_regression"]["val"],
    }


def test_a_check_that_is_left_out_does_not_run_and_is_recorded(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(subject: Subject) -> Verdict:
        raise AssertionError("a skipped check ran")

    for name in CHECKS:
        if name != "init_loss":
            monkeypatch.setitem(gate.CHECKS, name, must_not_run)
    skip = [name for name in CHECKS if name not in ("init_loss", "overfit")]
    run_checks(subject.config, subject.manifest, subject.spec, {**left_out(skip), "overfit": "not named in --only"})
    saved = {verdict["check"]: verdict for verdict in json.loads((subject.config.run_dir / VERDICTS).read_text())}
    skipped = {"verdict": "skipped", "value": None, "expected": "", "why": "named in check.skip"}
    assert saved["seed"] == {"check": "seed", **skipped}
    assert saved["overfit"] == {"check": "overfit", **skipped, "why": "not named in --only"}
    assert saved["init_loss"]["verdict"] == "green"


def test_a_check_whose_ground_is_red_is_not_run(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHECKS:
        found = verdict_of(name, "red" if name == "gradients" else "green")
        monkeypatch.setitem(gate.CHECKS, name, functools.partial(lambda verdict, _: verdict, found))
    verdicts = {entry.verdict.check: entry.verdict for entry in examine(subject, {})}
    assert verdicts["overfit"].verdict == verdicts["zero_input"].verdict == "skipped"
    assert verdicts["overfit"].why == "it takes for granted what is red: gradients"
    assert verdicts["init_loss"].verdict == "green"


def test_only_and_skip_say_why_each_check_is_left_out() -> None:
    assert left_out([]) == {}
    assert left_out(["seed"]) == {"seed": "named in check.skip"}
    others = {name: "not named in --only" for name in CHECKS if name != "seed"}
    assert left_out([], ["seed"]) == others
    assert left_out(["labels"], ["seed"]) == others | {"labels": "named in check.skip"}
    with pytest.raises(ConfigError, match=r"`--only` names 'seed', which check.skip leaves out"):
        left_out(["seed"], ["seed"])


def spoil(network: nn.Sequential) -> None:
    nn.init.constant_(network.get_parameter("classifier.2.weight"), float("nan"))


def test_a_red_verdict_is_saved_before_the_gate_closes(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(spoil)
    verdicts = run_only(subject, "init_loss")
    with pytest.raises(GateError, match="init_loss: a fresh network's loss is nan"):
        require_green(verdicts)
    saved = json.loads((subject.config.run_dir / VERDICTS).read_text())
    assert [verdict["verdict"] for verdict in saved if verdict["check"] == "init_loss"] == ["red"]


def test_a_value_that_is_no_number_is_still_json(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(spoil)
    run_only(subject, "init_loss")

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON, and readers other than Python's refuse the file")

    json.loads((subject.config.run_dir / VERDICTS).read_text(), parse_constant=refuse)


def test_the_gate_names_every_red_check_why_and_how_to_go_on() -> None:
    verdicts = [verdict_of("seed", "green"), verdict_of("init_loss", "red", "too large"), verdict_of("overfit", "red", "no")]
    message = r"^init_loss: too large; overfit: no\. .*--check\.skip=\[init_loss,overfit\]"
    with pytest.raises(GateError, match=message) as caught:
        require_green(verdicts)
    assert caught.value.exit_code == 3


def test_a_skipped_check_does_not_close_the_gate() -> None:
    require_green([verdict_of("seed", "skipped"), verdict_of("overfit", "green")])


@pytest.mark.parametrize(
    ("name", "suggestion"), [("overfitt", "Did you mean 'overfit'"), ("xyz", "Known: seed, pixels, labels")]
)
def test_a_name_that_is_no_check_is_refused(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"`check.skip` names '{name}', which is no check.* {suggestion}"):
        left_out(["seed", name])
    with pytest.raises(ConfigError, match=f"`--only` names '{name}', which is no check.* {suggestion}"):
        left_out([], [name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_runs_every_check_in_a_process_that_was_told_nothing_of_cublas(subject: Subject) -> None:
    """cuBLAS reads CUBLAS_WORKSPACE_CONFIG at its first use in a process: whoever uses the GPU before the checks decides."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-m", "pipeline", "check", "--config=digits", "--name=tiny", "--data.global_batch_size=8"]
    command += [f"--dataset.path={subject.manifest.folder}", f"--runs_dir={subject.config.runs_dir}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "all checks green" in done.stdout
