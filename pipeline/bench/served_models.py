"""What servers are measured with: digits with a network of a fraction of a millisecond, and photographs with one of many."""

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.bench.images import make_images
from pipeline.config import ExportConfig, ModelConfig, PreprocessConfig
from pipeline.export.graph import export_graph
from pipeline.files import write_bytes
from pipeline.manifest import FORMAT_VERSION, ImageStats
from pipeline.models.sequential import build_network
from pipeline.preprocess import build_spec
from pipeline.task import Task

NUM_IMAGES = 64
NUM_CLASSES = 10
SIDE_OF_DIGITS = 28  # pixels, as MNIST has them


@dataclass(frozen=True)
class Case:
    """A model, the images that it is asked about, and how."""

    model: Path
    images: list[Path]
    clients: tuple[int, ...]
    seconds: float  # of each measurement


def digits(folder: Path) -> Case:
    """The network of configs/digits.yaml, and digits as JPEGs of less than a kilobyte."""
    from sklearn.datasets import load_digits

    images = []
    for number, levels in enumerate(load_digits().images[:NUM_IMAGES]):  # (8, 8), 0 to 16
        picture = Image.fromarray((levels * 15).astype("uint8")).resize((SIDE_OF_DIGITS, SIDE_OF_DIGITS))
        content = io.BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=90)
        images.append(folder / "images" / f"{number:03d}.jpg")
        write_bytes(images[-1], content.getvalue())
    model = _make_model(folder, ModelConfig(channels=[32, 64, 128], convs_per_stage=2), side=16)
    return Case(model, images, clients=(1, 16, 64), seconds=3.0)


def photos(folder: Path) -> Case:
    """ResNet-18 at 224 x 224 pixels, and photographs of 500 x 375, 71 KB each: 64 clients would wait for seconds."""
    images = sorted(make_images(folder / "images", NUM_IMAGES).rglob("*.jpg"))
    return Case(_make_model(folder, ModelConfig(name="resnet18"), side=224), images, clients=(1, 16), seconds=10.0)


CASES: dict[str, Callable[[Path], Case]] = {"digits": digits, "photos": photos}


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
    model = export_graph(network, Task("single", shares), spec, ExportConfig().opset, metadata)
    path = folder / "model.onnx"
    write_bytes(path, model.SerializeToString(deterministic=True))
    return path
