import copy
import math
import re
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from pipeline.config import ModelConfig, OptimizerConfig, PreprocessConfig, SchedulerConfig, TrainerConfig
from pipeline.errors import ConfigError
from pipeline.manifest import ImageStats
from pipeline.models.sequential import build_network
from pipeline.preprocess import build_spec
from pipeline.training.optim import WarmupCosine, build_optimizer, build_scheduler, may_fuse


@pytest.fixture
def network() -> nn.Sequential:
    """A convolution, a BatchNorm and a linear layer."""
    spec = build_spec(PreprocessConfig(resize=[4, 4]), ImageStats("train", [0.5] * 3, [0.25] * 3))
    return build_network(ModelConfig(channels=[4]), 2, spec)


@pytest.fixture
def optimizer(network: nn.Sequential) -> Optimizer:
    """Plain SGD for schedulers to move."""
    return build_optimizer(network, OptimizerConfig(lr=0.1))


# ---- optimizers ----


def test_sgd_has_the_customary_momentum_unless_another_is_given(network: nn.Sequential) -> None:
    customary = build_optimizer(network, OptimizerConfig(name="SGD", lr=0.25))
    assert isinstance(customary, SGD)
    assert [(group["lr"], group["momentum"]) for group in customary.param_groups] == [(0.25, 0.9)] * 2
    given = build_optimizer(network, OptimizerConfig(name="SGD", args={"momentum": 0.0}))
    assert [group["momentum"] for group in given.param_groups] == [0.0] * 2


def test_building_an_optimizer_leaves_its_configuration_alone(network: nn.Sequential) -> None:
    config = OptimizerConfig(name="SGD", args={"weight_decay": 0.1})
    before = copy.deepcopy(config)
    build_optimizer(network, config)
    assert config == before


@pytest.mark.parametrize(("name", "args", "decay"), [("SGD", {"weight_decay": 0.1}, 0.1), ("AdamW", {}, 0.01)])
def test_weight_decay_falls_on_weights_and_never_on_biases_or_norms(
    network: nn.Sequential, name: str, args: dict[str, Any], decay: float
) -> None:
    built = build_optimizer(network, OptimizerConfig(name=name, args=args))
    names = {parameter: name for name, parameter in network.named_parameters()}
    decays = {names[each]: group["weight_decay"] for group in built.param_groups for each in group["params"]}
    assert decays == {
        "features.0.weight": decay,
        "features.1.weight": 0.0,
        "features.1.bias": 0.0,
        "classifier.2.weight": decay,
        "classifier.2.bias": 0.0,
    }


def test_frozen_parameters_are_left_out(network: nn.Sequential) -> None:
    network.get_submodule("features").requires_grad_(False)
    built = build_optimizer(network, OptimizerConfig(name="Adam", args={"betas": [0.8, 0.99]}))
    assert isinstance(built, Adam)
    assert tuple(built.param_groups[0]["betas"]) == (0.8, 0.99)
    assert sum(len(group["params"]) for group in built.param_groups) == 2


