import math
from typing import Any

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.data.dataset import Batch
from pipeline.errors import TrainingError
from pipeline.training.classifier import Classifier
from pipeline.training.monitors import MAX_OVERFLOWS_IN_ROW, MAX_SKIPPED_IN_ROW, MIN_POINTS, RunningLoss, StepMonitor
from tests.unit.training.conftest import Fit, change, weights_of


class Poison(L.Callback):
    """Makes the loss of a step's second sample nan, through its weight, and keeps what the step must leave alone."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(module, Classifier)
        self.poisoned = trainer.global_step + 1 in self.steps
        if self.poisoned:
            self.before.append(state_of(trainer, module))
            module.register_forward_hook(poison_second_row)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, Classifier)
        if self.poisoned:
            module.network._forward_hooks.clear()
            self.after.append(state_of(trainer, module))


def poison_second_row(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits * torch.tensor([1.0, math.nan] + [1.0] * (len(logits) - 2))[:, None]


def state_of(trainer: L.Trainer, module: Classifier) -> Any:
    momenta = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]
    return weights_of(module), momenta


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Two epochs of nine steps with momentum, weight decay and BatchNorm, all of which a step could move."""
    config = change(change(tiny_config, "trainer", max_epochs=2), "data", global_batch_size=4)
    return change(config, "optimizer", lr=0.01, args={"weight_decay": 0.1})


def poisoned(config: Config, fit: Fit, *steps: int) -> tuple[Classifier, Poison, StepMonitor]:
    poison, monitor = Poison(*steps), StepMonitor(config)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(Classifier, "register_forward_hook", lambda module, hook: module.network.register_forward_hook(hook))
        module = fit(config, poison, monitor)
    return module, poison, monitor


def test_a_step_that_is_not_finite_stops_the_run_and_says_which_sample_and_how_to_see_it(config: Config, fit: Fit) -> None:
    message = rf"step 4: the loss is not finite for \S+\. See what .*: shardline replay {config.run_dir} --step 4\. Then lower"
    with pytest.raises(TrainingError, match=message) as caught:
        poisoned(config, fit, 4)
    assert caught.value.exit_code == 2


def test_a_skipped_step_moves_nothing_and_is_counted(config: Config, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    config = change(config, "trainer", non_finite="skip")
    module, poison, monitor = poisoned(config, fit, 4, 11)
    assert (monitor.num_skipped, monitor.skipped_in_row) == (2, 0)
    monitor.gradient_norm = 1.0
    poisoned_norm = poisoned(config, fit, 18)[2].gradient_norm
    assert math.isnan(poisoned_norm), "that of an earlier step is not said of it"
    assert module.trainer.global_step == 18, "the number of steps stays"
    for (weights, momenta), (weights_after, momenta_after) in zip(poison.before, poison.after, strict=True):
        assert torch.equal(weights, weights_after)
        assert all(torch.equal(*pair) for pair in zip(momenta, momenta_after, strict=True))
    assert bool(torch.isfinite(weights_of(module)).all())
    said = capsys.readouterr().out
    assert "step 4: not finite, skipped for" in said
    assert f"shardline replay {config.run_dir} --step 11" in said


def test_too_many_skipped_steps_in_a_row_stop_the_run(config: Config, fit: Fit) -> None:
    config = change(config, "trainer", non_finite="skip")
    with pytest.raises(TrainingError, match=f"step {MAX_SKIPPED_IN_ROW + 1}: .* {MAX_SKIPPED_IN_ROW} steps in a row"):
        poisoned(config, fit, *range(2, 19))


def test_a_learning_rate_that_blows_up_is_found(config: Config, fit: Fit) -> None:
    config = change(config, "optimizer", lr=1e30)
    with pytest.raises(TrainingError, match=r"is not finite.*lower `optimizer\.lr` \(1e\+30 here\)"):
        fit(config, StepMonitor(config))


def test_a_leap_of_the_loss_is_a_spike_and_noise_is_not() -> None:
    losses = RunningLoss()
    draw = torch.Generator().manual_seed(1)
    noise = [2.0 + 0.1 * float(torch.randn((), generator=draw)) for _ in range(500)]
    assert not any(losses.add(loss) for loss in noise)
    assert losses.mean == pytest.approx(2.0, abs=0.1)  # a mean of about 50 points with a deviation of 0.1
    assert losses.add(4.0)
    assert losses.num_spikes == 1
    assert losses.mean < 2.1, "a spike must not hide the next one"
    assert losses.add(4.0)


def test_the_first_points_are_no_spikes_and_what_is_not_finite_is_left_to_the_steps() -> None:
    losses = RunningLoss()
    assert not any(losses.add(loss) for loss in [0.1] * (MIN_POINTS - 1) + [50.0])
    assert not losses.add(math.nan)
    assert losses.num_points == MIN_POINTS


def test_counts_travel_in_the_checkpoint(config: Config, fit: Fit) -> None:
    first, second = StepMonitor(config), StepMonitor(config)
    first.num_skipped = 3
    for loss in range(60):
        first.losses.add(float(loss))
    second.load_state_dict(first.state_dict())
    assert (second.num_skipped, vars(second.losses)) == (3, vars(first.losses))


def test_half_precision_may_overflow_for_a_while_and_not_for_ever(config: Config, fit: Fit) -> None:
    # On a CPU there is no half precision; the monitor is told that there is, and gradients overflow without a loss that does.
    monitor = StepMonitor(change(config, "trainer", precision="16-mixed"))

    class Overflow(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            next(module.parameters()).grad = torch.full_like(next(module.parameters()), math.inf)

    class Scaler(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            for parameter in module.parameters():
                parameter.grad = None

    with pytest.raises(TrainingError, match=f"step {MAX_OVERFLOWS_IN_ROW}: the gradient is not finite, though every loss is"):
        fit(change(config, "trainer", max_epochs=6), Overflow(), monitor, Scaler())
    assert monitor.overflows_in_row == MAX_OVERFLOWS_IN_ROW
