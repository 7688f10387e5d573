"""What a check looks at, and what it answers."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pipeline.config import Config
from pipeline.data.augment import build_augmentation
from pipeline.data.dataset import Batch, ShardDataset, decodable
from pipeline.data.order import GlobalBatchSampler, Positions, SampleRef, mix
from pipeline.data.pixel_changes import build_pixel_changes
from pipeline.data.streaming import StreamDataset
from pipeline.manifest import DatasetManifest
from pipeline.models.freezing import frozen, is_frozen
from pipeline.models.sequential import network_for
from pipeline.preprocess import PreprocessSpec
from pipeline.recipe.features import Described, describe_batches
from pipeline.report.html import Block
from pipeline.task import Task, task_of

SAMPLES_AT_A_TIME = 64
# Of a remote data set whole shards have to be fetched, so few of them are drawn from.
REMOTE_SHARDS = 8
# Enough for a linear classifier to say something, few enough to decode photographs in seconds.
DESCRIBED_TRAIN, DESCRIBED_HELD_OUT = 2000, 1000


@dataclass(frozen=True)
class Verdict:
    """The answer of one check; `why` is what a person reads, `blocks` what the page shows of it."""

    check: str
    verdict: Literal["green", "red", "skipped"]
    value: float | str | None
    expected: str
    why: str
    blocks: tuple[Block, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The entry of verdicts.json."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "blocks"}


@dataclass(frozen=True)
class Subject:
    """The run under examination: its configuration, data and preprocessing, on one device.

    What is asked of the network is asked here alone: a check knows no loss, and so holds for one label an image and for many.
    """

    config: Config
    manifest: DatasetManifest
    spec: PreprocessSpec
    device: torch.device
    _described: dict[str, Described] = field(default_factory=dict, init=False, repr=False, compare=False)

    def build_network(self, seed: int) -> nn.Sequential:
        """A fresh network of this seed as training begins with it, in training mode."""
        torch.manual_seed(seed)
        return network_for(self.config, self.manifest, self.spec).to(self.device)

    def build_random_network(self, seed: int) -> nn.Sequential:
        """The same network without pretrained weights."""
        torch.manual_seed(seed)
        return network_for(self.config, self.manifest, self.spec, pretrained=False).to(self.device)

    @functools.cached_property
    def task(self) -> Task:
        """What is asked of the network, with its loss."""
        return task_of(self.manifest, self.config)

    @property
    def weights(self) -> str | None:
        """The pretrained weights that the run claims to start from."""
        return self.config.model.weights

    def is_frozen(self, name: str) -> bool:
        """Whether the configuration keeps a parameter from training in the first epoch."""
        return is_frozen(name, frozen(self.config.model, epoch=0))

    def sample_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss of each sample, (n,)."""
        return self.task.sample_losses(logits, labels)

    def loss_at_initialisation(self) -> float:
        """The mean loss of a network that knows nothing but what its last bias was told of the classes."""
        return self.task.loss_at_initialisation(from_prior=self.config.model.prior_bias)

    @property
    def is_streamed(self) -> bool:
        """Whether the training split has no index, so that no sample of it can be looked up."""
        return "train" in self.manifest.streams

    def dataset(self, split: str = "train", *, augmented: bool = False) -> ShardDataset:
        """An indexed split, with or without the run's augmentation."""
        augmentation = build_augmentation(self.config.data.augment, self.spec) if augmented else None
        return ShardDataset(self.manifest, split, self.spec, augmentation, self.config.seed, self.config.data)

    def first_batch(self, *, augmented: bool, size: int | None = None) -> Batch:
        """The first samples of epoch 0 in training order, as many as a global batch or `size` if that is fewer."""
        if self.is_streamed:
            return self._first_of_stream(augmented=augmented, size=size)
        dataset = self.dataset(augmented=augmented)
        whole = dataclasses.replace(self.config.data, drop_last=False)
        batches = GlobalBatchSampler.of_training(dataset.shards, whole, self.config.seed, rows=dataset.rows)
        samples = [sample for sample in next(iter(batches)) if sample.weight > 0][:size]
        return self._as_trained_on(dataset.__getitems__(samples), augmented=augmented)

    def sampled(self, split: str, number: int) -> Iterator[Batch]:
        """At most `number` random samples of an indexed split, without augmentation, a few at a time, always the same."""
        dataset = self.dataset(split)
        rows = draw_rows(dataset, number, self.config.seed)
        for first in range(0, len(rows), SAMPLES_AT_A_TIME):
            refs = [SampleRef(row, 0, 1.0) for row in rows[first : first + SAMPLES_AT_A_TIME].tolist()]
            yield self._on_device(dataset.__getitems__(refs))

    def described(self, split: str) -> Described:
        """Quick features and labels of random samples of an indexed split."""
        if split not in self._described:
            number = DESCRIBED_TRAIN if split == "train" else DESCRIBED_HELD_OUT
            self._described[split] = describe_batches(self.sampled(split, number))
        return self._described[split]

    def label_names(self, label: torch.Tensor) -> str:
        """The class name of a label, or the names where it is a row of several, (K,)."""
        numbers = label.nonzero().flatten().tolist() if label.ndim else [int(label)]
        return ", ".join(self.manifest.class_names[number] for number in numbers) or "none"

    def _first_of_stream(self, *, augmented: bool, size: int | None) -> Batch:
        augmentation = build_augmentation(self.config.data.augment, self.spec) if augmented else None
        data = dataclasses.replace(self.config.data, num_workers=0)
        stream = StreamDataset(self.manifest, self.spec, data, augmentation, seed=self.config.seed, rank=0, world_size=1)
        return self._as_trained_on(next(iter(stream)), augmented=augmented, size=size)

    def _as_trained_on(self, batch: Batch, *, augmented: bool, size: int | None = None) -> Batch:
        batch = self._on_device(batch, size)
        changes = build_pixel_changes(self.config.data.augment, self.spec) if augmented else None
        if changes is not None:
            batch["image"] = changes(batch["image"], batch["seed"])
        return batch

    def _on_device(self, batch: Batch, size: int | None = None) -> Batch:
        """The samples of a batch that could be decoded, at most `size`, where the network is."""
        batch = decodable(batch, size)
        for name in ("image", "label", "weight"):
            batch[name] = batch[name].to(self.device)
        return batch


def draw_rows(dataset: ShardDataset, number: int, seed: int) -> Positions:
    """At most `number` random rows of a split's index, ascending."""
    draw = np.random.default_rng(mix(seed, len(dataset)))
    rows = np.arange(len(dataset))
    if dataset.fetcher is not None and len(dataset.shards) > REMOTE_SHARDS:
        shards = draw.choice(len(dataset.shards), REMOTE_SHARDS, replace=False)
        rows = np.flatnonzero(np.isin(dataset.rows["shard"], shards))
    return np.sort(draw.choice(rows, min(number, len(rows)), replace=False))
