"""Checkpoints that survive a crash at any instant: when they are written, how, and which are kept.

The best one is the first to reach the best value of the monitor. The order of the files matters: checksum, checkpoint, links,
and only then is an older checkpoint removed, so that a kill between any two leaves a whole one behind.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from pipeline.config import Config
from pipeline.data import native
from pipeline.files import publish, temporary_name, write_bytes
from pipeline.manifest import FORMAT_VERSION, DatasetManifest
from pipeline.metrics import direction
from pipeline.pretraining import spec_for
from pipeline.run import BEST, LAST
from pipeline.training.checkpoint import checkpoint_path, checkpoints_in, checksum_path, step_of
from pipeline.training.classifier import Classifier, ends_step, monitored


class _HashedFile:
    """Hashes what is written on its way, beside the thread that trains, so that the bytes need not be read again.

    torch turns an error of the disk into one about its own state; `error` keeps the first one.
    """

    def __init__(self, file: IO[bytes], helper: Executor) -> None:
        self.file, self.helper, self.sha256 = file, helper, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write and hash; torch writes a checkpoint from beginning to end, and owns `content` again afterwards."""
        hashed = self.helper.submit(self.sha256.update, content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            hashed.result()

    def flush(self) -> None:
        """Pass on."""
        self.file.flush()


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, fsyncs and renames: a reader sees the old file or the new one, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save `checkpoint` at `path` and its sha256 beside it. Raises OSError; the files before it are kept."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(final)
        try:
            with temporary.open("wb") as file, ThreadPoolExecutor(1) as helper:
                hashed = _HashedFile(file, helper)
                try:
                    torch.save(checkpoint, hashed)  # type: ignore[arg-type]
                except RuntimeError as error:
                    raise hashed.error or error from None
            write_bytes(checksum_path(final), f"{hashed.sha256.hexdigest()}  {final.name}\n".encode())
            publish(temporary, final)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(final)  # a full disk is noticed by a write, which knows no name
            raise


class CheckpointWriter(L.Callback):
    """Saves every few steps and after each validation; keeps the best and the newest few.

    It also ends a training that no longer improves (early stopping), which is decided by the same comparison.
    """

    def __init__(
        self,
        config: Config,
        manifest: DatasetManifest,
        identity: dict[str, str | None],
        folder: Path,
        lost: Collection[int] = (),
        is_compiled: bool = False,
    ) -> None:
        self.config, self.manifest, self.identity, self.folder = config, manifest, identity, folder
        self.lost = lost  # steps of checkpoints that were among the best and are damaged
        self.is_compiled = is_compiled
        self.spec = spec_for(config, manifest)
        self.ranking: list[list[float]] = []  # [value, step] of the best validations, the best first
        self.num_worse = 0  # validations since the best one
        self.saved_step = 0
        self.saved_at = time.monotonic()

    @property
    def best_value(self) -> float | None:
        """The best value of the monitor so far."""
        return self.ranking[0][0] if self.ranking else None

    @property
    def best_path(self) -> Path:
        """The checkpoint of the best validation so far."""
        return checkpoint_path(self.folder, int(self.ranking[0][1]))

    @property
    def is_due(self) -> bool:
        """Whether the last save is longer ago than `checkpoint_every_minutes`, by this rank's clock."""
        return time.monotonic() - self.saved_at > 60 * self.config.trainer.checkpoint_every_minutes

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The clock of saves by minutes starts with the steps."""
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every few steps. A step that is followed by a validation is saved after it, because both belong together."""
        assert isinstance(module, Classifier)
        every = self.config.trainer.checkpoint_every_steps
        if every and trainer.global_step % every == 0 and self.may_save(trainer, module, batch_idx):
            self.save(trainer)

    def may_save(self, trainer: L.Trainer, module: Classifier, batch_idx: int) -> bool:
        """Whether a save right after this batch is one to go on from: within an epoch, and no validation follows."""
        every = self.config.trainer.validate_every_steps
        validates_now = every is not None and trainer.global_step % every == 0
        is_last = batch_idx + 1 >= int(trainer.num_training_batches)
        return ends_step(module, batch_idx) and not is_last and not validates_now

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save after an epoch, unless its validation did."""
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save, on all ranks together, unless this step is saved already."""
        if self.saved_step == trainer.global_step:
            return
        path = checkpoint_path(self.folder, trainer.global_step)
        trainer.save_checkpoint(path)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            _link(self.folder / LAST, path)
            if self.ranking:
                _link(self.folder / BEST, self.best_path)
            self._prune(trainer.global_step)

    def _prune(self, step: int) -> None:
        """Remove checkpoints that are neither among the best nor among the newest.

        One from after `step` was refused when the run went on, and will be written anew.
        """
        own = [path for path in checkpoints_in(self.folder) if step_of(path) <= step]
        kept = {int(best) for _, best in self.ranking} | {step_of(path) for path in own[: self.config.trainer.keep_last]}
        for path in own:
            if step_of(path) not in kept:
                path.unlink()
                checksum_path(path).unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Rank the validation, save it, and stop when there was no better one for too long."""
        assert isinstance(module, Classifier) and module.metrics is not None
        value = monitored(self.config, module.metrics)
        self.num_worse = 0 if self._is_better(value, self.best_value) else self.num_worse + 1
        place = next((n for n, (other, _) in enumerate(self.ranking) if self._is_better(value, other)), len(self.ranking))
        self.ranking.insert(place, [value, trainer.global_step])
        del self.ranking[self.config.trainer.keep_best :]
        self.save(trainer)
        self._stop_early(trainer)

    def _is_better(self, value: float, other: float | None) -> bool:
        if other is None:
            return True
        if math.isnan(other):
            return not math.isnan(value)
        return value > other if direction(self.config.trainer.monitor) == "max" else value < other

    def _stop_early(self, trainer: L.Trainer) -> None:
        patience = self.config.trainer.early_stopping
        if patience is not None and self.num_worse >= patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The best so far and the patience used up travel in the checkpoint."""
        return {"ranking": self.ranking, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.ranking = [[value, step] for value, step in state_dict["ranking"] if step not in self.lost]
        self.num_worse = state_dict["num_worse"]

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that was killed after its early stop has nothing left to train."""
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
        self._stop_early(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what the weights are, for whoever reads the file alone."""
        assert isinstance(module, Classifier) and trainer.train_dataloader is not None
        place = trainer.train_dataloader.state_dict()
        checkpoint["shardline"] = {
            "format_version": FORMAT_VERSION,
            "config": self.config.as_dict(),
            "preprocess": dataclasses.asdict(self.spec),
            "class_names": self.manifest.class_names,
            "task": module.task.kind,
            "global_batch_size": self.config.data.global_batch_size,
            "cursor": {"epoch": place["epoch"], "batch": place["batch"] // self.config.data.accumulate},
            "global_step": trainer.global_step,
            "world_size": trainer.world_size,
            "compiled": self.is_compiled,
            "decoder": native.decoder_of(self.config.data),
            "ranking": self.ranking,
            **self.identity,
        }


def _link(link: Path, target: Path) -> None:
    """Let `link` name `target` for people. Some shared file systems know no links, and nothing depends on them."""
    temporary = temporary_name(link)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
