"""Replay against a real training: what it computes again is what went into the network."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import AugmentConfig, Config, DatasetConfig, PreprocessConfig
from pipeline.data.datamodule import ShardDataModule
from pipeline.data.replay import TILES_ON_A_SHEET, draw_step, replay_step
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.errors import ConfigError
from pipeline.manifest import DatasetManifest, open_labels
from pipeline.preprocess import PreprocessSpec, build_spec
from pipeline.training.classifier import Classifier
from tests.unit.data.test_dataset import damage
from tests.unit.training.conftest import Fit, change

EVERYTHING = AugmentConfig(crop_scale=0.3, horizontal_flip=0.5, policy="trivialaugment", mixup=0.4, cutmix=1.0)


class Watch(L.Callback):
    """Keeps what enters the network in each step of training."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Classifier)
        module.network.register_forward_pre_hook(self._keep)

    def _keep(self, network: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if network.training:
            self.seen.append(inputs[0].clone())


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Two epochs of five steps, the last of each padded, with every random change."""
    return change(change(tiny_config, "data", drop_last=False, augment=EVERYTHING), "trainer", max_epochs=2)


def test_every_step_of_a_training_is_shown_as_the_network_saw_it(
    config: Config, fit: Fit, copied_dataset: DatasetManifest, spec: PreprocessSpec
) -> None:
    damage(copied_dataset, 7)
    watch = Watch()
    fit(config, watch, manifest=copied_dataset)
    assert len(watch.seen) == 10
    notes = []
    for step, seen in enumerate(watch.seen, start=1):
        replayed = replay_step(config, copied_dataset, spec, step)
        assert torch.equal(replayed.images, seen)
        assert (replayed.epoch, replayed.batch) == divmod(step - 1, 5)
        notes += [sample.note for sample in replayed.samples]
    assert notes.count("padding") == 8 and notes.count("no longer decodes") == 2
    assert sum("rest" in note for note in notes) > 40


def test_jpegs_are_shown_as_the_loader_decodes_them(config: Config, tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=90, subsampling=2)
    source = DatasetConfig(source=str(tmp_path / "source"), val_fraction=0.2, test_fraction=0.2)
    manifest = write_dataset(open_source(source), source, tmp_path / "shards")
    config = change(config, "data", augment=AugmentConfig(crop_scale=0.3, horizontal_flip=0.5), global_batch_size=4)
    spec = build_spec(PreprocessConfig(resize=[16, 16]), manifest.image_stats)
    loader = ShardDataModule(manifest, spec, config.data, config.seed).train_dataloader()
    for step, batch in enumerate(loader, start=1):
        assert torch.equal(replay_step(config, manifest, spec, step).images, batch["image"])


def test_a_sample_is_named_with_its_shard_and_label(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec
) -> None:
    samples = [sample for step in range(1, 6) for sample in replay_step(config, tiny_dataset, spec, step).samples]
    assert {sample.index for sample in samples} == set(range(36))
    for sample in samples:
        assert sample.key.startswith(f"{sample.index:08d}-")
        assert sample.shard == f"train-{sample.index // 5:06d}.tar"
        assert sample.label in tiny_dataset.class_names


@pytest.mark.parametrize("step", [0, 11, -1])
def test_a_step_that_the_run_does_not_have_is_refused(
    step: int, config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec
) -> None:
    with pytest.raises(ConfigError, match=f"--step is {step}; this run has the steps 1 to 10"):
        replay_step(config, tiny_dataset, spec, step)


def test_the_picture_holds_every_pixel_and_a_large_batch_several_sheets(
    config: Config, tiny_dataset: DatasetManifest, spec: PreprocessSpec, tmp_path: Path
) -> None:
    replayed = replay_step(config, tiny_dataset, spec, 2)
    (path,) = draw_step(replayed, tmp_path)
    assert path == tmp_path / "replay/step-00000002.png"
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGB"))
    first = picture[2 : 2 + 96 : 6, 2 : 2 + 96 : 6]  # 16 pixels, each six wide
    assert np.array_equal(first, replayed.images[0].permute(1, 2, 0).numpy())
    wide = replay_step(change(config, "data", global_batch_size=100), tiny_dataset, spec, 1)
    assert len(wide.images) > TILES_ON_A_SHEET
    assert [path.name for path in draw_step(wide, tmp_path)] == ["step-00000001-1.png", "step-00000001-2.png"]


def test_several_labels_of_a_replayed_sample_are_named(
    tiny_config: Config, multi_dataset: DatasetManifest, spec: PreprocessSpec
) -> None:
    labels = open_labels(multi_dataset, "train")
    config = change(tiny_config, "data", augment=AugmentConfig(mixup=0.4))
    replayed = replay_step(config, multi_dataset, spec, 2)
    names = np.array(multi_dataset.class_names)
    for sample in replayed.samples:
        assert sample.label == "|".join(names[labels[sample.index] > 0])
    assert replayed.samples[0].note.endswith(f"rest {replayed.samples[1].label}")