@pytest.mark.parametrize("name", ["LBFGS", "Rprop"])
def test_an_optimizer_without_weight_decay_still_gets_every_parameter(network: nn.Sequential, name: str) -> None:
    built = build_optimizer(network, OptimizerConfig(name=name))
    assert [len(group["params"]) for group in built.param_groups] == [5]
    with pytest.raises(ConfigError, match=f"`optimizer.args.weight_decay`: {name} has no such argument"):
        build_optimizer(network, OptimizerConfig(name=name, args={"weight_decay": 0.1}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="SDG"), r"`optimizer.name` is 'SDG', which torch.optim does not have. Did you mean 'SGD'\?"),
        (OptimizerConfig(name="adam"), r"Did you mean 'Adam'\?"),
        (OptimizerConfig(name="Optimizer"), r"'Optimizer', which torch.optim does not have. Known: ASGD, .*SGD"),
        (OptimizerConfig(name="lr_scheduler"), r"'lr_scheduler', which torch.optim does not have"),
        (OptimizerConfig(args={"momentun": 0.9}), r"`optimizer.args.momentun`: SGD .* Did you mean 'momentum'\?"),
        (OptimizerConfig(args={"xyz": 1}), r"`optimizer.args.xyz`: SGD has no such argument. Known: momentum, .*nesterov"),
    ],
)
def test_an_unknown_optimizer_or_argument_is_answered_with_the_nearest(
    network: nn.Sequential, config: OptimizerConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(network, config)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("SGD", {"momentum": -1}),
        ("SGD", {"momentum": "high"}),
        ("SGD", {"momentum": 0, "nesterov": True}),
        ("Adam", {"betas": 0.9}),
        ("Adam", {"betas": [0.9]}),
        ("Adam", {"betas": [0.9, 2]}),
        ("Adam", {"foreach": True, "fused": True}),
        ("Muon", {}),  # for matrices alone: a convolution has four axes
    ],
)
def test_what_an_optimizer_refuses_is_the_user_s_mistake(network: nn.Sequential, name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`optimizer`: {name} refuses its arguments"):
        build_optimizer(network, OptimizerConfig(name=name, args=args))


# ---- learning rates of parts ----


def rate_of_each(network: nn.Sequential, optimizer: Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {names[each]: float(group["lr"]) for group in optimizer.param_groups for each in group["params"]}


def test_a_part_learns_at_its_own_rate_and_the_longest_prefix_decides(network: nn.Sequential) -> None:
    factors = {"features": 0.1, "features.1": 0.5}
    built = build_optimizer(network, OptimizerConfig(lr=0.2, args={"weight_decay": 0.3}, lr_factors=factors))
    assert rate_of_each(network, built) == pytest.approx(
        {
            "features.0.weight": 0.02,
            "features.1.weight": 0.1,
            "features.1.bias": 0.1,
            "classifier.2.weight": 0.2,
            "classifier.2.bias": 0.2,
        },
        rel=1e-12,
    )
    for group in built.param_groups:
        assert {each.ndim > 1 for each in group["params"]} == {group["weight_decay"] > 0}
    assert built.param_groups[0]["lr"] == 0.2, "the first group is the one whose rate is shown"


def test_a_prefix_ends_where_a_name_does() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))
    built = build_optimizer(network, OptimizerConfig(lr=1.0, lr_factors={"1": 0.5}))
    rates = rate_of_each(network, built)
    assert (rates["1.weight"], rates["10.weight"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"feature": 0.1}, r"`optimizer\.lr_factors` names 'feature', .* Did you mean 'features'\?"),
        ({"features.9": 0.1}, r"names 'features\.9', and no parameter's name begins so"),
        ({"xyz": 0.1}, r"begins so\. The network has: classifier, features"),
        ({"features": 0.0}, r"`optimizer\.lr_factors\.features` is 0\.0; it must be greater than 0"),
    ],
)
def test_a_part_that_is_not_there_is_answered_with_the_nearest(
    network: nn.Sequential, factors: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(network, OptimizerConfig(lr_factors=factors))


def test_a_network_that_is_frozen_as_a_whole_is_refused(network: nn.Sequential) -> None:
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"`model\.freeze` leaves no parameter to train"):
        build_optimizer(network, OptimizerConfig())


def test_a_one_cycle_keeps_the_ratio_of_the_parts(network: nn.Sequential) -> None:
    optimizer = build_optimizer(network, OptimizerConfig(lr=0.1, lr_factors={"features": 0.25}))
    scheduler = build_scheduler(optimizer, SchedulerConfig("OneCycleLR", args={"max_lr": 0.4}), 20, "val/loss")
    assert isinstance(scheduler, OneCycleLR)
    highest: dict[str, float] = {}
    for _ in range(20):
        highest = {name: max(rate, highest.get(name, 0.0)) for name, rate in rate_of_each(network, optimizer).items()}
        optimizer.step()
        scheduler.step()
    assert highest["classifier.2.weight"] == pytest.approx(0.4, rel=1e-6)
    assert highest["features.0.weight"] == highest["features.1.bias"] == pytest.approx(0.1, rel=1e-6)


