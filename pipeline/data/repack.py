"""`shardline repack`: the JPEGs of a data set rewritten into another one, with restart markers, smaller, or both.

The tars are copied member by member, so keys, labels and order stay; only a JPEG's bytes and the size in its header change, and
what is no JPEG stays as it is. A shard is read once, and its copy counts only if the sha256 of what was read is the manifest's.
"""

import dataclasses
import datetime
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import pipeline
from pipeline.config import DataConfig, DatasetConfig
from pipeline.data.assemble import Gathered, make_ready, publish_dataset
from pipeline.data.cache import fetcher_for, open_fetched
from pipeline.data.encode import JPEG_START, Encoded, Encoder, PixelSums
from pipeline.data.labels import SampleRule
from pipeline.data.native import require_for_restarts
from pipeline.data.pack import new_shard, pixels_of
from pipeline.data.parallel import SharedCounter, counted, run_parallel
from pipeline.data.partial import Partial, Plan
from pipeline.data.plan import ShardPlan
from pipeline.data.shards import read_key, read_samples
from pipeline.data.tar_writer import BLOCK_BYTES, TarWriter
from pipeline.data.writer import agree, explained, remove_what_is_left, require_own
from pipeline.errors import ConfigError, DataError
from pipeline.files import sha256_of
from pipeline.manifest import MANIFEST_NAME, DatasetManifest, ShardEntry, load_dataset, open_index, open_labels, read_manifest
from pipeline.preprocess import WHITE, open_image

REMEDY = "Copy it again or rebuild with `shardline shard --fresh`."


@dataclass(frozen=True)
class RepackJob:
    """A shard to be written; in the source it is number `number` of its split."""

    shard: ShardPlan
    number: int
    entry: ShardEntry


def repack_dataset(
    source: DatasetManifest, folder: Path, config: DatasetConfig, data: DataConfig, workers: int | None = None
) -> tuple[DatasetManifest, bool]:
    """Return the data set in `folder` that `source` becomes by the settings, and whether it had to be written.

    An interrupted run goes on where it was, and another data set there is moved aside once the new one is complete. Raises
    ConfigError or DataError for what cannot be repacked. The caller holds the folder's lock.
    """
    _require_repackable(source, folder, config)
    changes = {name: getattr(config, name) for name in ("restart", "max_side") if getattr(config, name) is not None}
    if config.max_side is not None:
        changes["jpeg_quality"] = config.jpeg_quality
    preparation = {**source.preparation, "repack": {"of": source.digest, **changes}}
    partial = Partial(folder)
    if (folder / MANIFEST_NAME).is_file() and read_manifest(folder).preparation == preparation:
        manifest = load_dataset(folder)
        remove_what_is_left(partial, manifest)
        return manifest, False
    require_for_restarts(config.restart)
    require_own(folder)
    where = source.url or str(source.folder)
    plan = Plan(preparation, source.digest, where, source.class_names, source.task, num_ignored=0)
    with explained(partial):
        agree(partial, plan)
        partial.remove_temporary()
        if not (partial.ready_dir / MANIFEST_NAME).exists():
            _require_same_index(source)
            jobs = _jobs(source)
            background = list(source.preparation.get("background", WHITE))
            encoder = Encoder(dataclasses.replace(config, background=background))
            _write_shards(source, jobs, partial, encoder, data, workers)
            _make_ready(source, jobs, partial, plan)
        return publish_dataset(partial), True


def _require_repackable(source: DatasetManifest, folder: Path, config: DatasetConfig) -> None:
    if config.restart is None and config.max_side is None:
        raise ConfigError("nothing to change: say --restart N, --max-side PIXELS, or both.")
    if source.streams:
        raise DataError(f"{source.folder}: its shards are streamed and have no index, so they cannot be repacked.")
    if source.preparation.get("source") == "merge":
        raise DataError(f"{source.folder}: refers to shards of other data sets. Repack those, and merge the results.")
    if not source.url and folder.resolve() == source.folder.resolve():
        raise ConfigError(f"{folder}: a data set cannot be repacked into its own folder; give another one.")


