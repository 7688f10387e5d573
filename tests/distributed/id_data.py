"""Tiny data sets whose shards are cut in different ways, and what a loader of them must yield."""

from pathlib import Path
from types import SimpleNamespace

from pipeline.config import AugmentConfig, DataConfig, PreprocessConfig
from pipeline.data.adopt import Adoption, adopt_shards
from pipeline.data.datamodule import ResumableLoader, ShardDataModule
from pipeline.manifest import DatasetManifest
from pipeline.preprocess import build_spec
from tests.unit.data.images import as_jpeg, noise
from tests.unit.data.test_shards import write_tar

LAYOUTS = {"1": [29], "5": [5] * 5, "7": [4] * 7, "uneven": [1, 17, 2, 9, 13]}
GLOBAL_BATCH_SIZE = 12  # one to four ranks share it
SEED = 1999


def make_dataset(folder: Path, sizes: list[int]) -> DatasetManifest:
    """A data set of two splits, each with shards of these sizes."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        for number, size in enumerate(sizes):
            members = {}
            for place in range(size):
                members[f"{place:03d}.jpg"] = as_jpeg(noise(8, 8, 100 * number + place))
                members[f"{place:03d}.cls"] = str(place % 2).encode()
            write_tar(folder / f"{split}-{number:03d}.tar", members)
    (folder / "classes.txt").write_text("even\nodd\n")
    return adopt_shards(folder, Adoption())[0]


def open_module(manifest: DatasetManifest, rank: int, world_size: int, config: DataConfig) -> ShardDataModule:
    """The data module as Lightning's trainer of one rank sees it."""
    spec = build_spec(PreprocessConfig(resize=[8, 8]), manifest.image_stats)
    module = ShardDataModule(manifest, spec, config, SEED)
    vars(module)["trainer"] = SimpleNamespace(global_rank=rank, world_size=world_size)
    return module


def config_of(num_workers: int, start_method: str, *, drop_last: bool = True) -> DataConfig:
    """Loader settings of a case: processes, or `threads`, which need images that are only cropped."""
    threads = start_method == "threads"
    return DataConfig(
        global_batch_size=GLOBAL_BATCH_SIZE,
        shuffle_shards=2,
        num_workers=num_workers,
        start_method="forkserver" if threads else start_method,  # type: ignore[arg-type]
        augment=AugmentConfig(crop_scale=0.5) if threads else AugmentConfig(),
        decoder="native" if threads else None,
        drop_last=drop_last,
        timeout_seconds=120,
    )


def ids_of(loader: ResumableLoader, epoch: int = 0) -> list[list[int]]:
    """The samples of each local batch of an epoch, -1 for padding."""
    loader.batches.set_epoch(epoch)
    return [
        [int(index) if weight > 0 else -1 for index, weight in zip(batch["index"], batch["weight"], strict=True)]
        for batch in loader
    ]
