"""Is a data set still what its manifest says? Every file is hashed, every tar header read, every defect named."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.cache import ShardFetcher, fetcher_for
from pipeline.data.labels import SampleRule
from pipeline.data.parallel import run_parallel
from pipeline.data.shards import read_samples
from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.manifest import DatasetManifest, IndexEntry, ShardEntry, open_index, open_labels, require_labels

SAMPLES_NAMED = 3


@dataclass(frozen=True)
class ShardJob:
    """One shard to verify: its number in its split, and the first of its rows in the index."""

    split: str
    number: int
    first_row: int
    shard: ShardEntry


def verify_dataset(
    manifest: DatasetManifest, workers: int | None = None, config: DataConfig | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Verify every file, shards in parallel; yield (file name, defects found in it) as each is done.

    Remote shards are fetched into the cache that `config` names.
    """
    fetchers = {split: fetcher_for(manifest, split, config or DataConfig()) for split in manifest.splits}
    yield "", list(_strange_shards(manifest))
    jobs = []
    for split_name, split in manifest.splits.items():
        yield split.index.name, _index_defects(manifest, split_name)
        if split.labels is not None:
            yield split.labels.name, _label_defects(manifest, split_name, split.labels)
        first = 0
        for number, shard in enumerate(split.shards):
            jobs.append(ShardJob(split_name, number, first, shard))
            first += shard.num_samples
    yield from run_parallel(lambda job: (job.shard.name, _shard_defects(manifest, job, fetchers[job.split])), jobs, workers)


def num_files(manifest: DatasetManifest) -> int:
    """What `verify_dataset` yields."""
    return 1 + sum(len(split.shards) + 1 + (split.labels is not None) for split in manifest.splits.values())


def _strange_shards(manifest: DatasetManifest) -> Iterator[str]:
    known = {shard.name for split in manifest.splits.values() for shard in split.shards}
    streamed = {name for names in manifest.streams.values() for name in names}
    for path in sorted(manifest.folder.glob("*.tar")):
        if path.name not in known and not {path.name, str(path)} & streamed:
            yield f"{path}: is a shard that the manifest does not know."


def _index_defects(manifest: DatasetManifest, split_name: str) -> list[str]:
    split = manifest.split(split_name)
    path = manifest.folder / split.index.name
    defects = _file_defects(path, split.index.sha256)
    if not path.is_file():
        return defects
    try:
        rows = open_index(manifest, split_name)
        if manifest.task == "single":
            require_labels(manifest, split_name)
            counts = np.bincount(rows["label"], minlength=len(manifest.class_names)).tolist()
            if counts != split.class_counts:
                defects.append(f"{path}: counts {counts} samples of the classes, but the manifest says {split.class_counts}.")
    except DataError as error:
        defects.append(str(error))
    return defects


def _label_defects(manifest: DatasetManifest, split_name: str, entry: IndexEntry) -> list[str]:
    path = manifest.folder / entry.name
    defects = _file_defects(path, entry.sha256)
    try:
        labels = open_labels(manifest, split_name)
    except DataError as error:
        return [*defects, str(error)]
    if labels.max(initial=0) > 1:
        defects.append(f"{path}: holds other values than 0 and 1.")
    counts = labels.sum(axis=0, dtype=np.int64).tolist()
    if counts != manifest.split(split_name).class_counts:
        expected = manifest.split(split_name).class_counts
        defects.append(f"{path}: counts {counts} samples of the classes, but the manifest says {expected}.")
    return defects


def _file_defects(path: Path, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"{path}: is missing."]
    return [] if sha256_of(path) == sha256 else [f"{path}: its sha256 is not the manifest's."]


def _shard_defects(manifest: DatasetManifest, job: ShardJob, fetcher: ShardFetcher | None) -> list[str]:
    try:
        path = manifest.folder / job.shard.name if fetcher is None else fetcher(job.number)
    except DataError as error:
        return [str(error)]
    if not path.is_file():
        return [f"{path}: is missing."]
    size = path.stat().st_size
    if size != job.shard.num_bytes:
        return [f"{path}: holds {size} bytes but the manifest says {job.shard.num_bytes}. It was probably cut short."]
    defects = [] if sha256_of(path) == job.shard.sha256 else [f"{path}: its sha256 is not the manifest's."]
    try:
        return defects + _sample_defects(manifest, job, path)
    except DataError as error:
        return [*defects, str(error)]


def _sample_defects(manifest: DatasetManifest, job: ShardJob, path: Path) -> list[str]:
    if manifest.preparation.get("source") == "merge":
        return []  # its labels are those of the data set that it belongs to, which can be verified itself
    rule = SampleRule.of(manifest)
    samples = list(read_samples(path, rule))
    if len(samples) != job.shard.num_samples:
        return [f"{path}: holds {len(samples)} samples but the manifest says {job.shard.num_samples}."]
    try:
        rows = open_index(manifest, job.split)[job.first_row : job.first_row + len(samples)]
        labels = open_labels(manifest, job.split) if manifest.task == "multi" else None
    except (DataError, OSError):
        return []  # named with the index
    wrong = []
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        found = sorted({rule.class_number(label) for label in sample.labels})
        first = rule.class_number(sample.labels[0]) if sample.labels else -1
        place = (job.number, sample.offset, sample.size, first)
        expected = sorted(np.flatnonzero(labels[job.first_row + number]).tolist()) if labels is not None else found
        if place != tuple(row.item()) or found != expected:
            wrong.append(sample.key)
    more = f" and {len(wrong) - SAMPLES_NAMED} more" if len(wrong) > SAMPLES_NAMED else ""
    named = ", ".join(wrong[:SAMPLES_NAMED])
    return [f"{path}: sample {named}{more} is not where or what the index says."] if wrong else []
