import dataclasses
import io
import json
import os
import subprocess
import sys
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config import CheckConfig, Config
from pipeline.data.dataset import Batch
from pipeline.errors import ConfigError, GateError
from pipeline.recipe import gate
from pipeline.recipe.gate import PICTURE, VERDICTS, draw_batch, require_green, require_known_checks, run_checks
from pipeline.recipe.verdict import Subject, Verdict
from tests.unit.recipe.conftest import ChangeNetwork


def skipping(config: Config, *names: str) -> Config:
    return dataclasses.replace(config, check=CheckConfig(skip=list(names)))


def verdict_of(check: str, verdict: Literal["green", "red", "skipped"], why: str = "") -> Verdict:
    return Verdict(check, verdict, 0.5, "", why)


def test_a_sound_run_is_green_and_leaves_verdicts_and_a_picture(subject: Subject) -> None:
    verdicts = run_checks(subject.config, subject.manifest, subject.spec)
    require_green(verdicts)
    saved = json.loads((subject.config.run_dir / VERDICTS).read_text())
    assert saved == [dataclasses.asdict(verdict) for verdict in verdicts]
    assert [list(verdict) for verdict in saved] == [["check", "verdict", "value", "expected", "why"]] * 3
    assert [(verdict["check"], verdict["verdict"]) for verdict in saved] == [
        ("seed", "green"),
        ("init_loss", "green"),
        ("overfit", "green"),
    ]
    with Image.open(subject.config.run_dir / PICTURE) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 96, "at least one tile and its caption"


def test_a_skipped_check_does_not_run_and_is_recorded(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(subject: Subject) -> Verdict:
        raise AssertionError("a skipped check ran")

    monkeypatch.setitem(gate.CHECKS, "overfit", must_not_run)
    monkeypatch.setitem(gate.CHECKS, "seed", must_not_run)
    config = skipping(subject.config, "overfit", "seed")
    run_checks(config, subject.manifest, subject.spec)
    saved = json.loads((config.run_dir / VERDICTS).read_text())
    skipped = {"verdict": "skipped", "value": None, "expected": "", "why": "named in check.skip"}
    assert [saved[0], saved[2]] == [{"check": "seed", **skipped}, {"check": "overfit", **skipped}]
    assert saved[1]["verdict"] == "green"


def spoil(network: nn.Sequential) -> None:
    nn.init.constant_(network.get_parameter("classifier.2.weight"), float("nan"))


def test_a_red_verdict_is_saved_before_the_gate_closes(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(spoil)
    config = skipping(subject.config, "overfit", "seed")
    verdicts = run_checks(config, subject.manifest, subject.spec)
    with pytest.raises(GateError, match="init_loss: a fresh network's loss is nan"):
        require_green(verdicts)
    assert json.loads((config.run_dir / VERDICTS).read_text())[1]["verdict"] == "red"


def test_a_value_that_is_no_number_is_still_json(subject: Subject, change_network: ChangeNetwork) -> None:
    change_network(spoil)
    run_checks(skipping(subject.config, "overfit", "seed"), subject.manifest, subject.spec)

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
    ("name", "suggestion"), [("overfitt", "Did you mean 'overfit'"), ("xyz", "Known: seed, init_loss, overfit")]
)
def test_a_name_in_skip_that_is_no_check_is_refused(name: str, suggestion: str) -> None:
    require_known_checks(["seed", "init_loss", "overfit"])
    with pytest.raises(ConfigError, match=f"`check.skip` names '{name}', which is no check.* {suggestion}"):
        require_known_checks(["seed", name])


def test_the_picture_shows_the_pixels_that_the_network_sees() -> None:
    images = torch.zeros(9, 3, 2, 4, dtype=torch.uint8)  # (N, 3, H, W)
    images[:, 0] = torch.arange(9, dtype=torch.uint8).view(9, 1, 1) * 20  # red
    images[:, 2, 1, 3] = 255  # the lower right pixel has blue in it
    labels = torch.arange(9) % 2
    batch = Batch(image=images, label=labels, weight=torch.ones(9), index=torch.arange(9), bad=[])
    with Image.open(io.BytesIO(draw_batch(batch, ["cat", "a name in 漢字 that is far too long"]))) as file:
        picture = file.convert("RGB")
    # Tiles are 96 x 48 pixels, with 16 below for the caption and 4 between them; the ninth begins a second row.
    for number in range(9):
        left, top = (number % 8) * 100 + 2, (number // 8) * 68 + 2
        assert picture.getpixel((left, top)) == (number * 20, 0, 0)
        assert picture.getpixel((left + 71, top + 47)) == (number * 20, 0, 0), "enlarged without smoothing"
        assert picture.getpixel((left + 72, top + 47)) == (number * 20, 0, 255), "enlarged without smoothing"
        assert picture.getpixel((left + 95, top + 48)) == (255, 255, 255)


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
