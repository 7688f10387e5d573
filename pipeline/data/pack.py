"""Writes one shard and its sidecar: the piece of work that several processes and machines share.

A sidecar says all that the manifest and the index need, so nobody has to read a shard again.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.encode import Encoded, Encoder, PixelSums
from pipeline.data.hashing import read_image
from pipeline.data.listing import PlacedImage
from pipeline.data.parallel import SharedCounter
from pipeline.data.partial import Partial
from pipeline.data.plan import ShardPlan
from pipeline.data.sources import ImageSource
from pipeline.data.tar_writer import TarWriter
from pipeline.errors import DataError
from pipeline.files import publish, temporary_name
from pipeline.manifest import Task

KEY_LETTERS = 60


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written and its images."""

    shard: ShardPlan
    images: list[PlacedImage]


@contextlib.contextmanager
def new_shard(partial: Partial, name: str) -> Iterator[TarWriter]:
    """A tar that gets its name when the block, which finishes it, ends; nothing is left of it when the block fails."""
    final = partial.shard_path(name)
    final.parent.mkdir(exist_ok=True)
    tar = TarWriter(temporary_name(final, partial.owner))
    try:
        yield tar
        publish(tar.path, final)
    except BaseException:
        tar.abandon()
        raise


@dataclass(frozen=True)
class Packer:
    """Writes shards; `stats_every` is the distance of the training images that the statistics are taken of."""

    source: ImageSource
    encoder: Encoder
    partial: Partial
    task: Task
    stats_every: int
    counter: SharedCounter

    def write(self, job: ShardJob) -> None:
        """Write a shard, then its sidecar. Raises DataError when an image is no longer the one that was hashed."""
        with new_shard(self.partial, job.shard.name) as tar:
            sidecar = self._pack(job, tar)
            sidecar |= {"sha256": tar.finish(), "num_bytes": tar.num_bytes}
        self.partial.write_json(self.partial.sidecar_path(job.shard.name), sidecar)

    def _pack(self, job: ShardJob, tar: TarWriter) -> dict[str, Any]:
        rows: list[list[int]] = []  # offset, size, labels
        rejected: list[tuple[str, str]] = []
        kept: list[tuple[str, str]] = []
        sums = PixelSums()
        for number, image in enumerate(job.images, start=job.shard.first):
            self.counter.add()
            counts = job.shard.split == "train" and number % self.stats_every == 0
            try:
                content = read_image(self.source, image.name)
            except DataError as error:
                rejected.append((image.name, str(error)))
                continue
            if len(content) != image.num_bytes:
                raise DataError(f"{image.name}: changed while it was being written. Run again when the images are at rest.")
            try:
                encoded = self.encoder.encode(content, need_pixels=counts)
            except DataError as error:
                rejected.append((image.name, str(error)))
                continue
            if counts:
                assert encoded.pixels is not None
                sums.add(encoded.pixels)
            if encoded.kept:
                kept.append((image.name, encoded.kept))
            rows.append(self._add(tar, image, number, encoded))
        return {"rows": rows, "rejected": rejected, "kept": kept, "pixels": pixels_of(sums)}

    def _add(self, tar: TarWriter, image: PlacedImage, number: int, encoded: Encoded) -> list[int]:
        key = f"{number:08d}-{key_part(image.name)}"
        offset = tar.add(f"{key}.{encoded.extension}", encoded.content)
        tar.add(f"{key}.cls", str(image.labels[0] if image.labels else -1).encode())
        if self.task == "multi":
            tar.add(f"{key}.json", json.dumps({"labels": image.labels}).encode())
        return [offset, len(encoded.content), *image.labels]


def pixels_of(sums: PixelSums) -> dict[str, Any]:
    """What a sidecar says of the pixels of its shard."""
    count, totals, squares = sums.totals()
    return {"count": count, "sums": totals, "squares": squares}


def key_part(name: str) -> str:
    """The file's own name in letters that no WebDataset reader trips over, so that a sample can be traced back."""
    base = name.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", base.rpartition(".")[0] or base)[:KEY_LETTERS]
