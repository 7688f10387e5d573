"""Several data sets as one: a manifest and an index of their own over shards that stay where they are.

Labels are translated by class name. A weight says how often a training epoch draws a data set's samples; an evaluation sees
every sample once, whatever the weights.
"""

import datetime
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipeline
from pipeline.console import say
from pipeline.errors import ConfigError, DataError
from pipeline.files import fsync_file, fsync_folder, move_aside, sha256_of
from pipeline.manifest import (
    INDEX_ROW,
    MANIFEST_NAME,
    ROWS_AT_A_TIME,
    DatasetManifest,
    ImageStats,
    IndexEntry,
    ShardEntry,
    SplitEntry,
    load_dataset,
    open_index,
    open_labels,
    read_manifest,
)

PARTIAL = ".partial"


@dataclass(frozen=True)
class Member:
    """One data set of a merged one. `translation[label]` is the label of the same class in the merged set, (K,)."""

    manifest: DatasetManifest
    weight: float
    translation: npt.NDArray[np.int32]


def merge_datasets(
    entries: list[dict[str, Any]], folder: Path, cache_folder: Path, *, fresh: bool = False
) -> tuple[DatasetManifest, bool]:
    """Return the data set in `folder` over those of `entries` ({path, weight}), and whether it had to be written.

    Raises ConfigError for entries of another form, DataError for data sets that do not fit together.
    """
    members = open_members(entries, cache_folder)
    preparation = {
        "source": "merge",
        "members": [{"digest": member.manifest.digest, "weight": member.weight} for member in members],
    }
    if (folder / MANIFEST_NAME).is_file():
        if not fresh and read_manifest(folder).preparation == preparation:
            return load_dataset(folder), False
        say(f"{folder}: other data sets are merged now; the earlier one is kept as {move_aside(folder)}")
    elif folder.is_dir() and any(path.name != PARTIAL for path in folder.iterdir()):
        raise DataError(f"{folder}: is not a data set and not empty. Choose another --dataset.path.")
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    splits = {name: write_split(name, members, partial, folder) for name in _split_names(members)}
    manifest = DatasetManifest(
        task=members[0].manifest.task,
        class_names=members[0].manifest.class_names,
        splits=splits,
        image_stats=pooled_stats(members),
        preparation=preparation,
        info={
            "source": "merge",
            "members": [str(entry["path"]) for entry in entries],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tool_version": pipeline.__version__,
            "num_ignored": 0,
        },
        digest="",
        folder=partial,
    ).save()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        path.rename(folder / path.name)
    partial.rmdir()
    fsync_folder(folder)
    say("each data set keeps its own splits: `shardline inspect` shows images that one has in train and another in val or test")
    return replace(manifest, folder=folder), True


def open_members(entries: list[dict[str, Any]], cache_folder: Path) -> list[Member]:
    """Load the data sets of `dataset.merge`. The first one's classes are those of all; another may lack some of them."""
    manifests = []
    for entry in entries:
        unknown = set(entry) - {"path", "weight"}
        weight = entry.get("weight", 1.0)
        if unknown or not isinstance(entry.get("path"), str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"`dataset.merge` holds {entry}; each entry is {{path: FOLDER, weight: NUMBER}}.")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"`dataset.merge`: the weight of {entry['path']} is {weight}; it must be greater than 0.")
        manifests.append((load_dataset(str(entry["path"]), cache_folder), float(weight)))
    digests = [manifest.digest for manifest, _ in manifests]
    for place, digest in enumerate(digests):
        if digest in digests[:place]:
            raise ConfigError(f"`dataset.merge`: {entries[place]['path']} is given twice. Give it once, with weight 2.")
    first = manifests[0][0]
    return [Member(manifest, weight, _translate(manifest, first)) for manifest, weight in manifests]


