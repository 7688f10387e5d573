"""Watches each step for numbers that are none, and for losses and gradients that leap.

With DDP a single bad sample poisons every rank: gradients are averaged before anybody looks. So the check comes after the
average, where all ranks see the same norm and decide alike, and before the optimizer moves.
"""

import math
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from pipeline.config import Config
from pipeline.console import say
from pipeline.data.dataset import Batch
from pipeline.errors import TrainingError
from pipeline.training.classifier import Classifier

# After so many skipped steps in a row it is the weights that are broken, not a batch.
MAX_SKIPPED_IN_ROW = 10
# The scale of half precision begins at 2^16: halved so often, it is not the scale that makes a gradient infinite.
MAX_OVERFLOWS_IN_ROW = 30
# A logged loss this far above its running mean is a spike; the mean forgets over about 50 points, and needs as many to begin.
SPIKE_DEVIATIONS = 6.0
MEMORY = 0.98
MIN_POINTS = 50
KEYS_SHOWN = 8


class StepMonitor(L.Callback):
    """Measures the gradient norm of each step; a step that is not finite is skipped and counted, or ends the run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gradient_norm = math.nan
        self.num_skipped = 0
        self.skipped_in_row = 0
        self.overflows_in_row = 0
        self.losses = RunningLoss()
        self.buffers: list[torch.Tensor] = []
        self.found: torch.Tensor | None = None  # (1,), not 0 once a gradient was not finite

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember BatchNorm's running statistics, which the forward pass of a skipped step must not change."""
        if self.config.trainer.non_finite == "skip" and batch_idx % self.config.data.accumulate == 0:
            self.buffers = [buffer.clone() for buffer in module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Look at the averaged gradients. Raises TrainingError when one is not finite and the run is set to stop."""
        assert isinstance(module, Classifier)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._are_finite(gradients):
            self.skipped_in_row = self.overflows_in_row = 0
            if (trainer.global_step + 1) % self.config.trainer.log_every_steps == 0:
                self.gradient_norm = float(nn.utils.get_total_norm(gradients))
            return
        self.gradient_norm = math.nan
        suspects = self._suspects(trainer, module)
        if self.config.trainer.precision == "16-mixed" and not suspects:
            # Half precision overflows while its scale is being found; the scaler skips the step itself and halves it.
            self.overflows_in_row += 1
            if self.overflows_in_row < MAX_OVERFLOWS_IN_ROW:
                return
        self.num_skipped += 1
        self.skipped_in_row += 1
        if self.config.trainer.non_finite == "stop" or self.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise TrainingError(self._explain(trainer, suspects))
        for parameter in module.parameters():
            parameter.grad = None  # an optimizer leaves a parameter without gradient alone: no decay, no momentum
        for buffer, before in zip(module.buffers(), self.buffers, strict=True):
            buffer.copy_(before)
        if trainer.is_global_zero:
            say(f"step {trainer.global_step + 1}: not finite, skipped{_of(suspects)} ({self._replay(trainer)})")

    def _are_finite(self, gradients: list[torch.Tensor]) -> bool:
        """Ask the kernel of torch's GradScaler, one over all gradients.

        Their norm, which torch's public interface has, takes 66 us a step instead of 20 where the network is small.
        """
        if not gradients:
            return True
        if self.found is None:
            self.found = torch.zeros(1, device=gradients[0].device)
            self.scale = torch.ones_like(self.found)  # gradients are multiplied by it
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found, self.scale)
        if not self.found.item():
            return True
        self.found = None
        return False

    def _suspects(self, trainer: L.Trainer, module: Classifier) -> list[str]:
        """Keys of the step's samples whose own loss is not finite, over all ranks."""
        keys = []
        for part, losses in module.step_losses():
            rows = torch.nonzero(~torch.isfinite(losses) & (part.weights > 0)).flatten().tolist()
            keys += [_key(trainer, int(part.indices[row])) for row in rows]
        if not dist.is_initialized():
            return keys
        everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, keys)
        return [key for rank in everywhere for key in rank]

    def _explain(self, trainer: L.Trainer, suspects: list[str]) -> str:
        again = f", {self.skipped_in_row} steps in a row" if self.skipped_in_row > 1 else ""
        what = "the loss is not finite" if suspects else "the gradient is not finite, though every loss is"
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        return (
            f"step {trainer.global_step + 1}: {what}{again}{_of(suspects)}. "
            f"See what entered the network: {self._replay(trainer)}. "
            f"Then lower `optimizer.lr` ({rate:.3g} here), set `trainer.gradient_clip_norm`, "
            "or leave such steps out with `trainer.non_finite: skip`."
        )

    def _replay(self, trainer: L.Trainer) -> str:
        return f"shardline replay {self.config.run_dir} --step {trainer.global_step + 1}"

    def watch_loss(self, loss: float, step: int) -> bool:
        """Take the loss of a global batch into the running mean; say so and return True when it is a spike."""
        is_spike = self.losses.add(loss)
        if is_spike:
            command = f"shardline replay {self.config.run_dir} --step {step}"
            say(f"step {step}: loss {loss:.4f} leaps above its running mean {self.losses.mean:.4f} ({command})")
        return is_spike

    def state_dict(self) -> dict[str, Any]:
        """Counts go on where they were."""
        return {"num_skipped": self.num_skipped, "skipped_in_row": self.skipped_in_row, "losses": vars(self.losses).copy()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_skipped, self.skipped_in_row = state_dict["num_skipped"], state_dict["skipped_in_row"]
        self.losses = RunningLoss(**state_dict["losses"])


class RunningLoss:
    """Exponential mean and variance of a loss (West, 1979, with a constant gain), and how often it leapt."""

    def __init__(self, mean: float = 0.0, variance: float = 0.0, num_points: int = 0, num_spikes: int = 0) -> None:
        self.mean, self.variance, self.num_points, self.num_spikes = mean, variance, num_points, num_spikes

    def add(self, loss: float) -> bool:
        """Take in a loss; a spike is counted, and moves the mean no further than the rule's own bound."""
        if not math.isfinite(loss):
            return False
        bound = self.mean + SPIKE_DEVIATIONS * math.sqrt(self.variance)
        is_spike = self.num_points >= MIN_POINTS and loss > bound
        self.num_spikes += is_spike
        self.num_points += 1
        difference = (min(loss, bound) if is_spike else loss) - self.mean
        gain = max(1.0 / self.num_points, 1.0 - MEMORY)
        self.mean += gain * difference
        self.variance = (1.0 - gain) * (self.variance + gain * difference * difference)
        return is_spike


def _key(trainer: L.Trainer, index: int) -> str:
    assert trainer.train_dataloader is not None
    return str(trainer.train_dataloader.dataset.key(index)) if index >= 0 else "(streamed)"


def _of(suspects: list[str]) -> str:
    more = f" and {len(suspects) - KEYS_SHOWN} more" if len(suspects) > KEYS_SHOWN else ""
    return f" for {', '.join(suspects[:KEYS_SHOWN])}{more}" if suspects else ""