# ---- schedulers ----


def rates(optimizer: Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The learning rate before each step."""
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_no_scheduler_keeps_the_learning_rate(optimizer: Optimizer) -> None:
    assert build_scheduler(optimizer, SchedulerConfig(name=None), total_steps=10, monitor="val/loss") is None


def test_a_one_cycle_takes_the_whole_training(optimizer: Optimizer) -> None:
    config = SchedulerConfig(name="OneCycleLR", args={"max_lr": 0.5})
    scheduler = build_scheduler(optimizer, config, total_steps=20, monitor="val/loss")
    assert isinstance(scheduler, OneCycleLR)
    found = rates(optimizer, scheduler, 20)
    assert max(found) == pytest.approx(0.5, rel=1e-6)
    assert found[0] == pytest.approx(0.5 / 25, rel=1e-6)  # torch's div_factor
    assert found[-1] < 1e-4


def test_a_cosine_ends_with_the_training_unless_told_otherwise(optimizer: Optimizer) -> None:
    whole = build_scheduler(optimizer, SchedulerConfig(name="CosineAnnealingLR"), total_steps=30, monitor="val/loss")
    assert isinstance(whole, CosineAnnealingLR)
    assert whole.T_max == 30
    config = SchedulerConfig(name="CosineAnnealingLR", args={"T_max": 7})
    given = build_scheduler(optimizer, config, total_steps=30, monitor="val/loss")
    assert given is not None
    assert given.T_max == 7


def test_any_other_scheduler_goes_by_its_name(optimizer: Optimizer) -> None:
    config = SchedulerConfig(name="StepLR", args={"step_size": 2, "gamma": 0.5})
    scheduler = build_scheduler(optimizer, config, total_steps=6, monitor="val/loss")
    assert isinstance(scheduler, StepLR)
    assert rates(optimizer, scheduler, 5) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025], rel=1e-12)


def test_a_warm_up_rises_in_a_line_and_a_cosine_falls(optimizer: Optimizer) -> None:
    config = SchedulerConfig("WarmupCosine", args={"warmup_steps": 4, "start_share": 0.2, "final_share": 0.1})
    found = rates(optimizer, build_scheduler(optimizer, config, total_steps=12, monitor="val/loss"), 13)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1], rel=1e-12)
    cosine = [0.01 + 0.09 * (1 + math.cos(math.pi * moves / 8)) / 2 for moves in range(9)]
    assert found[4:] == pytest.approx(cosine, rel=1e-12)


def test_a_warm_up_may_be_a_share_of_the_training_or_nothing(optimizer: Optimizer) -> None:
    share = build_scheduler(optimizer, SchedulerConfig("WarmupCosine", args={"warmup_share": 0.1}), 50, "val/loss")
    assert isinstance(share, WarmupCosine)
    assert share.warmup_steps == 5
    none = build_scheduler(optimizer, SchedulerConfig("WarmupCosine", args={"warmup_steps": 0}), 1, "val/loss")
    assert rates(optimizer, none, 1) == [0.1]


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("StepLR", {"step_size": 2, "gamma": 0.1}, [1.0, 1.0, 0.1, 0.1, 0.01]),
        ("MultiStepLR", {"milestones": [1, 4], "gamma": 0.5}, [1.0, 0.5, 0.5, 0.5, 0.25]),
        ("ExponentialLR", {"gamma": 0.5}, [1.0, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_torch_s_own_steps_come_where_they_are_told(
    optimizer: Optimizer, name: str, args: dict[str, Any], expected: list[float]
) -> None:
    scheduler = build_scheduler(optimizer, SchedulerConfig(name, args=args), total_steps=5, monitor="val/loss")
    assert rates(optimizer, scheduler, 5) == pytest.approx([0.1 * share for share in expected], rel=1e-12)


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/accuracy", "max")])
def test_a_plateau_is_where_the_monitor_stops_improving(
    optimizer: Optimizer, monitor: str, mode: Literal["min", "max"]
) -> None:
    scheduler = build_scheduler(optimizer, SchedulerConfig(name="ReduceLROnPlateau"), total_steps=5, monitor=monitor)
    assert isinstance(scheduler, ReduceLROnPlateau)
    assert scheduler.mode == mode
    config = SchedulerConfig(name="ReduceLROnPlateau", args={"mode": "min"})
    given = build_scheduler(optimizer, config, total_steps=5, monitor=monitor)
    assert given is not None
    assert given.mode == "min"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("OneCycle", {}, "`scheduler.name` is 'OneCycle', .* Did you mean 'OneCycleLR'?"),
        ("LRScheduler", {}, "`scheduler.name` is 'LRScheduler', which torch.optim.lr_scheduler does not have"),
        ("Adam", {}, "`scheduler.name` is 'Adam', which torch.optim.lr_scheduler does not have"),
        ("StepLR", {"stepsize": 3}, "`scheduler.args.stepsize`: StepLR has no such argument. Did you mean 'step_size'?"),
        ("StepLR", {}, "`scheduler`: StepLR refuses its arguments: .*step_size"),
        ("OneCycleLR", {"max_lr": 0.1, "pct_start": 3}, "`scheduler`: OneCycleLR refuses its arguments"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": "ten"}, "`scheduler`: OneCycleLR"),
        ("WarmupCosin", {}, "Did you mean 'WarmupCosine'?"),
        ("WarmupCosine", {"warmup": 3}, "WarmupCosine has no such argument. Did you mean 'warmup_steps'?"),
        ("WarmupCosine", {"warmup_steps": 10}, "a warm-up of 10 moves leaves nothing of the 10 of the training"),
        ("WarmupCosine", {"final_share": 2}, "WarmupCosine refuses its arguments: final_share must be from 0 to 1"),
        ("LambdaLR", {"lr_lambda": "lambda step: 1"}, "`scheduler`: LambdaLR refuses its arguments"),
        ("ChainedScheduler", {}, "`scheduler`: ChainedScheduler refuses its arguments"),
    ],
)
def test_a_scheduler_that_cannot_work_is_the_user_s_mistake(
    optimizer: Optimizer, name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(optimizer, SchedulerConfig(name=name, args=args), total_steps=10, monitor="val/loss")
    assert re.search(message.replace("?", r"\?"), str(caught.value))


# ---- fused ----


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_step_is_one_kernel_where_there_is_one_and_moves_as_the_others_do(name: str) -> None:
    moved = []
    for fuse in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        built = build_optimizer(network, OptimizerConfig(name=name, lr=0.1, args={"weight_decay": 0.1}), fuse=fuse)
        assert {group["fused"] for group in built.param_groups} == {True if fuse else None}
        for _ in range(3):
            built.zero_grad()
            network(torch.ones(2, 3, 4, 4)).square().sum().backward()
            built.step()
        moved.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)  # float32, rounded at other places


def test_what_has_no_fused_kernel_and_who_asks_for_another_way_have_their_own() -> None:
    network = nn.Linear(2, 2)
    assert "fused" not in build_optimizer(network, OptimizerConfig(name="RMSprop")).param_groups[0]
    built = build_optimizer(network, OptimizerConfig(args={"foreach": True}))
    assert (built.param_groups[0]["foreach"], built.param_groups[0]["fused"]) == (True, None)
    for without in (nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, dtype=torch.complex64)):
        assert build_optimizer(without, OptimizerConfig(name="AdamW")).param_groups[0]["fused"] is None


@pytest.mark.parametrize(
    ("precision", "clip", "fuses"),
    [("32-true", 1.0, True), ("bf16-mixed", None, True), ("bf16-mixed", 1.0, False), ("16-mixed", None, False)],
)
def test_a_fused_step_needs_gradients_that_are_whole(precision: Any, clip: float | None, fuses: bool) -> None:
    trainer = TrainerConfig(precision=precision, gradient_clip_norm=clip)
    assert may_fuse(trainer, ModelConfig()) is fuses
    assert not may_fuse(trainer, ModelConfig(unfreeze={"features": 1}))
