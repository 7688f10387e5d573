"""The ledger of samples that no longer decode: RUN/bad_samples/rank-N.jsonl, one line for each time one was met.

Training goes on without them (their loss weighs 0, the number of steps stays), but never silently: they are counted, and too
many end the run.
"""

import json
from pathlib import Path
from typing import Any

import lightning as L

from pipeline.config import DataConfig
from pipeline.data.dataset import BadSample, Batch
from pipeline.errors import DataError
from pipeline.files import write_bytes

FOLDER = Path("bad_samples")


class BadSampleLedger(L.Callback):
    """Writes down each bad sample that this rank meets; too many, or too many in a row, stop the run with a DataError."""

    def __init__(self, run_dir: Path, config: DataConfig) -> None:
        self.folder, self.config = run_dir / FOLDER, config
        self.total = 0  # lines of this rank since the start; on rank 0 also those of all ranks before it
        self.in_epoch = 0
        self.in_row = 0
        self.known: set[int] = set()  # samples of the validation split, which are met again every epoch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget what was written after the checkpoint from which the run goes on: those steps are taken again."""
        if trainer.is_global_zero:
            self.total = sum(_keep_until(path, trainer.global_step) for path in sorted(self.folder.glob("*.jsonl")))
        trainer.strategy.barrier()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count anew."""
        self.in_epoch = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write down a batch's bad samples. Raises DataError when they are too many."""
        if not batch["bad"]:
            self.in_row = 0
            return
        self._write(trainer, "train", batch, batch["bad"])
        self.in_epoch += len(batch["bad"])
        self._require_few(len(batch["index"]) * int(trainer.num_training_batches), batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write down a bad sample of the validation split when it is met for the first time."""
        new = [sample for sample in batch["bad"] if int(batch["index"][sample.row]) not in self.known]
        if new:
            self.known |= {int(batch["index"][sample.row]) for sample in new}
            self._write(trainer, "val", batch, new)

    def _write(self, trainer: L.Trainer, split: str, batch: Batch, bad: list[BadSample]) -> None:
        lines = []
        for row, shard, key, reason in bad:
            place = {"shard": shard, "key": key, "index": int(batch["index"][row])}
            lines.append({"step": trainer.global_step, "split": split, **place, "reason": reason})
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
        self.total += len(lines)

    def _require_few(self, samples_of_epoch: int, batch: Batch) -> None:
        bad_rows = {sample.row for sample in batch["bad"]}
        for row in range(len(batch["index"])):
            self.in_row = self.in_row + 1 if row in bad_rows else 0
            if self.in_row >= self.config.max_bad_in_row:
                self._stop(f"{self.in_row} samples in a row", "data.max_bad_in_row")
        if self.in_epoch > self.config.max_bad_share * samples_of_epoch:
            self._stop(f"{self.in_epoch} of an epoch's {samples_of_epoch} samples", "data.max_bad_share")

    def _stop(self, what: str, setting: str) -> None:
        raise DataError(
            f"{what} can no longer be decoded on one process; they are named in {self.folder}. "
            f"Check the shards with `shardline verify`, or raise `{setting}`."
        )


def _keep_until(path: Path, step: int) -> int:
    """Drop the lines of a ledger that were written after `step`, and half a line of a killed process; return how many stay."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
    return len(kept)
