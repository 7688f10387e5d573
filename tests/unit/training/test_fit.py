"""Settings of the trainer change how a training is computed, not what: alone and together."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from pipeline.config import Config
from pipeline.training import compiling
from pipeline.training.callbacks import WarmUpBuckets
from pipeline.training.every_step import EveryStep
from pipeline.training.monitors import StepMonitor
from tests.unit.training.conftest import Fit, change, weights_of


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Two epochs of nine steps."""
    return change(change(tiny_config, "trainer", max_epochs=2), "data", global_batch_size=4)


def callbacks(config: Config) -> list[L.Callback]:
    average = [EMAWeightAveraging(decay=config.trainer.ema_decay)] if config.trainer.ema_decay else []
    return [WarmUpBuckets((16, 16)), StepMonitor(config), *average]


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether what each convolution gave had its channels together, in the order in which they ran."""
    found: list[bool] = []
    forward = nn.Conv2d.forward

    def watch(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        features = forward(layer, images)
        found.append(features.is_contiguous(memory_format=torch.channels_last))
        return features

    monkeypatch.setattr(nn.Conv2d, "forward", watch)
    return found


def test_channels_stay_together_through_the_network_where_they_are_asked_to(
    config: Config, fit: Fit, layouts: list[bool]
) -> None:
    together = fit(change(config, "trainer", channels_last=True), *callbacks(config))
    assert len(layouts) > 0 and all(layouts[2:])  # the first two are those of the empty image that warms up
    # The same sums in another order: a few roundings of 2**-24 in each of 18 steps.
    assert torch.allclose(weights_of(together), weights_of(fit(config, *callbacks(config))), rtol=0, atol=1e-4)


def test_a_compiled_network_has_the_names_and_the_weights_of_the_plain_one(
    config: Config, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real compiler takes a minute; this one calls the same kernels in the same order.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    monkeypatch.setattr(compiling, "LEAST_GAIN", 0.0)
    compiled = fit(change(config, "trainer", compile=True), *callbacks(config))
    assert compiled.network._compiled_call_impl is not None
    plain = fit(config, *callbacks(config))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(weights_of(compiled), weights_of(plain))


@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        ({"precision": "bf16-mixed", "ema_decay": 0.9, "channels_last": True}, {"args": {"nesterov": True, "fused": True}}),
        ({"precision": "bf16-mixed", "gradient_clip_norm": 0.5}, {"name": "AdamW"}),
        ({"ema_decay": 0.9, "gradient_clip_norm": 0.5, "non_finite": "skip"}, {"name": "Adagrad"}),
        ({"ema_decay": 0.9}, {"name": "RMSprop", "args": {"momentum": 0.9, "centered": True}}),
    ],
    ids=lambda values: " ".join(map(str, values.values())),
)
def test_settings_work_together(config: Config, fit: Fit, trainer: dict[str, Any], optimizer: dict[str, Any]) -> None:
    config = change(change(config, "trainer", **trainer), "optimizer", lr=1e-3, **optimizer)
    before = weights_of(fit(change(config, "trainer", max_epochs=1), *callbacks(config)))
    after = weights_of(fit(config, *callbacks(config)))
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)


def test_settings_work_with_step_hooks_called_from_one_place(config: Config, fit: Fit) -> None:
    config = change(config, "trainer", ema_decay=0.9, log_every_steps=3)
    together = callbacks(config)
    called_by_one = weights_of(fit(config, *together, EveryStep(together)))
    assert any(isinstance(each, StepMonitor) and math.isfinite(each.gradient_norm) for each in together)
    assert torch.equal(called_by_one, weights_of(fit(config, *callbacks(config))))
