"""Each sabotage turns exactly the intended check red, on three data sets; sound runs of the three have no red check.

By default every sabotage is tried on one data set; `pytest -m slow` tries the rest of the matrix, and other seeds.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import Config, DatasetConfig
from pipeline.data.dataset import Batch, ShardDataset
from pipeline.data.writer import write_dataset
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest, ImageStats, Index, IndexEntry, load_dataset, open_index
from pipeline.models.normalize import Normalize
from pipeline.preprocess import PRESETS, build_spec
from pipeline.recipe.gate import CHECKS, GROUNDS, examine
from pipeline.recipe.verdict import Subject
from tests.unit.data.given import Given, GivenImages
from tests.unit.recipe.given import SOURCES, make_run


@dataclass(frozen=True)
class Spoilt(Subject):
    """A run whose every network is changed after it was made, or whose augmentation is another."""

    spoil: list[Callable[[nn.Sequential], None]] = field(default_factory=list)
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None

    def build_network(self, seed: int) -> nn.Sequential:
        network = super().build_network(seed)
        for change in self.spoil:
            change(network)
        return network

    def first_batch(self, *, augmented: bool, size: int | None = None) -> Batch:
        batch = super().first_batch(augmented=augmented, size=size)
        if augmented and self.augment is not None:
            batch["image"] = self.augment(batch["image"])
        return batch


Run = tuple[Config, DatasetManifest]


def subject_of(config: Config, manifest: DatasetManifest) -> Spoilt:
    return Spoilt(config, manifest, build_spec(config.preprocess, manifest.image_stats), torch.device("cpu"))


# ---- sabotage of the data: a data set of its own in `folder` ----


def shuffled_labels(run: Run, folder: Path) -> Spoilt:
    """The images of each split with the labels of that split in another order, in index and shards alike."""
    config, manifest = run
    given = []
    for split in manifest.splits:
        dataset = ShardDataset(manifest, split, subject_of(*run).spec)
        labels = np.random.default_rng(3).permutation(dataset.rows["label"])
        given += [
            Given(f"{split}/{number:05d}.jpg", (int(label),), split, dataset.encoded(number))
            for number, label in enumerate(labels)
        ]
    dataset_config = DatasetConfig(source="given", samples_per_shard=200)
    return subject_of(config, write_dataset(GivenImages(given, manifest.class_names), dataset_config, folder / "given"))


def change_index(run: Run, folder: Path, split: str, change: Callable[[Index], Index]) -> DatasetManifest:
    """A copy of the data set with other rows in the index of a split."""
    copied = load_dataset(shutil.copytree(run[1].folder, folder / "copy"))
    rows = change(np.array(open_index(copied, split)))
    path = copied.folder / copied.split(split).index.name
    np.save(path, rows)
    entry = dataclasses.replace(
        copied.split(split),
        index=IndexEntry(path.name, sha256_of(path)),
        class_counts=np.bincount(rows["label"], minlength=len(copied.class_names)).tolist(),
    )
    return dataclasses.replace(copied, splits={**copied.splits, split: entry}).save()


def misaligned_labels(run: Run, folder: Path) -> Spoilt:
    """Every image has the label of the one before it."""

    def roll(rows: Index) -> Index:
        rows["label"] = np.roll(rows["label"], 1)
        return rows

    return subject_of(run[0], change_index(run, folder, "train", roll))


def labels_off_by_one(run: Run, folder: Path) -> Spoilt:
    """Classes counted from 1: consistent, so that only the shards can tell."""

    def shift(rows: Index) -> Index:
        rows["label"] = (rows["label"] + 1) % len(run[1].class_names)
        return rows

    return subject_of(run[0], change_index(run, folder, "train", shift))


def leaked_split(run: Run, folder: Path) -> Spoilt:
    """The images of the validation split are a few of the training split's."""
    copied = load_dataset(shutil.copytree(run[1].folder, folder / "copy"))
    train, val = copied.split("train"), copied.split("val")
    leaked = np.array(open_index(copied, "train"))
    leaked = leaked[leaked["shard"] == 0]
    leaked["shard"] = len(val.shards)
    path = copied.folder / val.index.name
    np.save(path, np.concatenate([open_index(copied, "val"), leaked]))
    counts = np.array(val.class_counts) + np.bincount(leaked["label"], minlength=len(copied.class_names))
    shutil.copy(copied.folder / train.shards[0].name, copied.folder / "val-leaked.tar")
    shard = dataclasses.replace(train.shards[0], name="val-leaked.tar")
    entry = dataclasses.replace(
        val, shards=[*val.shards, shard], index=IndexEntry(path.name, sha256_of(path)), class_counts=counts.tolist()
    )
    return subject_of(run[0], dataclasses.replace(copied, splits={**copied.splits, "val": entry}).save())


def statistics_of_other_data(run: Run, folder: Path) -> Spoilt:
    """The manifest has the mean and deviation of MNIST."""
    stats = ImageStats("train", [0.1307] * 3, [0.3081] * 3)
    return subject_of(run[0], dataclasses.replace(run[1], image_stats=stats))


