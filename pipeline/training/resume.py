"""Going on after something changed: another number of processes, or, where the user allows it, other settings or data."""

from typing import Any

import lightning as L

from pipeline.config import Config
from pipeline.console import say
from pipeline.data import native
from pipeline.models.named import with_defaults


def say_what_differs(config: Config, before: dict[str, Any] | None, world_size: int) -> None:
    """Print what is and what is not as it would have been with the checkpoint's own decoder and number of processes."""
    if before is None:
        return
    decoders = {"now": native.decoder_of(config.data), "before": before.get("decoder")}
    if None not in decoders.values() and decoders["now"] != decoders["before"]:
        say(f"crops are decoded by {decoders['now']}, before by {decoders['before']}: pixels differ, so not bit-equal")
    if before["world_size"] == world_size:
        return
    causes = ["the order of sums"]
    model = with_defaults(config.model)
    # A network of torchvision knows its own norm and dropout, which the configuration does not.
    if model.norm in ("batch", None) and not config.trainer.sync_batchnorm:
        causes.append("BatchNorm, which sees each process's own part of a batch")
    if model.dropout != 0 or model.feature_dropout or model.stochastic_depth:
        causes.append("dropout masks, which are drawn by process")
    say(
        f"going on with {world_size} processes after {before['world_size']}: the same samples and augmentation at every step; "
        f"not bit-equal: {', '.join(causes)}"
    )


class MoveCursor(L.Callback):
    """Translates the place in an epoch when --allow-changes goes on with another batch size or data set.

    The place is kept in samples, rounded down to whole steps; the schedule is kept in epochs. Without a change it does nothing.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self.config, self.steps_per_epoch = config, steps_per_epoch

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrite the loops' and the loader's state, which Lightning restores after this."""
        loop = checkpoint["loops"]["fit_loop"]
        (place,) = loop["state_dict"]["combined_loader"]
        now = {
            "num_batches": self.steps_per_epoch * self.config.data.accumulate,
            "global_batch_size": self.config.data.global_batch_size,
        }
        if all(place[name] == value for name, value in now.items()):
            return
        parts_before = checkpoint["shardline"]["config"]["data"]["accumulate"]
        steps_before = place["num_batches"] // parts_before
        seen = place["batch"] // parts_before * place["global_batch_size"]
        steps = min(seen // self.config.data.global_batch_size, self.steps_per_epoch)
        if place["batch"] == place["num_batches"]:
            steps = self.steps_per_epoch
        batch = steps * self.config.data.accumulate
        place |= {**now, "batch": batch}
        progress = loop["epoch_loop.batch_progress"]["current"]
        # A save in the middle of an epoch comes before its batch is counted as completed.
        uncounted = progress["processed"] - progress["completed"]
        progress |= {"ready": batch, "started": batch, "processed": batch, "completed": batch - uncounted}
        for schedule in checkpoint["lr_schedulers"]:
            self._move(schedule, steps_before)
        if trainer.is_global_zero:
            say(f"the checkpoint's epoch had {steps_before} steps, now {self.steps_per_epoch}: going on after {steps} of them")

    def _move(self, schedule: dict[str, Any], steps_before: int) -> None:
        ratio = self.steps_per_epoch / steps_before if self.config.scheduler.interval == "step" else 1.0
        schedule["last_epoch"] = round(schedule["last_epoch"] * ratio)
        for name in ("total_steps", "T_max", "warmup_steps"):
            if name in schedule:
                schedule[name] = round(schedule[name] * ratio)
        for phase in schedule.get("_schedule_phases", []):
            phase["end_step"] = phase["end_step"] * ratio
