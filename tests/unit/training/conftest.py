"""A training in this process: Lightning on the CPU, 36 images, the pipeline's own loaders and module."""

import dataclasses
import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.order import steps_per_epoch
from pipeline.data.pixel_changes import build_pixel_changes
from pipeline.distributed import STOP_SIGNALS
from pipeline.manifest import DatasetManifest
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec, build_spec
from pipeline.run import RunRecord
from pipeline.task import task_of
from pipeline.tracking.run import RunTracker, Status
from pipeline.training.checkpoint_writer import DurableCheckpointIO
from pipeline.training.classifier import Classifier
from pipeline.training.fit import prepare_network, training_options

Fit = Callable[..., Classifier]


class Listener(RunTracker):
    """Keeps what it is told instead of writing it down."""

    def __init__(self) -> None:
        self.curves: list[tuple[int, dict[str, float]]] = []
        self.figures: dict[str, float] = {}
        self.tags: dict[str, str] = {}
        self.kept: list[str] = []  # FOLDER/NAME of each file
        self.images: dict[tuple[str, int], Image.Image] = {}  # by key and step
        self.tables: dict[str, dict[str, list[Any]]] = {}
        self.num_flushed = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.curves.append((step, metrics))

    def log_final(self, metrics: dict[str, float]) -> None:
        self.figures |= metrics

    def set_tags(self, tags: dict[str, str]) -> None:
        self.tags |= tags

    def log_file(self, path: Path, folder: str = "") -> None:
        self.kept.append(f"{folder}/{path.name}" if folder else path.name)

    def log_image(self, key: str, png: bytes, step: int) -> None:
        assert (key, step) not in self.images, "MLflow shows each (key, step) once"
        self.images[key, step] = Image.open(io.BytesIO(png), formats=["PNG"])
        self.images[key, step].load()

    def log_table(self, name: str, columns: dict[str, list[Any]], images: list[str]) -> None:
        assert images == ["image"]
        self.tables[name] = columns

    def flush(self) -> None:
        self.num_flushed = len(self.curves)

    def finish(self, status: Status | None = "FINISHED") -> None:
        pass


def change(config: Config, section: str, **values: Any) -> Config:
    """The configuration with some settings of one section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.fixture
def spec(tiny_config: Config, tiny_dataset: DatasetManifest) -> PreprocessSpec:
    """The preprocessing of the tiny run."""
    return build_spec(tiny_config.preprocess, tiny_dataset.image_stats)


@pytest.fixture
def record(tiny_config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec) -> RunRecord:
    """The tiny run's record, not written to disk."""
    mlflow: dict[str, str | None] = {"uri": None, "experiment": None, "run_id": "e" * 32}
    identity = (tiny_config.identity(), tiny_dataset.digest, spec.hash())
    return RunRecord("tiny", "a" * 32, *identity, git={}, mlflow=mlflow, folder=tiny_config.run_dir)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Whatever handlers a training installs are gone after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_classifier(tiny_dataset: DatasetManifest, spec: PreprocessSpec) -> Callable[..., Classifier]:
    """A function that gives the module of a configuration, its weights drawn from the seed."""

    def make(config: Config, manifest: DatasetManifest = tiny_dataset) -> Classifier:
        L.seed_everything(config.seed, verbose=False)
        task = task_of(manifest, config)
        network = build_network(config.model, task.num_outputs, spec)
        assert spec.fixed_size is not None
        prepare_network(network, config, spec.fixed_size)
        steps = steps_per_epoch(
            manifest.split("train").num_samples, config.data.global_batch_size, drop_last=config.data.drop_last
        )
        return Classifier(
            network, config, task, steps * config.trainer.max_epochs, build_pixel_changes(config.data.augment, spec)
        )

    return make


@pytest.fixture
def fit(
    tiny_dataset: DatasetManifest, spec: PreprocessSpec, make_classifier: Callable[..., Classifier], own_signals: None
) -> Fit:
    """A function that trains a configuration with some callbacks, from a checkpoint and on another data set if given."""

    def train(
        config: Config, *callbacks: L.Callback, resume: Path | None = None, manifest: DatasetManifest = tiny_dataset
    ) -> Classifier:
        module = make_classifier(config, manifest)
        data = ShardDataModule(manifest, spec, config.data, config.seed)
        make_trainer(config, *callbacks).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module

    return train


def make_trainer(config: Config, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """As `fit.build_trainer` makes it, but for one process without DDP."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=config.trainer.precision,
        plugins=[DurableCheckpointIO()],
        callbacks=list(callbacks),
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=config.run_dir,
        **training_options(config),
        **options,
    )


def weights_of(module: Classifier) -> torch.Tensor:
    """Every weight and running statistic in one row."""
    return torch.cat([tensor.detach().double().flatten() for tensor in module.network.state_dict().values()])