def random_augmentation(run: Run, folder: Path) -> Spoilt:
    """Noise that no seed rules."""

    def noise(images: torch.Tensor) -> torch.Tensor:
        return images ^ (os.urandom(1)[0] & 15)

    return dataclasses.replace(subject_of(*run), augment=noise)


# ---- sabotage of the network ----


class Raw(nn.Module):
    """Pixels of 0 to 255, as they are."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float()


def wrong_mean_and_std(network: nn.Sequential) -> None:
    normalize = network[0]
    assert isinstance(normalize, Normalize)
    for buffer, values in zip((normalize.mean, normalize.std), PRESETS["imagenet"], strict=True):
        buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))


def unnormalised_input(network: nn.Sequential) -> None:
    network[0] = Raw()


def frozen_head(network: nn.Sequential) -> None:
    *_, (_, head) = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    head.requires_grad_(False)


def dead_layer(network: nn.Sequential) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    nn.init.constant_(norms[1].bias, -100.0)


def batch_mixing(network: nn.Sequential) -> None:
    features = network.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    place, norm = next((n, module) for n, module in enumerate(features) if isinstance(module, nn.BatchNorm2d))
    features[place] = nn.BatchNorm2d(norm.num_features, track_running_stats=False)


def softmax_before_the_loss(network: nn.Sequential) -> None:
    network.append(nn.Softmax(dim=1))


OF_THE_DATA: dict[str, tuple[Callable[[Run, Path], Spoilt], str]] = {
    "shuffled labels": (shuffled_labels, "labels"),
    "misaligned labels": (misaligned_labels, "labels"),
    "labels off by one": (labels_off_by_one, "labels"),
    "statistics of other data": (statistics_of_other_data, "pixels"),
    "leaked split": (leaked_split, "leakage"),
    "random augmentation": (random_augmentation, "seed"),
}
OF_THE_NETWORK: dict[str, tuple[Callable[[nn.Sequential], None], str]] = {
    "wrong mean and std": (wrong_mean_and_std, "pixels"),
    "unnormalised input": (unnormalised_input, "pixels"),
    "frozen head": (frozen_head, "gradients"),
    "dead layer": (dead_layer, "gradients"),
    "batch-mixing code": (batch_mixing, "gradients"),
    "softmax before the loss": (softmax_before_the_loss, "overfit"),
}
INTENDED = {name: check for name, (_, check) in [*OF_THE_DATA.items(), *OF_THE_NETWORK.items()]}
# One data set for each sabotage; the softmax keeps `overfit` busy for all its steps, which small images make cheap.
COVERING = {(sabotage, ("shapes", "tiles")[number % 2]) for number, sabotage in enumerate(INTENDED)}
COVERING = COVERING - {("softmax before the loss", "tiles")} | {("softmax before the loss", "digits")}
MATRIX = [
    pytest.param(sabotage, data, marks=[] if (sabotage, data) in COVERING else pytest.mark.slow, id=f"{sabotage} on {data}")
    for sabotage in INTENDED
    for data in SOURCES
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A function that gives the sound run on a data set, which is made once."""
    made: dict[str, Run] = {}

    def give(name: str) -> Run:
        if name not in made:
            made[name] = make_run(name, tmp_path_factory.mktemp(name))
        return made[name]

    return give


def red_checks(subject: Subject) -> tuple[list[str], str]:
    """Which checks are red, and what each one said. The others must be green, or skipped because of a red one."""
    verdicts = [entry.verdict for entry in examine(subject, {})]
    red = [verdict.check for verdict in verdicts if verdict.verdict == "red"]
    for verdict in verdicts:
        unneeded = verdict.check == "pretrained" or set(GROUNDS.get(verdict.check, ())) & set(red)
        assert verdict.verdict != "skipped" or unneeded, verdict
    return red, "\n".join(f"{verdict.verdict} {verdict.check}: {verdict.why}" for verdict in verdicts)


@pytest.mark.parametrize(("sabotage", "data"), MATRIX)
def test_a_sabotage_turns_exactly_the_intended_check_red(
    sabotage: str, data: str, runs: Callable[[str], Run], tmp_path: Path
) -> None:
    if sabotage in OF_THE_DATA:
        subject = OF_THE_DATA[sabotage][0](runs(data), tmp_path)
    else:
        subject = dataclasses.replace(subject_of(*runs(data)), spoil=[OF_THE_NETWORK[sabotage][0]])
    red, said = red_checks(subject)
    assert red == [INTENDED[sabotage]], said


@pytest.mark.parametrize("seed", [1999, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5))])
@pytest.mark.parametrize("data", SOURCES)
def test_a_sound_run_has_no_red_check(data: str, seed: int, runs: Callable[[str], Run]) -> None:
    config, manifest = runs(data)
    red, said = red_checks(subject_of(dataclasses.replace(config, seed=seed), manifest))
    assert not red, said


def test_every_check_of_the_gate_is_some_sabotage_s_aim() -> None:
    # zero_input and init_loss have faults of their own, tried beside them; pretrained needs weights.
    assert set(CHECKS) - set(INTENDED.values()) == {"init_loss", "zero_input", "pretrained"}
