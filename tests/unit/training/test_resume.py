"""A run that goes on from any of its checkpoints ends as the undisturbed one did, whatever the training does besides steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from pipeline.config import AugmentConfig, Config, DataConfig, SchedulerConfig
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.run import RunRecord
from pipeline.training.checkpoint import checkpoint_path, checkpoints_in, identity_of, newest_checkpoint, step_of
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.fit import build_callbacks
from pipeline.training.resume import say_what_differs
from tests.unit.training.conftest import Fit, change

STEPS_PER_EPOCH = 9  # 36 samples in batches of 4
Callbacks = Callable[[Config], list[L.Callback]]


@pytest.fixture
def callbacks(tiny_dataset: DatasetManifest, spec: PreprocessSpec, record: RunRecord) -> Callbacks:
    """A function that gives every callback of a training, as `fit` orders them."""

    def make(config: Config) -> list[L.Callback]:
        writer = CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
        return build_callbacks(config, tiny_dataset, spec, writer, tracker=None)

    return make


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Three epochs with dropout, clipping and a checkpoint after every step."""
    trainer = {"max_epochs": 3, "checkpoint_every_steps": 1, "keep_last": 100, "gradient_clip_norm": 1.0}
    data = {"global_batch_size": 4}
    return change(change(change(tiny_config, "trainer", **trainer), "data", **data), "model", dropout=0.5)


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulation": {"data": {"accumulate": 2}},
    "ema": {"trainer": {"ema_decay": 0.9}},
    "validation in mid-epoch": {"trainer": {"validate_every_steps": 4}},
    "limited batches": {"data": {"steps_per_epoch": 5, "limit_val_batches": 2}},
    "skipping what is not finite": {"trainer": {"non_finite": "skip"}},
    "gradual unfreezing": {"model": {"freeze": ["features"], "unfreeze": {"features.4": 1, "features.5": 2}}},
    "all at once": {
        "data": {"accumulate": 2, "steps_per_epoch": 7, "limit_val_batches": 2},
        "trainer": {"ema_decay": 0.9, "validate_every_steps": 5, "non_finite": "skip", "keep_best": 2},
    },
}
SCHEDULERS = {
    "OneCycleLR": SchedulerConfig("OneCycleLR", "step", {"max_lr": 0.05}),
    "StepLR": SchedulerConfig("StepLR", "epoch", {"step_size": 1}),
    "ReduceLROnPlateau": SchedulerConfig("ReduceLROnPlateau", "epoch", {"patience": 0}),
    "WarmupCosine": SchedulerConfig("WarmupCosine", "step", {"warmup_steps": 6}),
    "MultiStepLR": SchedulerConfig("MultiStepLR", "step", {"milestones": [3, 20]}),
}
# Every variant with a scheduler of each kind; the others move as one of these.
COMMON = ("OneCycleLR", "StepLR", "ReduceLROnPlateau")
CASES = [(variant, scheduler) for variant in VARIANTS if variant != "gradual unfreezing" for scheduler in COMMON]
CASES += [("gradual unfreezing", "OneCycleLR"), ("all at once", "WarmupCosine"), ("plain", "MultiStepLR")]


def end_of(config: Config) -> dict[str, Any]:
    """The whole content of the last checkpoint."""
    checkpoint: dict[str, Any] = torch.load(checkpoints_in(config.run_dir)[0], weights_only=True)
    return checkpoint


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ; tensors are compared bit for bit."""
    if isinstance(one, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{place}.{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [d for n, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{place}[{n}]")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [f"{place}: {one} and {other}"]


@pytest.mark.parametrize(("variant", "scheduler"), CASES)
def test_every_checkpoint_leads_to_the_same_end(
    config: Config, callbacks: Callbacks, fit: Fit, variant: str, scheduler: str
) -> None:
    for section, values in VARIANTS[variant].items():
        config = change(config, section, **values)
    config = dataclasses.replace(config, scheduler=SCHEDULERS[scheduler])
    fit(config, *callbacks(config))
    end, steps = end_of(config), [step_of(path) for path in checkpoints_in(config.run_dir)]
    length = config.data.steps_per_epoch or STEPS_PER_EPOCH
    assert steps == list(range(3 * length, 0, -1))

    # Around validations and the ends of epochs, and somewhere in between.
    for step in {1, 3, 4, 5, length - 1, length, length + 1, 2 * length, 3 * length - 1} & set(steps):
        for path in checkpoints_in(config.run_dir)[: 3 * length - step]:
            path.unlink()
        fit(config, *callbacks(config), resume=checkpoint_path(config.run_dir, step))
        found = differences(end_of(config), end)
        assert not found, f"from step {step}: {found[:5]}"


def test_a_run_that_stopped_early_has_nothing_left_to_train(
    config: Config, record: RunRecord, callbacks: Callbacks, fit: Fit
) -> None:
    config = change(
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-12)),
        "trainer",
        max_epochs=20,
        early_stopping=2,
        checkpoint_every_steps=None,
        monitor="val/accuracy",
    )
    end = fit(config, *callbacks(config)).trainer.global_step
    assert end == 3 * STEPS_PER_EPOCH, "the first validation was the best one, and two more were no better"
    newest = newest_checkpoint(config.run_dir, record)
    assert newest is not None
    again = fit(config, *callbacks(config), resume=newest[0])
    assert again.trainer.global_step == end


def test_a_warm_up_goes_on_in_epochs_when_the_batches_become_larger(config: Config, callbacks: Callbacks, fit: Fit) -> None:
    config = dataclasses.replace(config, scheduler=SCHEDULERS["WarmupCosine"])
    fit(config, *callbacks(config))
    larger = change(config, "data", global_batch_size=12)  # 3 steps an epoch instead of 9
    module = fit(larger, *callbacks(larger), resume=checkpoint_path(config.run_dir, STEPS_PER_EPOCH + 3))
    end = STEPS_PER_EPOCH + 3 + 2 + 3
    assert module.trainer.global_step == end, "two steps of the second epoch were left, and the third epoch"
    (schedule,) = torch.load(checkpoint_path(config.run_dir, end), weights_only=True)["lr_schedulers"]
    assert (schedule["total_steps"], schedule["warmup_steps"], schedule["last_epoch"]) == (9, 2, 9)
    assert schedule["_last_lr"] == [0.0, 0.0]


def test_going_on_with_another_decoder_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    crops = AugmentConfig(crop_scale=0.5)
    config = Config(name="run", data=DataConfig(decoder="torchvision", augment=crops))
    say_what_differs(config, {"world_size": 2, "decoder": "torchvision"}, 2)
    assert capsys.readouterr().out == ""
    say_what_differs(config, {"world_size": 2, "decoder": "native"}, 2)
    assert "crops are decoded by torchvision, before by native: pixels differ, so not bit-equal" in capsys.readouterr().out
    say_what_differs(dataclasses.replace(config, data=DataConfig()), {"world_size": 2, "decoder": None}, 2)
    assert capsys.readouterr().out == ""