def _require_same_index(source: DatasetManifest) -> None:
    """Refuse an index or label rows that changed: what they say would be said anew, with another sha256."""
    for split in source.splits.values():
        for entry in (split.index, split.labels):
            if entry is not None and sha256_of(source.folder / entry.name) != entry.sha256:
                raise DataError(f"{source.folder / entry.name}: its sha256 is not the manifest's. {REMEDY}")


def _jobs(source: DatasetManifest) -> list[RepackJob]:
    jobs: list[RepackJob] = []
    before = 0
    for split_name, split in source.splits.items():
        first = 0
        for number, entry in enumerate(split.shards):
            name = f"{split_name}-{number:06d}.tar"
            jobs.append(RepackJob(ShardPlan(len(jobs), name, split_name, first, before, entry.num_samples), number, entry))
            first += entry.num_samples
            before += entry.num_samples
    return jobs


def _write_shards(
    source: DatasetManifest,
    jobs: list[RepackJob],
    partial: Partial,
    encoder: Encoder,
    data: DataConfig,
    workers: int | None,
) -> None:
    missing = [job for job in jobs if partial.read_sidecar(job.shard.name) is None]
    total = sum(job.shard.count for job in jobs)
    with counted("repack", total, total - sum(job.shard.count for job in missing)) as counter:
        repacker = Repacker(source, encoder, partial, data, counter)
        try:
            for _ in run_parallel(repacker.write, missing, workers, counter.look):
                pass
        finally:
            partial.remove_temporary()  # of processes that ended because another failed


def _make_ready(source: DatasetManifest, jobs: list[RepackJob], partial: Partial, plan: Plan) -> None:
    partial.ready_dir.mkdir(exist_ok=True)
    gathered = Gathered()
    for job in jobs:
        sidecar = partial.read_sidecar(job.shard.name)
        assert sidecar is not None
        gathered.add(job.shard, sidecar)
    # Without another size every pixel is what it was.
    is_resized = "max_side" in plan.preparation["repack"]
    stats = gathered.stats(source.image_stats.split) if is_resized else source.image_stats
    info = {
        "source": plan.source,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_fingerprint": plan.fingerprint,
        "num_ignored": 0,
        "tool_version": pipeline.__version__,
    }
    make_ready(partial, plan, gathered, stats, info | gathered.info, [])


