"""A source, a data set and a configuration small enough for milliseconds. The first two are shared: copy before changing."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config import Config, DataConfig, DatasetConfig, ModelConfig, PreprocessConfig
from pipeline.data.sources import open_source
from pipeline.data.writer import write_dataset
from pipeline.export.graph import export_graph
from pipeline.manifest import DatasetManifest, load_dataset
from pipeline.models.sequential import build_network
from pipeline.preprocess import PreprocessSpec, build_spec
from pipeline.task import Task

COLOURS = {"blue": (30, 40, 210), "green": (30, 200, 50), "red": (220, 40, 30)}
IMAGES_PER_CLASS = 20
SIDE = 16
# Of each class 12 images train, 4 validate and 4 test: shards of 5, 5, 5, 5, 5, 5, 5, 1 and twice 5, 5, 2.
TINY_SPLIT = DatasetConfig(val_fraction=0.2, test_fraction=0.2, samples_per_shard=5)

# The tasks of the tiny data set, and of that with several labels.
THREE_CLASSES = Task("single", (1 / 3, 1 / 3, 1 / 3))
THREE_LABELS = Task("multi", (1 / 2, 1 / 2, 1 / 2))

ImageFolder = Callable[[Path, dict[str, int]], Path]


def make_images(folder: Path, num_images: dict[str, int]) -> Path:
    """Write FOLDER/CLASS/NN.png: one colour a class, one pattern an image."""
    for class_number, (name, count) in enumerate(num_images.items()):
        (folder / name).mkdir(parents=True)
        colour = COLOURS.get(name, (90, 90, 90))
        for number in range(count):
            noise = np.random.default_rng(1000 * class_number + number).integers(-25, 26, (SIDE, SIDE, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)  # (H, W, 3)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def image_folder() -> ImageFolder:
    """A function that writes a folder of images, given how many of each class."""
    return make_images


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SOURCE/CLASS/NN.png: 3 classes of 20 images of 16 x 16 pixels. Read-only."""
    return make_images(tmp_path_factory.mktemp("source"), dict.fromkeys(COLOURS, IMAGES_PER_CLASS))


@pytest.fixture(scope="session")
def tiny_dataset(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    """Shards of `tiny_source`: 36 samples in train, 12 in val, 12 in test, at most 5 in a shard. Read-only."""
    config = dataclasses.replace(TINY_SPLIT, source=str(tiny_source))
    return write_dataset(open_source(config), config, tmp_path_factory.mktemp("dataset") / "tiny")


@pytest.fixture(scope="session")
def multi_dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    """40 images of 16 x 16 pixels with every set of the labels blue, green and red, each a stripe of its colour. Read-only."""
    folder = tmp_path_factory.mktemp("multi")
    lines = ["path,label"]
    for number in range(40):
        shown = [name for place, name in enumerate(COLOURS) if number % 8 >> place & 1]
        pixels = np.random.default_rng(number).integers(80, 120, (SIDE, SIDE, 3)).astype(np.uint8)  # (H, W, 3)
        for name in shown:
            place = 5 * list(COLOURS).index(name)
            pixels[:, place : place + 5] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{'|'.join(shown)}")
    (folder / "table.csv").write_text("\n".join(lines))
    config = dataclasses.replace(TINY_SPLIT, source=str(folder / "table.csv"))
    return write_dataset(open_source(config), config, folder / "shards")


@pytest.fixture
def copied_dataset(tiny_dataset: DatasetManifest, tmp_path: Path) -> DatasetManifest:
    """A copy of `tiny_dataset` that a test may damage."""
    return load_dataset(shutil.copytree(tiny_dataset.folder, tmp_path / "copied"))


@pytest.fixture
def tiny_config(tiny_source: Path, tiny_dataset: DatasetManifest, tmp_path: Path) -> Config:
    """A run on `tiny_dataset` with a network of two small stages; its run folder lies in `tmp_path`."""
    return Config(
        name="tiny",
        runs_dir=str(tmp_path / "runs"),
        dataset=dataclasses.replace(TINY_SPLIT, source=str(tiny_source), path=str(tiny_dataset.folder)),
        preprocess=PreprocessConfig(resize=[SIDE, SIDE]),
        data=DataConfig(global_batch_size=8),
        model=ModelConfig(channels=[8, 16]),
    )


@pytest.fixture(scope="session")
def tiny_spec(tiny_dataset: DatasetManifest) -> PreprocessSpec:
    """The preprocessing of `tiny_config` on `tiny_dataset`."""
    return build_spec(PreprocessConfig(resize=[SIDE, SIDE]), tiny_dataset.image_stats)


@pytest.fixture(scope="session")
def tiny_network(tiny_spec: PreprocessSpec) -> nn.Sequential:
    """A network of `tiny_config` that looks trained: large last layer, running statistics of its own. Read-only."""
    torch.manual_seed(7)
    network = build_network(ModelConfig(channels=[8, 16], dropout=0.5), 3, tiny_spec)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return network.eval()


@pytest.fixture(scope="session")
def exported_model(tiny_network: nn.Sequential, tiny_spec: PreprocessSpec) -> onnx.ModelProto:
    """`tiny_network` as an ONNX model, exported once (3 seconds) from training mode. Copy before changing."""
    return _export(tiny_network, tiny_spec, THREE_CLASSES)


@pytest.fixture(scope="session")
def multi_model(tiny_network: nn.Sequential, tiny_spec: PreprocessSpec) -> onnx.ModelProto:
    """`tiny_network` as if it had learned three labels an image. Copy before changing."""
    return _export(tiny_network, tiny_spec, THREE_LABELS)


def _export(network: nn.Sequential, spec: PreprocessSpec, task: Task) -> onnx.ModelProto:
    network.train()
    metadata: dict[str, object] = {
        "format_version": 1,
        "class_names": list(COLOURS),
        "task": task.kind,
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "data_digest": "d" * 64,
        "job_id": "a" * 32,
        "versions": {"torch": torch.__version__},
    }
    model = export_graph(network, task, spec, 20, metadata)
    network.eval()
    return model
