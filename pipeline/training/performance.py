"""How fast the steps of this process are, and how much of their time is spent waiting for data; rank 0 only.

A clock is read twice a batch and nothing waits for a GPU, so a step's own time is that of the host; where every n-th step is
reported, and its loss read, host and device have met. The wait for data is the time between the end of a batch's hooks and the
start of the next batch; validations and what follows them are in neither. The first step is left out: loader processes start
and kernels are chosen in it.
"""

import time
from array import array
from typing import Any

import lightning as L
import numpy as np

from pipeline.config import Config
from pipeline.console import say
from pipeline.tracking.run import RunTracker
from pipeline.training.classifier import Classifier, ends_step

MUCH_WAITING = 0.2


class StepTimes(L.Callback):
    """Curves of images per second and of the share of waiting, and their figures at the end. The last of the callbacks."""

    def __init__(self, config: Config, tracker: RunTracker) -> None:
        self.config, self.tracker = config, tracker
        self.seconds, self.waits = array("d"), array("d")  # of each step
        self.reported = 0
        self.ended = self.started = 0.0
        self.step_seconds = self.step_wait = 0.0
        self.is_first = True

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on the epoch's first batch is waited for."""
        self.ended = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on the next batch is waited for."""
        self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch to its step, and report every n-th."""
        assert isinstance(module, Classifier)
        now = time.perf_counter()
        self.step_wait += self.started - self.ended
        self.step_seconds += now - self.ended
        if ends_step(module, batch_idx):
            if not self.is_first:
                self.seconds.append(self.step_seconds)
                self.waits.append(self.step_wait)
            self.is_first, self.step_seconds, self.step_wait = False, 0.0, 0.0
            if trainer.global_step % self.config.trainer.log_every_steps == 0 and len(self.seconds) > self.reported:
                self.tracker.log(
                    {f"train/{name}": value for name, value in self._rates(self.reported).items()}, trainer.global_step
                )
                self.reported = len(self.seconds)
        self.ended = time.perf_counter()

    def _rates(self, first: int) -> dict[str, float]:
        """Of the steps from the `first` on."""
        seconds, waits = sum(self.seconds[first:]), sum(self.waits[first:])
        images = (len(self.seconds) - first) * self.config.data.global_batch_size
        return {"images_per_second": images / seconds, "data_wait_share": waits / seconds}

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the figures of all steps of this process, and say them with what could be done."""
        if not self.seconds:
            return
        rates = self._rates(0)
        times = dict(zip((50, 90, 99), np.percentile(self.seconds, (50, 90, 99)) * 1000, strict=True))
        figures = {**rates, **{f"step_ms_p{number}": float(value) for number, value in times.items()}}
        self.tracker.log_final({f"perf/{name}": value for name, value in figures.items()})
        wait = rates["data_wait_share"]
        advice = f": try a higher `data.num_workers` (now {self.config.data.num_workers})" if wait > MUCH_WAITING else ""
        say(
            f"{rates['images_per_second']:,.0f} images/s, a step {times[50]:.1f} ms (99 % under {times[99]:.1f}), "
            f"{wait:.0%} of the time waiting for data{advice}"
        )
