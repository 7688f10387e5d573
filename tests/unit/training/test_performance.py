from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.report.speed import SAMPLED
from pipeline.run import RunRecord
from pipeline.training.checkpoint import identity_of
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.classifier import Classifier
from pipeline.training.every_step import EveryStep
from pipeline.training.fit import build_callbacks
from pipeline.training.performance import SAMPLE_EVERY, StepTimes
from pipeline.training.pictures import Pictures
from tests.unit.training.conftest import Listener, change, make_trainer

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class Driver:
    """Calls hooks and profiler in Lightning's order, at times that the test gives."""

    def __init__(self, config: Config, module: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tracker, self.module, self.now = Listener(), module, 100.0
        self.times = StepTimes(config, self.tracker)
        self.trainer: Any = SimpleNamespace(global_step=0)
        monkeypatch.setattr("pipeline.training.performance.time.perf_counter_ns", lambda: round(self.now * 1e9))
        self.times.on_train_start(cast(L.Trainer, self.trainer), module)

    def begin_epoch(self) -> None:
        self.times.on_train_epoch_start(self.trainer, self.module)

    def spend(self, action: str, seconds: float) -> None:
        with self.times.clock.profile(action):
            self.now += seconds

    def batch(self, wait: float, work: float, batch_idx: int = 0) -> None:
        self.times.clock.start(FETCH)
        self.now += wait
        self.times.clock.stop(FETCH)
        self.spend("[Strategy]DDPStrategy.batch_to_device", work / 8)
        with (
            self.times.clock.profile("run_training_batch"),
            self.times.clock.profile("[LightningModule]Classifier.optimizer_step"),
        ):
            self.spend("[Strategy]DDPStrategy.training_step", work / 4)
            self.spend("[Strategy]DDPStrategy.backward", work / 8)
            self.spend("[Callback]EveryStep.on_before_optimizer_step", work / 16)
            self.now += work / 8
        self.now += work / 4
        with self.times.clock.profile("[Callback]EveryStep.on_train_batch_end"):
            self.now += work / 16
            self.trainer.global_step += (batch_idx + 1) % self.module.config.data.accumulate == 0
            self.times.on_train_batch_end(self.trainer, self.module, None, None, batch_idx)

    def validate(self, seconds: float) -> None:
        self.times.on_validation_start(self.trainer, self.module)
        self.spend("[Strategy]DDPStrategy.batch_to_device", seconds)
        self.times.on_validation_end(self.trainer, self.module)

    def end(self) -> dict[str, float]:
        self.times.on_train_end(self.trainer, self.module)
        return self.tracker.figures


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Global batches of eight, a point every second step."""
    return change(tiny_config, "trainer", log_every_steps=2)


@pytest.fixture
def driver(config: Config, make_classifier: Callable[[Config], Classifier], monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Calls the hooks at the times that a test says."""
    return Driver(config, make_classifier(config), monkeypatch)


def percentiles(name: str, milliseconds: list[float]) -> dict[str, Any]:
    values = {number: float(np.percentile(milliseconds, number)) for number in (50, 90, 99)}
    return {f"perf/{name}_ms_p{number}": pytest.approx(value, abs=1e-3) for number, value in values.items()}


def test_waiting_is_that_for_batches_and_validations_count_as_nothing(driver: Driver) -> None:
    driver.begin_epoch()
    driver.batch(wait=50.0, work=9.0)  # loader processes start: left out
    driver.batch(wait=0.25, work=0.75)
    driver.batch(wait=0.5, work=1.5)
    driver.validate(30.0)
    driver.batch(wait=1.0, work=1.0)
    driver.now += 20.0  # what happens between two epochs
    driver.begin_epoch()
    driver.batch(wait=2.0, work=1.0)
    (second, early), (fourth, late) = driver.tracker.curves
    assert (second, fourth) == (2, 4)
    assert early == pytest.approx({"train/images_per_second": 8.0, "train/data_wait_share": 0.25})
    assert late == pytest.approx({"train/images_per_second": 4.0, "train/data_wait_share": 1.5 / 4})
    figures = driver.end()
    assert figures["perf/images_per_second"] == pytest.approx(4.0)
    assert figures["perf/data_wait_share"] == pytest.approx(3.75 / 8)
    expected = percentiles("step", [1000, 2000, 2000, 3000]) | percentiles("data", [250, 500, 1000, 2000])
    assert figures == figures | expected


def test_a_sampled_step_is_split_into_stages_and_others_are_not(driver: Driver) -> None:
    driver.begin_epoch()
    driver.batch(wait=50.0, work=9.0)
    sampled = []
    for number in range(2 * SAMPLE_EVERY + 1):
        work = 16.0 + number
        sampled += [work] if number % SAMPLE_EVERY == 0 else []
        driver.batch(wait=1.0, work=work)
    figures, shares = driver.end(), dict.fromkeys(("transfer", "backward", "optimizer", "callbacks"), 1 / 8)
    for stage, share in {**shares, "forward": 1 / 4, "lightning": 1 / 4}.items():
        assert figures == figures | percentiles(stage, [1000 * work * share for work in sampled])


def test_a_validation_is_in_no_sample(driver: Driver) -> None:
    driver.begin_epoch()
    driver.batch(wait=50.0, work=9.0)
    driver.validate(30.0)  # it comes where the first sample has begun
    driver.batch(wait=1.0, work=8.0)
    assert driver.end()["perf/transfer_ms_p99"] == pytest.approx(1000.0)


def test_a_run_without_steps_says_nothing(driver: Driver) -> None:
    assert driver.end() == {}


def test_a_step_of_accumulated_gradients_is_all_of_its_batches(
    config: Config, make_classifier: Callable[[Config], Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(config, "data", accumulate=2)
    driver = Driver(config, make_classifier(config), monkeypatch)
    driver.begin_epoch()
    for batch_idx in range(4):
        driver.batch(0.5, 1.5, batch_idx)
    ((step, rates),) = driver.tracker.curves
    assert step == 2
    assert rates == pytest.approx({"train/images_per_second": 2.0, "train/data_wait_share": 0.25})
    figures = driver.end()
    assert figures["perf/step_ms_p50"] == pytest.approx(4000.0)
    assert figures["perf/forward_ms_p50"] == pytest.approx(2 * 1500 / 4)


def test_lightning_names_every_stage_of_a_training(
    config: Config,
    tiny_dataset: DatasetManifest,
    spec: PreprocessSpec,
    record: RunRecord,
    make_classifier: Callable[[Config], Classifier],
    own_signals: None,
) -> None:
    tracker = Listener()
    config = change(config, "trainer", max_epochs=3, log_every_steps=3)
    writer = CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
    callbacks = build_callbacks(config, tiny_dataset, spec, writer, tracker)
    times = callbacks[-1]
    assert isinstance(times, StepTimes)
    trainer = make_trainer(config, *callbacks, EveryStep(callbacks), profiler=times.clock)
    trainer.fit(make_classifier(config), datamodule=ShardDataModule(tiny_dataset, spec, config.data, config.seed))
    steps = [step for step, each in tracker.curves if "train/data_wait_share" in each]
    assert steps == [3, 6, 9, 12]
    assert tracker.figures["perf/step_ms_p50"] <= tracker.figures["perf/step_ms_p90"] <= tracker.figures["perf/step_ms_p99"]
    medians = {stage: tracker.figures[f"perf/{stage}_ms_p50"] for stage in ("data", *SAMPLED)}
    assert all(median > 0 for median in medians.values()), medians
    assert sum(medians.values()) < 2 * tracker.figures["perf/step_ms_p99"], "each moment counts once"


def test_rank_0_alone_draws_and_measures_and_measures_after_all_others(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, record: RunRecord
) -> None:
    writer = CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
    first, other = (build_callbacks(config, tiny_dataset, spec, writer, tracker) for tracker in (Listener(), None))
    assert isinstance(first[-1], StepTimes) and any(isinstance(each, Pictures) for each in first)
    assert [type(each) for each in other] == [type(each) for each in first if not isinstance(each, (Pictures, StepTimes))]
