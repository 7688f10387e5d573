"""Loaders to measure: each yields uint8 batches of random 224 px crops, half of them mirrored, from two worker processes.

Each is written as its own documentation shows it, with the cheapest settings that do the same work.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

BATCH_SIZE = 64
SIZE = 224
START_METHOD: Literal["fork"] = "fork"  # its processes are our children, so their CPU time can be read


@dataclass(frozen=True)
class Material:
    """The same images in the forms that contenders read."""

    folder: Path  # class folders of JPEG
    dataset: Path  # our data set of shards
    copies: Path  # forms that only one contender reads are made here
    num_workers: int


def ours(material: Material) -> Iterator[torch.Tensor]:
    """Shardline's own loader."""
    import torchvision.io  # noqa: F401 - as the others do, before the processes start: imports are no loading

    from pipeline.config import AugmentConfig, DataConfig, PreprocessConfig
    from pipeline.data.datamodule import ShardDataModule
    from pipeline.manifest import load_dataset
    from pipeline.preprocess import build_spec

    manifest = load_dataset(material.dataset)
    augment = AugmentConfig(crop_scale=0.08, horizontal_flip=0.5)
    config = DataConfig(
        global_batch_size=BATCH_SIZE, num_workers=material.num_workers, start_method=START_METHOD, augment=augment
    )
    spec = build_spec(PreprocessConfig(resize=256, crop=[SIZE, SIZE]), manifest.image_stats)
    for batch in ShardDataModule(manifest, spec, config, seed=0).train_dataloader():
        yield batch["image"]


def image_folder(material: Material) -> Iterator[torch.Tensor]:
    """torchvision's ImageFolder with Pillow."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(material.folder), transform=_pillow_changes())
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=material.num_workers,
        multiprocessing_context=START_METHOD,
    )
    for images, _ in loader:
        yield images


def webdataset_pillow(material: Material) -> Iterator[torch.Tensor]:
    """The webdataset library with its Pillow decoder."""
    import webdataset

    dataset = _webdataset(webdataset, material).decode("pil").to_tuple("jpg", "cls").map_tuple(_pillow_changes(), _same)
    yield from _stream(dataset, material)


def webdataset_torchvision(material: Material) -> Iterator[torch.Tensor]:
    """The webdataset library with torchvision's JPEG decoder and transforms on tensors."""
    import webdataset

    dataset = _webdataset(webdataset, material).to_tuple("jpg", "cls").map_tuple(_tensor_changes(), _same)
    yield from _stream(dataset, material)


def timm_reader(material: Material) -> Iterator[torch.Tensor]:
    """timm's reader of WebDataset shards."""
    from timm.data import create_dataset

    number = sum(1 for _ in material.folder.rglob("*.jpg"))
    shards = sorted(path.name for path in material.dataset.glob("train-*.tar"))
    pattern = f"train-{{000000..{len(shards) - 1:06d}}}.tar"
    dataset = create_dataset(
        "wds/bench",
        root=str(material.dataset),
        split=f"{pattern}|{number}",
        is_training=True,
        batch_size=BATCH_SIZE,
    )
    dataset.transform = _pillow_changes()
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=material.num_workers, multiprocessing_context=START_METHOD)
    for images, _ in loader:
        yield images


def litdata(material: Material) -> Iterator[torch.Tensor]:
    """litData's streaming data set with Pillow."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    copy = material.copies / "litdata"
    if not copy.is_dir():
        files = sorted(str(path) for path in material.folder.rglob("*.jpg"))
        optimize(fn=_jpeg_of, inputs=files, output_dir=str(copy), chunk_bytes="64MB", num_workers=1)
    dataset = StreamingDataset(str(copy), shuffle=True, drop_last=True, transform=functools.partial(_open, _pillow_changes()))
    yield from StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=material.num_workers)


def mosaicml_streaming(material: Material) -> Iterator[torch.Tensor]:
    """MosaicML Streaming with Pillow."""
    from streaming import MDSWriter, StreamingDataset

    copy = material.copies / "mds"
    if not copy.is_dir():
        with MDSWriter(out=str(copy), columns={"image": "bytes"}) as writer:
            for path in sorted(material.folder.rglob("*.jpg")):
                writer.write({"image": path.read_bytes()})
    dataset = StreamingDataset(local=str(copy), shuffle=True, batch_size=BATCH_SIZE)
    yield from DataLoader(
        dataset,
        BATCH_SIZE,
        num_workers=material.num_workers,
        multiprocessing_context=START_METHOD,
        collate_fn=functools.partial(_open_all, _pillow_changes()),
    )


# name -> (what makes it, the package without which it is skipped)
CONTENDERS: dict[str, tuple[Callable[[Material], Iterator[torch.Tensor]], str]] = {
    "shardline": (ours, "torch"),
    "webdataset + torchvision": (webdataset_torchvision, "webdataset"),
    "webdataset + Pillow": (webdataset_pillow, "webdataset"),
    "ImageFolder + Pillow": (image_folder, "torchvision"),
    "timm": (timm_reader, "timm"),
    "litData": (litdata, "litdata"),
    "MosaicML Streaming": (mosaicml_streaming, "streaming"),
}


def is_installed(name: str) -> bool:
    """Whether the package of a contender is here."""
    return importlib.util.find_spec(CONTENDERS[name][1]) is not None


def _webdataset(webdataset: Any, material: Material) -> Any:
    shards = sorted(str(path) for path in material.dataset.glob("train-*.tar"))
    return webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000)


def _stream(dataset: Any, material: Material) -> Iterator[torch.Tensor]:
    batches = dataset.batched(BATCH_SIZE, partial=False)
    loader = DataLoader(batches, batch_size=None, num_workers=material.num_workers, multiprocessing_context=START_METHOD)
    for images, _ in loader:
        yield torch.as_tensor(images)


def _pillow_changes() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _tensor_changes() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([_decode, v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])


def _decode(encoded: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    decoded: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return decoded


def _open(change: Any, encoded: Any) -> torch.Tensor:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(bytes(encoded))) as image:
        tensor: torch.Tensor = change(image.convert("RGB"))
    return tensor


def _open_all(change: Any, samples: list[dict[str, bytes]]) -> torch.Tensor:
    return torch.stack([_open(change, sample["image"]) for sample in samples])


def _jpeg_of(path: str) -> bytes:
    return Path(path).read_bytes()


def _same(label: Any) -> Any:
    return label
