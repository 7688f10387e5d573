import os
import signal
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from pipeline.config import Config
from pipeline.errors import StoppedError
from pipeline.manifest import DatasetManifest
from pipeline.run import BEST, LAST, RunRecord
from pipeline.training.checkpoint import identity_of, load_checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.preemption import StopOnSignal
from tests.unit.training.conftest import Fit, change, weights_of

STEPS_PER_EPOCH = 9  # 36 samples in batches of 4


class SendSignal(L.Callback):
    """Sends this process a signal after a step."""

    def __init__(self, number: signal.Signals, after_step: int) -> None:
        self.number, self.after_step = number, after_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.after_step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Two epochs of nine steps, with dropout, saved by nothing but a stop or an epoch's end."""
    steps = change(tiny_config, "trainer", max_epochs=2, checkpoint_every_steps=1000)
    return change(change(steps, "data", global_batch_size=4), "model", dropout=0.5)


@pytest.fixture
def callbacks(config: Config, tiny_dataset: DatasetManifest, record: RunRecord) -> Callable[[], list[L.Callback]]:
    """A function that gives a new writer and the stopper behind it, as `fit` orders them."""

    def make() -> list[L.Callback]:
        writer = CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
        return [writer, StopOnSignal(writer)]

    return make


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_stops_at_the_next_agreed_step_after_saving_it(
    config: Config,
    record: RunRecord,
    callbacks: Callable[[], list[L.Callback]],
    fit: Fit,
    number: signal.Signals,
    code: int,
) -> None:
    with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 5, saved. Run the same") as caught:
        fit(config, SendSignal(number, after_step=2), *callbacks())
    assert caught.value.exit_code == code
    facts = load_checkpoint(config.run_dir / LAST, record)["shardline"]
    assert (facts["global_step"], facts["cursor"]) == (5, {"epoch": 0, "batch": 5})


def test_a_signal_during_the_agreement_waits_for_the_next(
    config: Config, callbacks: Callable[[], list[L.Callback]], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree = StopOnSignal._agree

    def interrupted(self: StopOnSignal, is_due: bool) -> bool:
        decided = agree(self, is_due)
        self.received = self.received or signal.SIGTERM  # after the others were asked
        return decided

    monkeypatch.setattr(StopOnSignal, "_agree", interrupted)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {STEPS_PER_EPOCH}, saved"):
        fit(config, *callbacks())


@pytest.mark.parametrize(
    ("batch", "steps", "after_step"),
    [(4, STEPS_PER_EPOCH, 6), (7, 5, 2)],
    ids=["past the last agreement", "the last step is itself one to agree at"],
)
def test_a_signal_at_the_end_of_an_epoch_waits_for_its_validation(
    config: Config,
    record: RunRecord,
    callbacks: Callable[[], list[L.Callback]],
    fit: Fit,
    batch: int,
    steps: int,
    after_step: int,
) -> None:
    config = change(config, "data", global_batch_size=batch)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {steps}, saved"):
        fit(config, SendSignal(signal.SIGTERM, after_step), *callbacks())
    for name in (LAST, BEST):
        assert load_checkpoint(config.run_dir / name, record)["shardline"]["global_step"] == steps


@pytest.mark.parametrize("after_step", [2, 6, STEPS_PER_EPOCH + 2])
def test_a_stopped_training_goes_on_to_the_weights_of_an_undisturbed_one(
    config: Config, callbacks: Callable[[], list[L.Callback]], fit: Fit, after_step: int
) -> None:
    undisturbed = weights_of(fit(config, *callbacks()))
    with pytest.raises(StoppedError):
        fit(config, SendSignal(signal.SIGTERM, after_step), *callbacks())
    resumed = fit(config, *callbacks(), resume=config.run_dir / LAST)
    assert torch.equal(weights_of(resumed), undisturbed)
    assert resumed.trainer.global_step == 2 * STEPS_PER_EPOCH


def test_without_a_signal_training_ends_as_usual(config: Config, callbacks: Callable[[], list[L.Callback]], fit: Fit) -> None:
    assert fit(config, *callbacks()).trainer.global_step == 2 * STEPS_PER_EPOCH
