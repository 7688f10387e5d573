"""Compiled by a backend that calls the same kernels: the real compiler takes half a minute."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import Config
from pipeline.training import compiling
from pipeline.training.compiling import Trial, choose_compiled, measure
from tests.unit.training.conftest import change

SIZE = (16, 16)
SLOW_SECONDS = 0.02


class Slower(nn.Module):
    """Identity that takes its time, unless it is compiled (or only then)."""

    def __init__(self, when_compiled: bool) -> None:
        super().__init__()
        self.when_compiled, self.is_compiled, self.calls = when_compiled, False, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.is_compiled == self.when_compiled:
            time.sleep(SLOW_SECONDS)
        return images


def network_of(when_compiled: bool) -> nn.Sequential:
    class ToFloat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float() / 255

    return nn.Sequential(ToFloat(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Slower(when_compiled))


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_it(module: nn.Module) -> None:
        for each in module.modules():
            if isinstance(each, Slower):
                each.is_compiled = True

    monkeypatch.setattr(nn.Module, "compile", compile_it)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """A run that asks for the compiler."""
    return change(tiny_config, "trainer", compile=True)


@pytest.mark.parametrize("wins", [True, False])
def test_the_faster_is_taken_and_the_log_says_why(config: Config, wins: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_compiled(config, network_of(when_compiled=not wins), SIZE, None) is wins
    said = capsys.readouterr().out
    assert "torch.compile is " in said and " x as fast as eager (" in said and " s to compile): " in said
    assert said.rstrip().endswith("trained compiled" if wins else "not compiled")


def test_what_is_no_gain_is_left_out() -> None:
    assert not Trial(10.0, 9.9, 1.0).is_won and Trial(10.0, 9.0, 1.0).is_won
    assert (
        str(Trial(10.0, 12.5, 3.4))
        == "torch.compile is 0.80 x as fast as eager (12.5 ms for 10.0, 3 s to compile): not compiled"
    )


def test_the_trial_leaves_no_trace(config: Config) -> None:
    network = network_of(when_compiled=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    trial = measure(config, network, SIZE)
    assert trial.eager > 1000 * SLOW_SECONDS > trial.compiled > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    slower = network[-1]
    assert isinstance(slower, Slower) and slower.calls == 0


ASKED: dict[str, Any] = {"config": {"trainer": {"compile": True}}}


@pytest.mark.parametrize(
    ("before", "expected"),
    [(ASKED | {"compiled": True}, True), (ASKED | {"compiled": False}, False), (ASKED, True)],
    ids=["won", "lost", "was not measured then"],
)
def test_a_run_that_goes_on_keeps_what_it_began_with(
    config: Config, before: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compiling, "measure")
    assert choose_compiled(config, network_of(when_compiled=True), SIZE, before) is expected
    plain = change(config, "trainer", compile=False)
    assert choose_compiled(plain, network_of(when_compiled=True), SIZE, before) is False


def test_a_run_that_did_not_ask_for_it_is_measured_when_it_goes_on_with_it(config: Config) -> None:
    before = {"config": {"trainer": {"compile": False}}, "compiled": False}
    assert choose_compiled(config, network_of(when_compiled=False), SIZE, before) is True


@pytest.mark.slow
def test_the_real_compiler_is_measured_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    trial = measure(config, network_of(when_compiled=True)[:-1], SIZE)
    assert trial.eager > 0 and trial.compiled > 0 and trial.seconds > 0.1
