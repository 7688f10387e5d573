"""How fast the steps of this process are, and where their time goes; rank 0 only.

Every step's length and its wait for data are measured, which takes a few readings of a clock. What else it is made of is
measured in one of SAMPLE_EVERY steps: there the host waits for a GPU at the end of each stage, else a stage would last as long
as it takes to ask for it; no other step waits. Validations and what follows them are in none of it, nor is the first step,
in which loader processes start and kernels are chosen.
"""

import contextlib
import time
from array import array
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from pipeline.config import Config
from pipeline.report.speed import PERCENTILES, SAMPLED
from pipeline.tracking.run import RunTracker
from pipeline.training.classifier import Classifier, ends_step

# A prime, and neither 5 nor 10: so the steps at which points are written and ranks talk are sampled as often as others.
SAMPLE_EVERY = 23
# Lightning's names of what it does in a step, after the last dot; the time of what is called from within counts there alone.
STAGES = {
    "train_dataloader_next": "data",
    "batch_to_device": "transfer",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}
CALLBACKS, REST = "callbacks", "lightning"
FETCH = ".train_dataloader_next"


class NoProfiler(PassThroughProfiler):
    """Measures nothing, in a tenth of the time that Lightning's own takes to do so, at each of some 70 places of a step."""

    nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.AbstractContextManager[Any]:  # type: ignore[override]
        """Begin nothing and end nothing."""
        return self.nothing


class StepClock(NoProfiler):
    """Lightning's profiler: always how long a step waits for its batches, and in a sampled step the time of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.wait = 0  # ns, since it was last set to 0
        self.asked = 0
        self.spent: dict[str, int] | None = None  # ns of each stage of a step that is sampled
        self.stages: list[str] = []  # where the time goes now, and where it will go then
        self.since = 0
        self.device = torch.device("cpu")

    def start(self, action_name: str) -> None:
        """A batch is asked for, the one thing of a step for which Lightning calls this."""
        if action_name.endswith(FETCH):
            self._enter("data")
            self.asked = time.perf_counter_ns()

    def stop(self, action_name: str) -> None:
        """It is there."""
        if action_name.endswith(FETCH):
            self.wait += time.perf_counter_ns() - self.asked
            self._leave()

    def profile(self, action_name: str) -> contextlib.AbstractContextManager[Any]:  # type: ignore[override]
        """Something is about to be done."""
        return self.nothing if self.spent is None else self._span(action_name)

    def begin_sample(self) -> None:
        """From now on the time of each stage is measured."""
        self.spent, self.stages = {}, [REST]
        self._wait_for_device()
        self.since = time.perf_counter_ns()

    def end_sample(self) -> dict[str, int]:
        """Nanoseconds of each stage since the sample began, none where there is none; what follows is not measured."""
        if self.spent is None:
            return {}
        self._charge()
        spent, self.spent = self.spent, None
        return spent

    def _span(self, action_name: str) -> contextlib.AbstractContextManager[Any]:
        stage = CALLBACKS if action_name.startswith("[Callback]") else STAGES.get(action_name.rpartition(".")[2])
        return self.nothing if stage is None else self._spend_on(stage)

    @contextlib.contextmanager
    def _spend_on(self, stage: str) -> Any:
        self._enter(stage)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, stage: str) -> None:
        if self.spent is not None:
            self._charge()
            self.stages.append(stage)

    def _leave(self) -> None:
        if self.spent is not None and len(self.stages) > 1:
            self._charge()
            self.stages.pop()

    def _charge(self) -> None:
        self._wait_for_device()
        now = time.perf_counter_ns()
        assert self.spent is not None
        self.spent[self.stages[-1]] = self.spent.get(self.stages[-1], 0) + now - self.since
        self.since = now

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class StepTimes(L.Callback):
    """Curves of images per second and of the share of waiting, and what steps were made of at the end. The last callback."""

    def __init__(self, config: Config, tracker: RunTracker) -> None:
        self.config, self.tracker, self.clock = config, tracker, StepClock()
        self.steps, self.waits = array("d"), array("d")  # ms of each step, and of its wait for data
        self.stages = {stage: array("d") for stage in SAMPLED}  # ms in each sampled step
        self.reported = 0
        self.began = 0
        self.is_first = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What is to be waited for in sampled steps."""
        self.clock.device = module.device

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on the epoch's first batch is waited for."""
        self._begin()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A validation belongs to no step."""
        self.clock.end_sample()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on the next batch is waited for."""
        self._begin()

    def _begin(self) -> None:
        self.clock.wait = 0
        if not self.is_first and len(self.steps) % SAMPLE_EVERY == 0:
            self.clock.begin_sample()
        self.began = time.perf_counter_ns()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step to the others, and report every n-th."""
        assert isinstance(module, Classifier)
        if not ends_step(module, batch_idx):
            return
        if not self.is_first:
            self._add(time.perf_counter_ns() - self.began)
            step = trainer.global_step
            if step % self.config.trainer.log_every_steps == 0:
                self.tracker.log({f"train/{name}": value for name, value in self._rates(self.reported).items()}, step)
                self.reported = len(self.steps)
        self.is_first = False
        self._begin()

    def _add(self, nanoseconds: int) -> None:
        self.steps.append(nanoseconds / 1e6)
        self.waits.append(self.clock.wait / 1e6)
        if sample := self.clock.end_sample():
            for stage, times in self.stages.items():
                times.append(sample.get(stage, 0) / 1e6)

    def _rates(self, first: int) -> dict[str, float]:
        """Of the steps from the `first` on."""
        milliseconds, waits = sum(self.steps[first:]), sum(self.waits[first:])
        images = (len(self.steps) - first) * self.config.data.global_batch_size
        return {"images_per_second": 1000 * images / milliseconds, "data_wait_share": waits / milliseconds}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the figures of all steps of this process, among them percentiles of each stage."""
        if not self.steps:
            return
        figures = self._rates(0)
        for name, times in {"step": self.steps, "data": self.waits, **self.stages}.items():
            if times:
                values = np.percentile(times, PERCENTILES).tolist()
                figures |= {f"{name}_ms_p{number}": value for number, value in zip(PERCENTILES, values, strict=True)}
        self.tracker.log_final({f"perf/{name}": value for name, value in figures.items()})
