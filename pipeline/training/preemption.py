"""Stopping at a step boundary: a signal sets a flag, the ranks agree, everyone saves, and the job can go on later.

Saving inside a signal handler deadlocks: one rank is in the save's barrier while another waits in the all-reduce of its
backward pass (Lightning issue 21406). Saves by the clock need the same agreement, since the ranks' clocks differ.
"""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.distributed import STOP_SIGNALS
from pipeline.errors import StoppedError
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.classifier import Classifier

# The ranks talk about stopping only this often: an all-reduce a step would cost more than it is worth.
STEPS_BETWEEN_AGREEMENTS = 5


class StopOnSignal(L.Callback):
    """Saves when the clock says so; on a stop signal raises StoppedError on every rank, after a save, at an agreed step."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer = writer
        self.received = 0  # by this rank, at any moment
        self.agreed = 0  # by all ranks, at the last agreement: nothing but this decides what they do together

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take over from Lightning's own handlers, which save inside the handler or exit 0."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree, save and stop, except where a validation or the end of the epoch comes first."""
        assert isinstance(module, Classifier)
        if trainer.global_step % STEPS_BETWEEN_AGREEMENTS or not self.writer.may_save(trainer, module, batch_idx):
            return
        is_due = self._agree(self.writer.is_due)
        if self.agreed or is_due:
            self.writer.save(trainer)
        self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Agree and stop; the checkpoint of the validation has just been written."""
        if trainer.state.fn == "fit":
            self._agree(False)
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Agree and stop; the checkpoint of the epoch has just been written."""
        self._agree(False)
        self._stop(trainer)

    def _agree(self, is_due: bool) -> bool:
        """Let every rank know of a signal that one of them received, and say whether a save is due on one."""
        if distributed.world_size() == 1:
            self.agreed = self.received
            return is_due
        flags = torch.tensor([self.received, int(is_due)])  # on the CPU: no GPU has to finish its work for it
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.agreed = int(flags[0])  # a signal that comes during the wait is for the next agreement
        return bool(flags[1])

    def _stop(self, trainer: L.Trainer) -> None:
        if not self.agreed:
            return
        name = signal.Signals(self.agreed).name
        raise StoppedError(
            f"stopped by {name} after step {trainer.global_step}, saved. Run the same command again to go on.",
            self.agreed,
        )