def _translate(manifest: DatasetManifest, first: DatasetManifest) -> npt.NDArray[np.int32]:
    if manifest.streams:
        raise DataError(f"{manifest.folder}: its shards are streamed and have no index, so it cannot be merged.")
    if manifest.task != first.task:
        raise DataError(
            f"{manifest.folder}: its task is `{manifest.task}` but that of {first.folder} is `{first.task}`; "
            "only data sets of one task can be merged."
        )
    unknown = sorted(set(manifest.class_names) - set(first.class_names))
    if unknown:
        raise DataError(
            f"{manifest.folder}: has the classes {manifest.class_names}, {first.folder} has {first.class_names}; "
            f"{', '.join(unknown)} is unknown there. Name the classes alike, or put the data set that has them all first."
        )
    return np.array([first.class_names.index(name) for name in manifest.class_names], np.int32)


def _split_names(members: list[Member]) -> list[str]:
    found = {name for member in members for name in member.manifest.splits}
    return [name for name in ("train", "val", "test") if name in found]


def write_split(name: str, members: list[Member], partial: Path, folder: Path) -> SplitEntry:
    """Write the index (and the label rows) of a split over all members that have it."""
    having = [member for member in members if name in member.manifest.splits]
    shards = [shard for member in having for shard in _shards_of(member, name, folder)]
    num_samples = sum(shard.num_samples for shard in shards)
    num_classes = len(members[0].manifest.class_names)
    counts = np.zeros(num_classes, np.int64)
    index_path = partial / f"{name}.index.npy"
    rows = np.lib.format.open_memmap(index_path, mode="w+", dtype=INDEX_ROW, shape=(num_samples,))
    for first, part in _translated_rows(having, name):
        rows[first : first + len(part)] = part
        counts += np.bincount(part["label"][part["label"] >= 0], minlength=num_classes)
    rows.flush()
    fsync_file(index_path)
    labels = None
    if members[0].manifest.task == "multi":
        labels, counts = _write_labels(name, having, partial, (num_samples, num_classes))
    return SplitEntry(shards, IndexEntry(index_path.name, sha256_of(index_path)), counts.tolist(), labels)


def _shards_of(member: Member, split: str, folder: Path) -> Iterator[ShardEntry]:
    for shard in member.manifest.split(split).shards:
        if "://" in shard.name:
            name = shard.name
        elif member.manifest.url:
            name = f"{member.manifest.url.rstrip('/')}/{shard.name}"
        else:
            name = os.path.relpath(member.manifest.folder / shard.name, folder)
        yield replace(shard, name=name, weight=shard.weight * member.weight if split == "train" else 1.0)


def _translated_rows(members: list[Member], split: str) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
    """Yield (place of the first row, rows) in pieces."""
    place, first_shard = 0, 0
    for member in members:
        rows = open_index(member.manifest, split)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = np.array(rows[start : start + ROWS_AT_A_TIME])
            part["shard"] += first_shard
            known = part["label"] >= 0
            part["label"][known] = member.translation[part["label"][known]]
            yield place + start, part
        place += len(rows)
        first_shard += len(member.manifest.split(split).shards)


def _write_labels(
    split: str, members: list[Member], partial: Path, shape: tuple[int, int]
) -> tuple[IndexEntry, npt.NDArray[np.int64]]:
    path = partial / f"{split}.labels.npy"
    merged = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)  # (N, K)
    place = 0
    for member in members:
        labels = open_labels(member.manifest, split)
        merged[place : place + len(labels), member.translation] = labels
        place += len(labels)
    merged.flush()
    fsync_file(path)
    return IndexEntry(path.name, sha256_of(path)), merged.sum(axis=0, dtype=np.int64)


def pooled_stats(members: list[Member]) -> ImageStats:
    """Mean and standard deviation over the training samples that an epoch draws, as if all images had one size."""
    having = [member for member in members if "train" in member.manifest.splits]
    shares = np.array([member.weight * member.manifest.split("train").num_samples for member in having])
    shares = shares / shares.sum()
    means = np.array([member.manifest.image_stats.mean for member in having])  # (members, 3)
    stds = np.array([member.manifest.image_stats.std for member in having])
    mean = shares @ means
    std = np.sqrt(shares @ (stds**2 + means**2) - mean**2)
    return ImageStats("train", [round(float(m), 6) for m in mean], [round(float(s), 6) for s in std])
