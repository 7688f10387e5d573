"""What a check looks at, and what it answers."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.config import Config
from pipeline.data.augment import build_augmentation
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.order import GlobalBatchSampler
from pipeline.data.streaming import StreamDataset
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from pipeline.task import Task, task_of


@dataclass(frozen=True)
class Verdict:
    """The answer of one check; `why` is what a person reads."""

    check: str
    verdict: Literal["green", "red", "skipped"]
    value: float | str | None
    expected: str
    why: str


@dataclass(frozen=True)
class Subject:
    """The run under examination: its configuration, data and preprocessing, on one device."""

    config: Config
    manifest: DatasetManifest
    spec: PreprocessSpec
    device: torch.device

    def build_network(self, seed: int) -> nn.Sequential:
        """A fresh network of this seed, in training mode."""
        torch.manual_seed(seed)
        return build_network(self.config.model, self.task.num_outputs, self.spec).to(self.device)

    @property
    def task(self) -> Task:
        """What is asked of the network, with its loss."""
        return task_of(self.manifest, self.config)

    def sample_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, (n,), as training computes it."""
        return self.task.sample_losses(logits, labels)

    def loss_at_initialisation(self) -> float:
        """The loss of a network that knows nothing."""
        return self.task.loss_at_initialisation()

    def dataset(self, *, augmented: bool) -> ShardDataset:
        """The training split, with or without the run's augmentation."""
        augmentation = build_augmentation(self.config.data.augment, self.spec) if augmented else None
        return ShardDataset(self.manifest, "train", self.spec, augmentation, self.config.seed, self.config.data)

    def first_batch(self, *, augmented: bool, size: int | None = None) -> Batch:
        """The first samples of epoch 0 in training order, as many as a global batch or `size` if that is fewer."""
        if "train" in self.manifest.streams:
            return self._first_of_stream(augmented=augmented, size=size)
        dataset = self.dataset(augmented=augmented)
        whole = dataclasses.replace(self.config.data, drop_last=False)
        batches = GlobalBatchSampler.of_training(dataset.shards, whole, self.config.seed, rows=dataset.rows)
        samples = [sample for sample in next(iter(batches)) if sample.weight > 0][:size]
        return self._on_device(dataset.__getitems__(samples))

    def _first_of_stream(self, *, augmented: bool, size: int | None) -> Batch:
        augmentation = build_augmentation(self.config.data.augment, self.spec) if augmented else None
        data = dataclasses.replace(self.config.data, num_workers=0)
        stream = StreamDataset(self.manifest, self.spec, data, augmentation, seed=self.config.seed, rank=0, world_size=1)
        batch = self._on_device(next(iter(stream)))
        number = len(batch["label"]) if size is None else size
        images, labels, weights, indices = (batch[name][:number] for name in ("image", "label", "weight", "index"))
        return Batch(image=images, label=labels, weight=weights, index=indices, bad=[])

    def _on_device(self, batch: Batch) -> Batch:
        """The samples of a batch that could be decoded, where the network is."""
        good = batch["weight"] > 0
        return Batch(
            image=batch["image"][good].to(self.device),
            label=batch["label"][good].to(self.device),
            weight=batch["weight"][good].to(self.device),
            index=batch["index"][good],
            bad=[],
        )
