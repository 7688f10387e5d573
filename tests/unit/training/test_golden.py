"""The Trainer against a loop of a few lines: the same losses, bit for bit, and on every machine about the same numbers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import AugmentConfig, Config
from pipeline.data.augment import build_augmentation
from pipeline.data.dataset import ShardDataset
from pipeline.data.order import GlobalBatchSampler, mix
from pipeline.data.pixel_changes import PixelChanges
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec
from pipeline.run import RunRecord
from pipeline.training.checkpoint import identity_of
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.fit import build_callbacks
from tests.unit.training.conftest import Fit, change, weights_of

NUM_EPOCHS, STEPS_PER_EPOCH = 3, 4
# Loss of each step. Other processors sum in another order, and 12 steps with momentum make more of the last bits of float32.
GOLDEN = [1.10438, 1.08957, 1.07477, 0.96334, 0.81799, 0.61895, 0.75433, 0.41872, 0.4093, 0.43573, 0.34051, 0.28698]
TOLERANCE = 2e-3


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Batches of eight, with every source of randomness: order, augmentation and dropout."""
    config = change(tiny_config, "data", augment=AugmentConfig(horizontal_flip=0.5, translate=0.1))
    config = change(config, "optimizer", lr=0.05, args={"momentum": 0.9, "weight_decay": 0.01})
    config = change(config, "scheduler", name="OneCycleLR", args={"max_lr": 0.05})
    return change(config, "trainer", max_epochs=NUM_EPOCHS)


class Losses(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"]))


def plain_loop(config: Config, manifest: DatasetManifest, spec: PreprocessSpec) -> tuple[list[float], nn.Sequential]:
    """Forward, cross-entropy, backward, SGD: what a tutorial writes, on the same samples in the same order."""
    torch.manual_seed(config.seed)
    network = build_network(config.model, 3, spec)
    weights = [each for each in network.parameters() if each.ndim > 1]
    others = [each for each in network.parameters() if each.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=NUM_EPOCHS * STEPS_PER_EPOCH)
    dataset = ShardDataset(manifest, "train", spec, build_augmentation(config.data.augment, spec), config.seed, config.data)
    changes = PixelChanges(config.data.augment, spec)
    sampler = GlobalBatchSampler.of_training(dataset.shards, config.data, config.seed)
    losses: list[float] = []
    for sampler.epoch in range(NUM_EPOCHS):
        for samples in sampler:
            batch = dataset.__getitems__(samples)
            images = changes(batch["image"], batch["seed"])
            torch.manual_seed(mix(config.seed, len(losses), 0))
            optimizer.zero_grad()
            each = functional.cross_entropy(network(images), batch["label"], reduction="none")  # (n,)
            loss = torch.dot(each, torch.ones(len(samples)) / len(samples))
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses, network


def test_the_trainer_is_a_plain_loop_with_more_around_it(
    config: Config, fit: Fit, tiny_dataset: DatasetManifest, spec: PreprocessSpec, record: RunRecord, tmp_path: Path
) -> None:
    losses, writer = Losses(), CheckpointWriter(config, tiny_dataset, identity_of(record), config.run_dir)
    module = fit(config, *build_callbacks(config, tiny_dataset, spec, writer, tracker=None), losses)
    expected, network = plain_loop(config, tiny_dataset, spec)
    assert losses.values == expected
    trained = torch.cat([tensor.detach().double().flatten() for tensor in network.state_dict().values()])
    assert torch.equal(weights_of(module), trained)
    assert losses.values == pytest.approx(GOLDEN, rel=TOLERANCE)
