"""Checkpoints that survive a crash at any instant.

`last.ckpt` is where a resumed run goes on; `best.ckpt` is the first to reach the best value of the monitor.
"""

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from pipeline.config import Config
from pipeline.files import publish, temporary_name
from pipeline.manifest import FORMAT_VERSION, DatasetManifest
from pipeline.run import BEST, LAST
from pipeline.training.classifier import Classifier, monitored


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, fsyncs and renames: a reader sees the old file or the new one, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save `checkpoint` at `path`. Raises OSError when it cannot be written; the file before it is kept."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(final)
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
            publish(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class CheckpointWriter(L.Callback):
    """Saves last.ckpt every few steps and after each validation, and best.ckpt when the monitor improves."""

    def __init__(self, config: Config, manifest: DatasetManifest, identity: dict[str, str | None], folder: Path) -> None:
        self.config, self.manifest, self.identity, self.folder = config, manifest, identity, folder
        self.best_value: float | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch. The end of one is saved after its validation, which belongs to it."""
        is_last = batch_idx + 1 >= int(trainer.num_training_batches)
        if not is_last and trainer.global_step % self.config.trainer.checkpoint_every_steps == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save last.ckpt, on all ranks together."""
        trainer.save_checkpoint(self.folder / LAST)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save after an epoch."""
        assert isinstance(module, Classifier) and module.metrics is not None
        value = monitored(self.config, module.metrics)
        if not self._improves(value):
            self.save(trainer)
            return
        self.best_value = value
        # best.ckpt comes first: a crash between the two replays this epoch's end and writes it again.
        trainer.save_checkpoint(self.folder / BEST)
        if trainer.is_global_zero:
            temporary = temporary_name(self.folder / LAST)
            temporary.unlink(missing_ok=True)
            os.link(self.folder / BEST, temporary)
            publish(temporary, self.folder / LAST)

    def _improves(self, value: float) -> bool:
        if self.best_value is None:
            return True
        if math.isnan(self.best_value):
            return not math.isnan(value)
        return value > self.best_value if self.config.trainer.monitor == "val/accuracy" else value < self.best_value

    def state_dict(self) -> dict[str, Any]:
        """The best value so far travels in the checkpoint."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best value so far."""
        self.best_value = state_dict["best_value"]

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are, for whoever reads the file alone."""
        assert trainer.train_dataloader is not None
        place = trainer.train_dataloader.state_dict()
        checkpoint["shardline"] = {
            "format_version": FORMAT_VERSION,
            "config": self.config.as_dict(),
            "class_names": self.manifest.class_names,
            "task": self.manifest.task,
            "global_batch_size": self.config.data.global_batch_size,
            "cursor": {"epoch": place["epoch"], "batch": place["batch"]},
            "global_step": trainer.global_step,
            **self.identity,
        }
