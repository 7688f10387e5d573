"""Loaders to measure: each yields uint8 batches of random 224 px crops (8 to 100 % of the area), half of them mirrored.

Each is written as its own documentation shows it, with the cheapest settings that do the same work, and has as many workers as
the others: processes or threads, as it is made. What makes one returns what begins an epoch of it.
"""

import functools
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from pipeline.bench.copies import QUALITY, SMALL_SIDE, write_beton, write_litdata, write_mds

BATCH_SIZE = 64
SIZE = 224
START_METHOD: Literal["fork"] = "fork"  # its processes are our children, so their CPU time can be read

Epoch = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Material:
    """The same images in the forms that contenders read."""

    folder: Path  # class folders of JPEG
    dataset: Path  # our data set of shards
    copies: Path  # forms that only one contender reads
    num_workers: int


def ours(material: Material) -> Epoch:
    """Shardline's own loader."""
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
    loader = ShardDataModule(manifest, spec, config, seed=0).train_dataloader()
    return lambda: (batch["image"] for batch in loader)


def image_folder(material: Material) -> Epoch:
    """torchvision's ImageFolder with Pillow."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(material.folder), transform=_pillow_changes())
    return _first_of(_loader(dataset, material, batch_size=BATCH_SIZE, shuffle=True, drop_last=True))


def webdataset_pillow(material: Material) -> Epoch:
    """The webdataset library with its Pillow decoder."""
    samples = _webdataset(material).decode("pil").to_tuple("jpg", "cls").map_tuple(_pillow_changes(), _same)
    return _first_of(_loader(samples.batched(BATCH_SIZE, partial=False), material, batch_size=None))


def webdataset_torchvision(material: Material) -> Epoch:
    """The webdataset library with torchvision's JPEG decoder and transforms on tensors."""
    samples = _webdataset(material).to_tuple("jpg", "cls").map_tuple(_tensor_changes(), _same)
    return _first_of(_loader(samples.batched(BATCH_SIZE, partial=False), material, batch_size=None))


def timm_reader(material: Material) -> Epoch:
    """timm's reader of WebDataset shards, with Pillow."""
    from timm.data import create_dataset

    number = sum(1 for _ in material.folder.rglob("*.jpg"))
    shards = len(list(material.dataset.glob("train-*.tar")))
    dataset = create_dataset(
        "wds/bench",
        root=str(material.dataset),
        split=f"train-{{000000..{shards - 1:06d}}}.tar|{number}",
        is_training=True,
        batch_size=BATCH_SIZE,
    )
    dataset.transform = _pillow_changes()
    return _first_of(_loader(dataset, material, batch_size=BATCH_SIZE))


def litdata(material: Material) -> Epoch:
    """litData's streaming data set with Pillow."""
    from litdata import StreamingDataLoader, StreamingDataset

    change = functools.partial(_open, _pillow_changes())
    dataset = StreamingDataset(str(material.copies / "litdata"), shuffle=True, drop_last=True, transform=change)
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=material.num_workers)
    return lambda: iter(loader)


def mosaicml_streaming(material: Material) -> Epoch:
    """MosaicML Streaming with Pillow."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(material.copies / "mds"), shuffle=True, batch_size=BATCH_SIZE)
    collate = functools.partial(_open_all, _pillow_changes())
    loader = _loader(dataset, material, batch_size=BATCH_SIZE, collate_fn=collate)
    return lambda: iter(loader)


def ffcv(material: Material, name: str) -> Epoch:
    """FFCV's loader of its own file: crop while decoding, threads, compiled by numba."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    changes = [decoder, RandomHorizontalFlip(0.5), ToTensor(), ToTorchImage(convert_back_int16=False)]
    loader = Loader(
        str(material.copies / name),
        batch_size=BATCH_SIZE,
        num_workers=material.num_workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": changes, "label": None},
    )
    return lambda: (images for images, *_ in loader)


