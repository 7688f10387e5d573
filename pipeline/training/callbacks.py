"""What happens around the steps of a training: equal sums after a restart, curves in MLflow, progress on the terminal."""

import math
import sys
import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from pipeline.console import say
from pipeline.tracking.run import RunTracker
from pipeline.training.bad_samples import BadSampleLedger
from pipeline.training.classifier import Classifier, ends_step
from pipeline.training.monitors import StepMonitor


class WarmUpBuckets(L.Callback):
    """Makes a restarted process add gradients in the order of an undisturbed one.

    DDP rebuilds its gradient buckets after the first backward pass, so the first step of a process sums in another order than
    all later ones; with three or more ranks the last bits differ. One backward pass of zeros takes that first place.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size  # (H, W)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Push one batch of empty images through DDP, forward and backward, leaving no trace in weights or statistics."""
        assert isinstance(module, Classifier) and trainer.strategy.model is not None
        images = torch.zeros(1, 3, *self.size, dtype=torch.uint8, device=module.device)
        module.network.eval()  # BatchNorm's running statistics stay as they are
        logits = trainer.strategy.model(images)
        (logits.sum() * 0.0).backward()
        module.network.train()
        module.zero_grad()


class TrainingCurves(L.Callback):
    """Sends the loss and accuracy of every n-th global batch, and each validation, to MLflow, from rank 0."""

    def __init__(
        self,
        tracker: RunTracker | None,
        class_names: list[str],
        every_steps: int,
        ledger: BadSampleLedger,
        monitor: StepMonitor,
    ) -> None:
        self.tracker, self.class_names, self.every_steps = tracker, class_names, every_steps
        self.ledger, self.monitor = ledger, monitor
        self.counts: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch's figures rather than a mean since the last point: a replayed step gives the same number again."""
        assert isinstance(module, Classifier)
        if trainer.global_step % self.every_steps or not ends_step(module, batch_idx):
            return
        sums = module.step_sums()  # (3,)
        if trainer.world_size > 1:
            sums = torch.cat([sums, sums.new_tensor([self.ledger.total])])  # (4,)
            dist.all_reduce(sums)
        if self.tracker is not None:
            loss, correct, weight, bad = (*sums.tolist(), self.ledger.total)[:4]
            learning_rate = float(trainer.optimizers[0].param_groups[0]["lr"])
            metrics = {"train/learning_rate": learning_rate}
            if weight:  # a batch of nothing but bad samples has neither
                metrics |= {"train/loss": loss / weight, "train/accuracy": correct / weight}
                self.monitor.watch_loss(loss / weight, trainer.global_step)
            metrics |= {"train/gradient_norm": self.monitor.gradient_norm}
            metrics |= self._changed_counts(bad)
            self.tracker.log({name: value for name, value in metrics.items() if math.isfinite(value)}, trainer.global_step)

    def _changed_counts(self, num_bad: float) -> dict[str, float]:
        """Counts that are not what they were at the last point: each point costs 0.1 ms, and most runs have three zeros."""
        watched = {"train/loss_spikes": self.monitor.losses.num_spikes, "train/skipped_steps": self.monitor.num_skipped}
        before, self.counts = self.counts, {"train/bad_samples": num_bad, **watched}
        return {name: count for name, count in self.counts.items() if before.get(name, 0) != count}

    def state_dict(self) -> dict[str, Any]:
        """What was said last, so that a run which goes on says the same as an undisturbed one."""
        return {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.counts = state_dict["counts"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Every figure and each class's recall after an epoch."""
        assert isinstance(module, Classifier) and module.metrics is not None
        if self.tracker is None:
            return
        metrics = {f"val/{name}": value for name, value in module.metrics.figures().items()}
        for name, recall in zip(self.class_names, module.metrics.recall, strict=True):
            if recall == recall:
                metrics[f"val/recall/{name}"] = recall
        self.tracker.log(metrics, trainer.global_step)
        self.tracker.flush()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the points of the steps that a run which goes on from here does not take again."""
        if self.tracker is not None:
            self.tracker.flush()


class ShowProgress(L.Callback):
    """Rank 0 prints one line an epoch, and on a terminal a bar within the epoch."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_step = 0
        self.bar: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock and the bar of an epoch."""
        if not trainer.is_global_zero:
            return
        self.started, self.first_step = time.monotonic(), trainer.global_step
        if sys.stdout.isatty():
            from rich.progress import Progress

            self.bar = Progress(transient=True)
            self.bar.start()
            self.task = self.bar.add_task(f"epoch {trainer.current_epoch + 1}", total=trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=batch_idx + 1)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print the epoch's line."""
        assert isinstance(module, Classifier) and module.metrics is not None
        self._close_bar()
        if not trainer.is_global_zero:
            return
        seconds = max(time.monotonic() - self.started, 1e-9)
        images = (trainer.global_step - self.first_step) * module.config.data.global_batch_size
        say(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step}  "
            f"val/accuracy {module.metrics.accuracy:.4f}  val/loss {module.metrics.loss:.4f}  {images / seconds:,.0f} images/s"
        )

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
