"""The LightningModule: one loss, exact metrics, and randomness that depends on (seed, step, rank) alone."""

from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline import distributed
from pipeline.config import Config
from pipeline.data.dataset import Batch
from pipeline.data.mixing import Mixed, mix_batch
from pipeline.data.order import mix
from pipeline.data.pixel_changes import PixelChanges
from pipeline.metrics import EvaluationSums, Metrics
from pipeline.task import Task
from pipeline.training.optim import build_optimizer, build_scheduler, may_fuse, scheduler_length

PLAIN = (str, int, type(None))


class StepPart(NamedTuple):
    """What the network made of a batch of n images of a step, kept for the figures of every n-th step."""

    logits: torch.Tensor  # (n, num_outputs)
    labels: torch.Tensor
    weights: torch.Tensor  # (n,)
    indices: torch.Tensor  # (n,)
    mixed: Mixed | None


class Classifier(L.LightningModule):
    """Trains `network`, uint8 images (N, 3, H, W) to logits (N, num_outputs), for `total_steps` optimizer steps.

    `changes` are made of the images of training before the network sees them.
    """

    def __init__(
        self, network: nn.Sequential, config: Config, task: Task, total_steps: int, changes: PixelChanges | None = None
    ) -> None:
        super().__init__()
        self.changes = changes
        # Lightning's own estimate makes the loaders before a checkpoint is restored, and they would never learn their place.
        self.total_steps = total_steps
        self.network = network
        self.config = config
        self.task = task
        self.rank = distributed.rank()
        self.micro_step = 0  # batches that the run has seen before this one; the step, unless gradients are accumulated
        self.step_parts: list[StepPart] = []  # of this rank's part of the step; more than one where gradients accumulate
        self.metrics: Metrics | None = None
        self.predictions: list[torch.Tensor] = []
        self.plateau: ReduceLROnPlateau | None = None
        self.plateau_state: dict[str, Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch does it, but a word or number that takes the place of another is not held against each parameter's name.

        Lightning writes here which hook it calls, forty times a step: 100 us of it on a CPU.
        """
        if name in (own := self.__dict__) and isinstance(value, PLAIN):
            own[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_outputs) of uint8 images (N, 3, H, W)."""
        logits: torch.Tensor = self.network(images)
        return logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout must not depend on what ran before: a resumed step draws the masks of the undisturbed one."""
        accumulate = self.config.data.accumulate
        self.micro_step = self.global_step * accumulate + batch_idx % accumulate
        seed_torch(mix(self.config.seed, self.micro_step, self.rank), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean loss over the local batch; with DDP's mean over ranks, the mean over the global batch (see pipeline.task)."""
        images, weights = batch["image"], batch["weight"]  # (n, 3, H, W), (n,)
        if self.changes is not None:
            images = self.changes(images, batch["seed"])
        augment, seed = self.config.data.augment, self.config.seed
        images, mixed = mix_batch(images, batch["label"], weights, augment, seed, self.micro_step)
        logits = self.network(images)  # (n, num_outputs)
        if batch_idx % self.config.data.accumulate == 0:
            self.step_parts.clear()
        part = StepPart(logits.detach(), batch["label"], weights, batch["index"], mixed)
        self.step_parts.append(part)
        # As a product of two vectors it takes 18 us more than a plain mean; their product, its sum and a quotient take 42.
        return torch.dot(self._losses(part, logits), weights / len(weights))

    def _losses(self, part: StepPart, logits: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, (n,)."""
        losses = self.task.sample_losses(logits, part.labels)
        if part.mixed is None:
            return losses
        return torch.lerp(self.task.sample_losses(logits, part.mixed.other_label), losses, part.mixed.share)

    def _correct(self, part: StepPart) -> torch.Tensor:
        """How right each answer is, (n,)."""
        correct = self.task.correct(part.logits, part.labels)
        if part.mixed is None:
            return correct
        return torch.lerp(self.task.correct(part.logits, part.mixed.other_label), correct, part.mixed.share)

    def step_losses(self) -> list[tuple[StepPart, torch.Tensor]]:
        """The batches of the last step on this rank, each with the losses of its samples, (n,)."""
        return [(part, self._losses(part, part.logits)) for part in self.step_parts]

    def step_sums(self) -> torch.Tensor:
        """Weighted loss, weighted correct answers, and weight of this rank's part of the last step, float32 (3,)."""
        sums = []
        for part in self.step_parts:
            losses, correct = self._losses(part, part.logits), self._correct(part)
            sums.append(torch.stack([torch.dot(part.weights, losses), torch.dot(part.weights, correct), part.weights.sum()]))
        return torch.stack(sums).sum(dim=0) if len(sums) > 1 else sums[0]

    def configure_optimizers(self) -> Any:
        """The configured optimizer and scheduler, in Lightning's form."""
        optimizer = build_optimizer(self.network, self.config.optimizer, fuse=may_fuse(self.config.trainer, self.config.model))
        length = scheduler_length(self.config.scheduler, self.total_steps, self.config.trainer.max_epochs)
        scheduler = build_scheduler(optimizer, self.config.scheduler, length, self.config.trainer.monitor)
        if isinstance(scheduler, ReduceLROnPlateau):
            self.plateau = scheduler
            if self.plateau_state is not None:
                scheduler.load_state_dict(self.plateau_state)
        if scheduler is None or self.plateau is not None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.config.scheduler.interval},
        }

    # Lightning skips a plateau scheduler when it resumes at an epoch's end, so this one is moved and saved here.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the place of a plateau scheduler."""
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the place of a plateau scheduler, which is built later."""
        self.plateau_state = checkpoint.get("plateau")

    # ---- evaluation, the same for validation and test ----

    def _start_evaluation(self, num_samples: int) -> None:
        # BatchNorm's running statistics differ by rank after a step, and evaluation runs outside of DDP.
        for buffer in self.network.buffers():
            _broadcast(buffer)
        self.sums = EvaluationSums(self.task, num_samples, self.device)

    def _add(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.network(batch["image"])
        self.sums.add(logits, batch["label"], batch["weight"], batch["index"])
        self.sums.add_bad(batch["index"][[sample.row for sample in batch["bad"]]])
        return logits

    def on_validation_epoch_start(self) -> None:
        """Start to count."""
        self._start_evaluation(_num_samples(self.trainer.val_dataloaders))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        self._add(batch)

    def on_validation_epoch_end(self) -> None:
        """Add up the ranks; every rank holds the same figures afterwards."""
        self.metrics = self.sums.reduce()
        if self.plateau is not None:
            self.plateau.step(monitored(self.config, self.metrics))

    def on_test_epoch_start(self) -> None:
        """Start to count, and to keep each prediction."""
        self.predictions = []
        self._start_evaluation(_num_samples(self.trainer.test_dataloaders))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch; keep (index, predicted, confidence) of each row, or (index, probability of each label)."""
        logits = self._add(batch)
        answer = self.task.probabilities(logits.float()).double()  # (n, K)
        if self.task.kind != "multi":
            answer = torch.stack([self.task.predicted(logits).double(), answer.amax(dim=1)], dim=1)
        # Padding and samples that no longer decode have no prediction.
        index = torch.where(batch["weight"] > 0, batch["index"], -1)
        self.predictions.append(torch.cat([index[:, None].double(), answer], dim=1))

    def on_test_epoch_end(self) -> None:
        """Add up the ranks, and gather their predictions, (N, 3) or (N, 1 + K), in the order of samples."""
        self.metrics = self.sums.reduce()
        gathered = self.all_gather(torch.cat(self.predictions))
        assert isinstance(gathered, torch.Tensor)
        rows = gathered.reshape(-1, gathered.shape[-1])
        rows = rows[rows[:, 0] >= 0]
        self.predictions = [rows[rows[:, 0].argsort()].cpu()]


def seed_torch(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and one device alone: 2 us instead of 250 us, which it takes to ask every backend."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def monitored(config: Config, metrics: Metrics) -> float:
    """The value that decides which checkpoint is the best; `direction` says whether more or less of it is better."""
    return float(getattr(metrics, config.trainer.monitor.removeprefix("val/")))


def ends_step(module: Classifier, batch_idx: int) -> bool:
    """Whether the optimizer moved after this batch, and gradients are not still being accumulated."""
    return (batch_idx + 1) % module.config.data.accumulate == 0


def _num_samples(loader: Any) -> int:
    return int(loader.batches.num_samples)


def _broadcast(buffer: torch.Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(buffer, src=0)
