"""What servers are measured with: digits with a network of a fraction of a millisecond, and photographs with one of many."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from pipeline.bench.images import make_images
from pipeline.config import ModelConfig, PreprocessConfig
from pipeline.export.graph import export_graph
from pipeline.files import write_bytes
from pipeline.manifest import FORMAT_VERSION, ImageStats
from pipeline.models.sequential import build_network
from pipeline.preprocess import build_spec
from pipeline.task import Task

NUM_IMAGES = 64
NUM_CLASSES = 10
OPSET = 20
SIDE_OF_DIGITS = 28  # pixels, as MNIST has them


def digits(folder: Path) -> tuple[Path, list[Path]]:
    """The network of configs/digits.yaml, and digits as JPEGs of less than a kilobyte."""
    from sklearn.datasets import load_digits

    images = []
    for number, levels in enumerate(load_digits().images[:NUM_IMAGES]):  # (8, 8), 0 to 16
        picture = Image.fromarray((levels * 15).astype("uint8")).resize((SIDE_OF_DIGITS, SIDE_OF_DIGITS))
        content = io.BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=90)
        images.append(folder / "images" / f"{number:03d}.jpg")
        write_bytes(images[-1], content.getvalue())
    return _make_model(folder, ModelConfig(channels=[32, 64, 128], convs_per_stage=2), side=16), images


def photos(folder: Path) -> tuple[Path, list[Path]]:
    """ResNet-18 at 224 x 224 pixels, and photographs of 500 x 375, 71 KB each."""
    images = sorted(make_images(folder / "images", NUM_IMAGES).rglob("*.jpg"))
    return _make_model(folder, ModelConfig(name="resnet18"), side=224), images


SERVED: dict[str, Callable[[Path], tuple[Path, list[Path]]]] = {"digits": digits, "photos": photos}


def _make_model(folder: Path, config: ModelConfig, side: int) -> Path:
    """Export a network with random weights, which costs what a trained one does."""
    spec = build_spec(PreprocessConfig(resize=[side, side]), ImageStats("train", [0.5] * 3, [0.25] * 3))
    torch.manual_seed(0)
    network = build_network(config, NUM_CLASSES, spec, pretrained=False)
    metadata: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "class_names": [f"class-{number}" for number in range(NUM_CLASSES)],
        "task": "single",
        "preprocess": dataclasses.asdict(spec),
        "preprocess_hash": spec.hash(),
        "versions": {"torch": torch.__version__},
    }
    shares = (1 / NUM_CLASSES,) * NUM_CLASSES
    model = export_graph(network, Task("single", shares), spec, OPSET, metadata)
    path = folder / "model.onnx"
    write_bytes(path, model.SerializeToString(deterministic=True))
    return path
