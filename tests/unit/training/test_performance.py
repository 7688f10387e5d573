from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import PreprocessSpec
from pipeline.run import RunRecord
from pipeline.training.checkpoint import identity_of
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.classifier import Classifier
from pipeline.training.fit import STEP_HOOKS, build_callbacks, drop_empty_hooks
from pipeline.training.performance import StepTimes
from pipeline.training.pictures import Pictures
from tests.unit.training.conftest import Fit, Listener, change


class Driver:
    """Calls the hooks in Lightning's order, at times that the test gives."""

    def __init__(self, config: Config, module: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tracker, self.module, self.now = Listener(), module, 100.0
        self.times = StepTimes(config, self.tracker)
        self.trainer: Any = SimpleNamespace(global_step=0)
        monkeypatch.setattr("pipeline.training.performance.time.perf_counter", lambda: self.now)

    def begin_epoch(self) -> None:
        self.times.on_train_epoch_start(self.trainer, self.module)

    def batch(self, wait: float, work: float, batch_idx: int = 0) -> None:
        self.now += wait
        self.times.on_train_batch_start(self.trainer, self.module, None, batch_idx)
        self.now += work
        self.trainer.global_step += (batch_idx + 1) % self.module.config.data.accumulate == 0
        self.times.on_train_batch_end(self.trainer, self.module, None, None, batch_idx)

    def validate(self, seconds: float) -> None:
        self.now += seconds
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


def test_waiting_counts_from_the_end_of_a_batch_to_the_next_and_validations_count_as_neither(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.begin_epoch()
    driver.batch(wait=50.0, work=9.0)  # loader processes start: left out
    driver.batch(wait=0.25, work=0.75)
    driver.batch(wait=0.5, work=1.5)
    driver.validate(30.0)
    driver.batch(wait=1.0, work=1.0)
    driver.now += 20.0  # what happens between two epochs
    driver.begin_epoch()
    driver.batch(wait=2.0, work=1.0)
    assert driver.tracker.curves == [
        (2, {"train/images_per_second": 8.0, "train/data_wait_share": 0.25}),
        (4, {"train/images_per_second": 4.0, "train/data_wait_share": 1.5 / 4}),
    ]
    seconds = [1.0, 2.0, 2.0, 3.0]
    expected = {f"perf/step_ms_p{share}": 1000 * float(np.percentile(seconds, share)) for share in (50, 90, 99)}
    assert driver.end() == {"perf/images_per_second": 4.0, "perf/data_wait_share": 3.75 / 8, **expected}
    assert capsys.readouterr().out == (
        "4 images/s, a step 2000.0 ms (99 % under 2970.0), 47% of the time waiting for data: "
        "try a higher `data.num_workers` (now 0)\n"
    )


def test_little_waiting_needs_no_advice_and_a_run_without_steps_says_nothing(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.end() == {}
    driver.begin_epoch()
    for _ in range(3):
        driver.batch(wait=0.01, work=0.99)
    driver.end()
    assert capsys.readouterr().out == "8 images/s, a step 1000.0 ms (99 % under 1000.0), 1% of the time waiting for data\n"


def test_a_step_of_accumulated_gradients_is_all_of_its_batches(
    config: Config, make_classifier: Callable[[Config], Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(config, "data", accumulate=2)
    driver = Driver(config, make_classifier(config), monkeypatch)
    driver.begin_epoch()
    for batch_idx in range(4):
        driver.batch(0.5, 1.5, batch_idx)
    assert driver.tracker.curves == [(2, {"train/images_per_second": 2.0, "train/data_wait_share": 0.25})]
    assert driver.end()["perf/step_ms_p50"] == 4000.0


def test_a_training_has_its_curves_at_the_steps_of_the_others(config: Config, fit: Fit) -> None:
    tracker = Listener()
    fit(change(config, "trainer", max_epochs=2, log_every_steps=3), StepTimes(config, tracker))
    assert [step for step, _ in tracker.curves] == [2, 4, 6, 8]
    assert all(0 < each["train/data_wait_share"] < 1 for _, each in tracker.curves)
    assert tracker.figures["perf/step_ms_p50"] <= tracker.figures["perf/step_ms_p90"] <= tracker.figures["perf/step_ms_p99"]


def test_rank_0_alone_draws_and_measures_and_measures_after_all_others(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, record: RunRecord
) -> None:
    writer = CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
    first, other = (build_callbacks(config, tiny_dataset, spec, writer, tracker) for tracker in (Listener(), None))
    assert isinstance(first[-1], StepTimes) and any(isinstance(each, Pictures) for each in first)
    assert [type(each) for each in other] == [type(each) for each in first if not isinstance(each, (Pictures, StepTimes))]
    drop_empty_hooks(first)
    (pictures,) = (each for each in first if isinstance(each, Pictures))
    assert all(getattr(pictures, hook) is None for hook in STEP_HOOKS), "pictures cost a step nothing"