@dataclass(frozen=True)
class Repacker:
    """Rewrites shards of `source`, where they are or fetched into the cache that `data` names."""

    source: DatasetManifest
    encoder: Encoder
    partial: Partial
    data: DataConfig
    counter: SharedCounter

    def write(self, job: RepackJob) -> None:
        """Write a shard, then its sidecar. Raises DataError when the source's is not what its manifest and index say."""
        path = self.source.folder / job.entry.name
        with os.fdopen(self._open(job, path), "rb") as file, new_shard(self.partial, job.shard.name) as tar:
            try:
                sidecar = self._copy(job, _HashedFile(file), tar)
            except (ValueError, tarfile.TarError) as error:
                raise DataError(f"{path}: {error}. {REMEDY}") from error
            sidecar |= {"sha256": tar.finish(), "num_bytes": tar.num_bytes}
            self._require_same_places(job, tar.path, sidecar["rows"])
        self.partial.write_json(self.partial.sidecar_path(job.shard.name), sidecar)

    def _open(self, job: RepackJob, path: Path) -> int:
        fetcher = fetcher_for(self.source, job.shard.split, self.data)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fetcher is None else open_fetched(fetcher, job.number)

    def _copy(self, job: RepackJob, file: "_HashedFile", tar: TarWriter) -> dict[str, Any]:
        """Copy all members, images rewritten; the shard's sidecar. Raises ValueError when the file is not the manifest's."""
        rows: list[list[int]] = []  # offset, size, labels
        kept: list[tuple[str, str]] = []
        sums = PixelSums()
        need_pixels = self.encoder.max_side is not None and job.shard.split == self.source.image_stats.split
        for offset, size, labels in self._samples(job):
            before = file.read(offset - BLOCK_BYTES - file.at)
            header, content = file.read(BLOCK_BYTES), file.read(size)
            file.read(-size % BLOCK_BYTES)
            encoded = self._rewrite(content, need_pixels)
            if encoded.kept:
                kept.append((_key(before + header), encoded.kept))
            if encoded.pixels is not None and need_pixels:
                sums.add(encoded.pixels)
            tar.add_blocks(before)
            new_size = len(encoded.content)
            new_offset = tar.add_member(_resized(header, size, new_size), encoded.content)
            rows.append([new_offset, new_size, *labels])
            self.counter.add()
        rest = file.read_all()
        if file.sha256.hexdigest() != job.entry.sha256:
            raise ValueError("its sha256 is not the manifest's")
        tar.add_blocks(rest[: _end_of_members(rest)])
        return {"rows": rows, "rejected": [], "kept": kept, "pixels": pixels_of(sums)}

    def _samples(self, job: RepackJob) -> list[tuple[int, int, list[int]]]:
        """Offset, size and labels of each image of a shard, the label of the index first."""
        part = slice(job.shard.first, job.shard.first + job.shard.count)
        rows = open_index(self.source, job.shard.split)[part]
        labels = [[int(label)] if label >= 0 else [] for label in rows["label"]]
        if self.source.task == "multi":
            hot = open_labels(self.source, job.shard.split)[part]
            labels = [one + np.flatnonzero(row).tolist() for one, row in zip(labels, hot, strict=True)]
        return list(zip(rows["offset"].tolist(), rows["size"].tolist(), labels, strict=True))

    def _rewrite(self, content: bytes, need_pixels: bool) -> Encoded:
        """What becomes of an image; what cannot be decoded is kept, as is all that is no JPEG."""
        is_jpeg = content.startswith(JPEG_START)
        if is_jpeg and self.encoder.max_side is None:
            return self.encoder.with_markers(Encoded(content, "", None))
        try:
            if is_jpeg:
                return self.encoder.encode(content, need_pixels=need_pixels)
            return Encoded(content, "", open_image(content, self.encoder.background) if need_pixels else None)
        except DataError as error:
            return Encoded(content, "", None, str(error) if is_jpeg else "")

    def _require_same_places(self, job: RepackJob, path: Path, rows: list[list[int]]) -> None:
        """Refuse to hand over a tar in which others would not find the images where the index says."""
        try:
            found = [[sample.offset, sample.size] for sample in read_samples(path, SampleRule.of(self.source))]
        except DataError:
            found = []
        if found != [row[:2] for row in rows]:
            raise DataError(
                f"{self.source.folder / job.entry.name}: its members have headers of a kind that cannot be rewritten. "
                "Unpack them and make the data set anew with `shardline shard`."
            )


class _HashedFile:
    """A file that is read once from its start to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.at, self.sha256 = file, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """So many bytes and no less. Raises ValueError."""
        content = self._file.read(size) if size >= 0 else b""
        if len(content) != size:
            raise ValueError("it is not laid out as its index says, or was cut short")
        self.at += size
        self.sha256.update(content)
        return content

    def read_all(self) -> bytes:
        """What is left."""
        content = self._file.read()
        self.sha256.update(content)
        return content


def _key(blocks: bytes) -> str:
    """The key in the header that ends `blocks`."""
    return read_key(lambda at, size: blocks[at : at + size], len(blocks))


def _resized(header: bytes, size: int, new_size: int) -> bytes:
    """A member's header (512 bytes) with another size. Raises ValueError where it is no header of a member of `size` bytes."""
    found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    if found != size:
        raise ValueError(f"an image has {found} bytes there, and {size} by the index")
    if size == new_size:
        return header
    header = header[:124] + b"%011o\0" % new_size + header[136:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _end_of_members(rest: bytes) -> int:
    """Where the members end in the last part of a tar, and its zeros begin."""
    with tarfile.open(fileobj=io.BytesIO(rest), mode="r:") as tar:
        tar.getmembers()
        return tar.offset
