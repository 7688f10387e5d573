"""Map-style access to the samples of sharded tars: an index row, one `pread`, one decode.

No tar is parsed and nothing is unpickled or run: only image bytes and integer labels are ever read from a shard.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.augment import Augmentation, augment
from pipeline.data.order import SampleRef
from pipeline.errors import DataError
from pipeline.manifest import DatasetManifest, open_index
from pipeline.preprocess import PreprocessSpec, decode_image

TAR_BLOCK_BYTES = 512


class Batch(TypedDict):
    """A local batch of n samples."""

    image: torch.Tensor  # uint8 (n, 3, H, W), RGB
    label: torch.Tensor  # int64 (n,)
    weight: torch.Tensor  # float32 (n,), 0 for padding
    index: torch.Tensor  # int64 (n,)


class ShardReader:
    """Reads byte ranges of shards. Files are opened lazily in each process, which makes it safe to fork and to pickle."""

    def __init__(self, paths: list[Path], max_open: int = 256) -> None:
        self.paths = paths
        self.max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "max_open": self.max_open, "_descriptors": OrderedDict(), "_process": 0}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of a shard. Raises DataError when the file ends before."""
        content = os.pread(self._descriptor(shard), size, offset)
        if len(content) != size:
            raise DataError(
                f"{self.paths[shard]}: ends before byte {offset + size}. It was cut short: "
                "copy it again or rebuild it with `shardline shard --fresh`."
            )
        return content

    def _descriptor(self, shard: int) -> int:
        if self._process != os.getpid():  # after a fork the parent's table is not ours to close
            self._descriptors, self._process = OrderedDict(), os.getpid()
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            if len(self._descriptors) >= self.max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            try:
                descriptor = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise DataError(f"{self.paths[shard]}: shard is missing. Rebuild with `shardline shard --fresh`.") from error
        self._descriptors[shard] = descriptor
        return descriptor


class ShardDataset(Dataset[Any]):
    """The samples of one split, in the order of its shards.

    `dataset[i]` is (image uint8 (3, H, W), label); a loader asks for whole batches by `__getitems__`.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        split_name: str,
        spec: PreprocessSpec,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = open_index(manifest, split_name)
        self.shard_sizes = [shard.num_samples for shard in manifest.split(split_name).shards]
        self.reader = ShardReader([manifest.folder / shard.name for shard in manifest.split(split_name).shards])
        self.spec = spec
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, index: int) -> bytes:
        """The image file of a sample, byte for byte."""
        row = self.rows[index]
        return self.reader.read(int(row["shard"]), int(row["offset"]), int(row["size"]))

    def key(self, index: int) -> str:
        """The sample's WebDataset key, read from the tar header before its image."""
        row = self.rows[index]
        header = self.reader.read(int(row["shard"]), int(row["offset"]) - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES)
        name = header[:100].split(b"\0", 1)[0].decode("utf-8", errors="replace")
        return name.split(".", 1)[0]

    def image(self, index: int, epoch: int = 0) -> torch.Tensor:
        """The decoded, in training augmented, image of a sample: uint8 (3, H, W)."""
        try:
            pixels = decode_image(self.encoded(index), self.spec)
        except DataError as error:
            shard = self.reader.paths[int(self.rows[index]["shard"])]
            raise DataError(
                f"{shard}: sample {self.key(index)} cannot be decoded ({error}). "
                "Replace its image in the source and rebuild with `shardline shard --fresh`."
            ) from error
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)  # (3, H, W)
        if self.augmentation is not None:
            tensor = augment(tensor, self.augmentation, self.seed, epoch, index)
        return tensor

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.image(index), int(self.rows[index]["label"])

    def __getitems__(self, refs: list[SampleRef]) -> Batch:
        indices = np.array([ref.sample_index for ref in refs])
        return {
            "image": torch.stack([self.image(ref.sample_index, ref.epoch) for ref in refs]),
            "label": torch.from_numpy(self.rows["label"][indices].astype(np.int64)),
            "weight": torch.tensor([ref.weight for ref in refs], dtype=torch.float32),
            "index": torch.from_numpy(indices),
        }
