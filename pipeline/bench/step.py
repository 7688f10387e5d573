"""What our metrics, curves and callbacks add to a training step, beside a bare Lightning Trainer and a plain loop.

Measured is the CPU time of the thread that trains, on one thread: where two take part, the one that waits spins. A contender's
turn is the least of WINDOW steps in a row, one of which writes the points of the curves, and its figure the least of its turns:
a busy machine only ever adds.

All contenders train the same tiny network on the same batch, which lies ready in memory. They take turns in one process, so
that a machine that is busy with something else for a while slows all of them alike. The bare Trainer has no logger, no bar
and no callback; ours has all of it and writes its curves down, but the process that delivers them to MLflow is not
started: it would slow down the turns of ours alone.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn import functional

from pipeline.bench.measure import Figures
from pipeline.bench.results import Target
from pipeline.config import Config, DataConfig, ModelConfig, PreprocessConfig, TrainerConfig
from pipeline.console import say
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.order import SampleRef
from pipeline.data.writer import prepare_dataset
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import network_for
from pipeline.preprocess import PreprocessSpec
from pipeline.pretraining import spec_for
from pipeline.run import open_run
from pipeline.task import task_of
from pipeline.tracking.run import RunTracker
from pipeline.tracking.server import server_of
from pipeline.training.checkpoint import identity_of
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.classifier import Classifier
from pipeline.training.fit import build_callbacks, build_trainer, training_options
from pipeline.training.optim import build_optimizer

WARM_UP_STEPS = 50
WINDOW = TrainerConfig().log_every_steps
MOST_ADDED = 100.0  # us of CPU a step


class Steps:
    """The same batch again and again; a clock is read at each."""

    def __init__(self, batch: Batch, num_steps: int) -> None:
        self.batch, self.num_steps = batch, num_steps
        self.read: list[float] = []  # seconds of CPU at the start of each step

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.num_steps):
            self.read.append(time.thread_time())
            yield self.batch

    def __len__(self) -> int:
        return self.num_steps

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint says of a loader."""
        return {"epoch": 0, "batch": self.num_steps}

    @property
    def microseconds(self) -> float:
        """CPU time of a step: the least of all windows."""
        read = self.read[WARM_UP_STEPS:]
        return 1e6 * min(end - begin for begin, end in zip(read, read[WINDOW:], strict=False)) / WINDOW


class Bare(L.LightningModule):
    """What a tutorial writes: forward, loss, optimizer."""

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__()
        self.network, self.config = network, config

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        return functional.cross_entropy(self.network(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the others."""
        return build_optimizer(self.network, self.config.optimizer)


@dataclass(frozen=True)
class Material:
    """What every contender trains: a tiny network on 16 x 16 digits."""

    config: Config
    manifest: DatasetManifest
    spec: PreprocessSpec

    def network(self) -> nn.Sequential:
        """The network, the same each time."""
        torch.manual_seed(self.config.seed)
        return network_for(self.config, self.manifest, self.spec)

    def batch(self) -> Batch:
        """The first samples of the training split."""
        dataset = ShardDataset(self.manifest, "train", self.spec)
        return dataset.__getitems__([SampleRef(index, 0, 1.0) for index in range(self.config.data.global_batch_size)])


def step_costs(folder: Path, num_steps: int, rounds: int) -> dict[str, Figures]:
    """Microseconds of CPU that a step takes, by contender: the least and the most of `rounds` turns, the least compared.

    Data set and runs stay in `folder`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # Lightning would set torch's own number anew
    torch.set_num_threads(1)
    config = Config(
        runs_dir=str(folder / "runs"),
        preprocess=PreprocessConfig(resize=[16, 16]),
        data=DataConfig(global_batch_size=8),
        model=ModelConfig(channels=[8], dropout=0.0),
        trainer=TrainerConfig(max_epochs=1),
    )
    manifest, _ = prepare_dataset(config.dataset, folder / "digits")
    material = Material(config, manifest, spec_for(config, manifest))
    contenders = {"plain loop": _train_plainly, "bare Trainer": _train_bare, "shardline train": _train_as_ours}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        say(f"{num_steps:,} steps of each: {number + 1}/{rounds}")
        for name, train in contenders.items():
            steps = Steps(material.batch(), num_steps)
            train(material, steps)
            found[name].append(steps.microseconds)
    bare = min(found["bare Trainer"])
    return {
        name: {"us a step": min(turns), "most": max(turns), "above bare": min(turns) - bare} for name, turns in found.items()
    }


def judge(costs: dict[str, Figures]) -> Target:
    """Whether ours adds no more to a bare Trainer than it may."""
    added = costs["shardline train"]["above bare"]
    return Target("us of CPU that a step adds to a bare Trainer", added, f"at most {MOST_ADDED:g}", added <= MOST_ADDED)


def _train_plainly(material: Material, steps: Steps) -> None:
    network = material.network()
    optimizer = build_optimizer(network, material.config.optimizer)
    for batch in steps:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(batch["image"]), batch["label"])
        torch.autograd.backward(loss)
        optimizer.step()


def _train_bare(material: Material, steps: Steps) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Bare(material.network(), material.config), train_dataloaders=steps)


def _train_as_ours(material: Material, steps: Steps) -> None:
    config = replace(material.config, name=f"run-{time.time_ns()}")
    record, _ = open_run(config, material.manifest)
    tracker = RunTracker(config.run_dir, server_of(config))
    writer = CheckpointWriter(config, material.manifest, identity_of(record), config.run_dir)
    callbacks = build_callbacks(config, material.manifest, material.spec, writer, tracker)
    module = Classifier(material.network(), config, task_of(material.manifest, config), total_steps=len(steps))
    trainer = build_trainer(config, callbacks, **training_options(config), limit_val_batches=0)
    trainer.fit(module, train_dataloaders=steps)
    tracker.finish()