def dali_cpu(material: Material) -> Epoch:
    """NVIDIA DALI on the CPU, from the shards: the decoder is told the crop."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    shards = [str(path) for path in sorted(material.dataset.glob("train-*.tar"))]

    def crops() -> Any:
        encoded = fn.readers.webdataset(paths=shards, ext=["jpg"], random_shuffle=True, name="shards")
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        return fn.flip(fn.resize(images, size=(SIZE, SIZE)), horizontal=fn.random.coin_flip())

    pipeline = pipeline_def(crops, batch_size=BATCH_SIZE, num_threads=material.num_workers, device_id=None, seed=0)()
    batches = DALIGenericIterator(
        [pipeline], ["image"], reader_name="shards", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return lambda: (found[0]["image"] for found in batches)


def spdl_threads(material: Material) -> Epoch:
    """SPDL's pipeline of threads, with torchvision's JPEG decoder and transforms on tensors."""
    from spdl.pipeline import PipelineBuilder

    paths, change = [str(path) for path in material.folder.rglob("*.jpg")], _tensor_changes()

    def epoch() -> Iterator[torch.Tensor]:
        builder = PipelineBuilder().add_source(random.sample(paths, len(paths)))
        builder = builder.pipe(lambda path: change(Path(path).read_bytes()), concurrency=material.num_workers)
        builder = builder.aggregate(BATCH_SIZE, drop_last=True).pipe(torch.stack).add_sink(3)
        pipeline = builder.build(num_threads=material.num_workers)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    return epoch


def _prepare_ffcv_jpeg(material: Material) -> None:
    write_beton(material.folder, material.copies / "jpeg.beton", write_mode="jpg", jpeg_quality=QUALITY)


def _prepare_ffcv_raw(material: Material) -> None:
    write_beton(material.folder, material.copies / "raw.beton", write_mode="raw", max_resolution=SMALL_SIDE)


def _prepare_litdata(material: Material) -> None:
    write_litdata(material.folder, material.copies / "litdata")


def _prepare_mds(material: Material) -> None:
    write_mds(material.folder, material.copies / "mds")


@dataclass(frozen=True)
class Contender:
    """A loader, what it imports (before the clock runs), what is first made for it, and its package on PyPI."""

    open: Callable[[Material], Epoch]
    modules: tuple[str, ...]
    package: str
    prepare: Callable[[Material], None] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the modules are here; none of them is imported."""
        return all(_is_there(module) for module in self.modules)


TORCHVISION = ("torchvision.io", "torchvision.transforms.v2")
OURS = "shardline"
FFCV_RAW = "FFCV (raw, 256 px)"
CONTENDERS: dict[str, Contender] = {
    OURS: Contender(ours, ("pipeline.data.datamodule", *TORCHVISION), "torch"),
    "FFCV (JPEG)": Contender(
        functools.partial(ffcv, name="jpeg.beton"), ("ffcv.loader", "ffcv.fields.rgb_image"), "ffcv", _prepare_ffcv_jpeg
    ),
    "DALI (CPU)": Contender(dali_cpu, ("nvidia.dali.plugin.pytorch",), "nvidia-dali-cuda130"),
    "SPDL + torchvision": Contender(spdl_threads, ("spdl.pipeline", *TORCHVISION), "spdl-core"),
    "webdataset + torchvision": Contender(webdataset_torchvision, ("webdataset", *TORCHVISION), "webdataset"),
    "webdataset + Pillow": Contender(webdataset_pillow, ("webdataset", *TORCHVISION), "webdataset"),
    "timm": Contender(timm_reader, ("timm.data", *TORCHVISION), "timm"),
    "litData": Contender(litdata, ("litdata", *TORCHVISION), "litdata", _prepare_litdata),
    "MosaicML Streaming": Contender(mosaicml_streaming, ("streaming", *TORCHVISION), "mosaicml-streaming", _prepare_mds),
    "ImageFolder + Pillow": Contender(image_folder, ("torchvision.datasets", *TORCHVISION), "torchvision"),
    FFCV_RAW: Contender(
        functools.partial(ffcv, name="raw.beton"), ("ffcv.loader", "ffcv.fields.rgb_image"), "ffcv", _prepare_ffcv_raw
    ),
}


def _is_there(module: str) -> bool:
    parts = module.split(".")
    found = importlib.util.find_spec(parts[0])
    if found is not None and found.origin is None:  # a name that packages share, such as NVIDIA's
        found = importlib.util.find_spec(".".join(parts[:2]))
    return found is not None


def _webdataset(material: Material) -> Any:
    import webdataset

    shards = sorted(str(path) for path in material.dataset.glob("train-*.tar"))
    return webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000)


def _loader(dataset: Any, material: Material, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, num_workers=material.num_workers, multiprocessing_context=START_METHOD, **options)


def _first_of(loader: DataLoader[Any]) -> Epoch:
    return lambda: (torch.as_tensor(images) for images, *_ in loader)


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


def _same(label: Any) -> Any:
    return label
