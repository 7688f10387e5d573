"""Stopping at a step boundary: a signal sets a flag, the ranks agree, everyone saves, and the job can go on later."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from pipeline.errors import StoppedError
from pipeline.training.checkpoint_writer import CheckpointWriter

# The ranks talk about stopping only this often: an all-reduce a step would cost more than it is worth.
STEPS_BETWEEN_AGREEMENTS = 5


class StopOnSignal(L.Callback):
    """Raises StoppedError on every rank, after a save, at the first agreed boundary after SIGTERM or SIGINT."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer = writer
        self.received = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take over from Lightning's own handlers, which save inside the handler or exit 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree, save and stop, except at the end of an epoch, where validation comes first."""
        is_last = batch_idx + 1 >= int(trainer.num_training_batches)
        if not is_last and trainer.global_step % STEPS_BETWEEN_AGREEMENTS == 0 and self._agreed(module.device):
            self.writer.save(trainer)
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Agree and stop; the checkpoint of the epoch has just been written."""
        if trainer.state.fn == "fit" and self._agreed(module.device):
            self._stop(trainer)

    def _agreed(self, device: torch.device) -> bool:
        flag = torch.tensor(self.received, device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.received = int(flag)
        return self.received > 0

    def _stop(self, trainer: L.Trainer) -> None:
        name = signal.Signals(self.received).name
        raise StoppedError(
            f"stopped by {name} after step {trainer.global_step}, saved. Run the same command again to go on.",
            self.received,
        )
