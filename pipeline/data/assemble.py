"""From finished shards to a data set in its place: index, labels, rejects and manifest, then renames, dataset.json last.

Each step can be cut short and done again. Once .partial/ready/dataset.json is there, all that is left are renames, and whoever
comes next makes the rest of them.
"""

import datetime
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

import pipeline
from pipeline.console import say
from pipeline.data.encode import stats_of
from pipeline.data.partial import OWN_NAMES, PARTIAL, Partial, Plan
from pipeline.data.plan import IMAGES_NAMED, Layout, ShardPlan
from pipeline.data.rejects import REJECTED_NAME, Rejects
from pipeline.errors import DataError
from pipeline.files import fsync_file, fsync_folder, move_aside, sha256_of
from pipeline.manifest import (
    INDEX_ROW,
    MANIFEST_NAME,
    DatasetManifest,
    ImageStats,
    IndexEntry,
    ShardEntry,
    SplitEntry,
    load_dataset,
)

MOVES_NAME = "moves.json"  # from where in .partial to which name


@dataclass
class Gathered:
    """What the sidecars of all shards say together. A shard of which every image was rejected is left out."""

    shards: dict[str, list[tuple[str, ShardEntry]]] = field(default_factory=dict)  # by split: name in .partial, entry
    pixels: list[int] = field(default_factory=lambda: [0] * 7)  # count, 3 sums, 3 sums of squares
    train_labels: Counter[int] = field(default_factory=Counter)
    num_kept: int = 0
    kept: list[str] = field(default_factory=list)  # the first few of them, each with its reason

    def add(self, shard: ShardPlan, sidecar: dict[str, Any]) -> None:
        """Take in one shard."""
        pixels, rows, kept = sidecar["pixels"], sidecar["rows"], sidecar.get("kept", [])
        self.num_kept += len(kept)
        self.kept = (self.kept + [f"{name} ({reason})" for name, reason in kept])[:IMAGES_NAMED]
        values = [pixels["count"], *pixels["sums"], *pixels["squares"]]
        self.pixels = [total + value for total, value in zip(self.pixels, values, strict=True)]
        if shard.split == "train":
            self.train_labels.update(_first_label(row) for row in rows)
        if rows:
            of_split = self.shards.setdefault(shard.split, [])
            name = f"{shard.split}-{len(of_split):06d}.tar"
            of_split.append((shard.name, ShardEntry(name, len(rows), sidecar["num_bytes"], sidecar["sha256"])))

    @property
    def info(self) -> dict[str, Any]:
        """What the manifest says of JPEGs that could not be rewritten; nothing where there are none."""
        return {"num_kept": self.num_kept, "kept": self.kept} if self.num_kept else {}

    def stats(self, split: str) -> ImageStats:
        """Mean and standard deviation of the pixels."""
        count, *pixels = self.pixels
        return stats_of(count, pixels[:3], pixels[3:], split)


def _first_label(row: list[int]) -> int:
    return row[2] if len(row) > 2 else -1


def assemble(partial: Partial, plan: Plan, layout: Layout, max_rejected: float) -> None:
    """Make everything of the data set but its shards, in `partial.ready_dir`.

    Raises DataError when too many images were rejected, or all that a class had for train.
    """
    partial.ready_dir.mkdir(exist_ok=True)
    with Rejects(partial.root / "rejected.sqlite") as rejects:
        gathered = _gather(partial, layout.shards(plan.preparation["samples_per_shard"]), rejects)
        _require_few(rejects, layout.num_listed, max_rejected, partial)
        _require_classes(gathered, layout, plan, rejects)
        rejected = [REJECTED_NAME] if len(rejects) else []
        for name in rejected:
            rejects.write(partial.ready_dir / name)
        info = _info(plan, rejects) | gathered.info
    make_ready(partial, plan, gathered, gathered.stats("train"), info, rejected)


def make_ready(
    partial: Partial, plan: Plan, gathered: Gathered, stats: ImageStats, info: dict[str, Any], others: list[str]
) -> None:
    """Write index, label rows and manifest into `partial.ready_dir`, and the name of each file; `others` lie there already."""
    splits = {split: _write_split(partial, plan, split, shards) for split, shards in gathered.shards.items()}
    moves = [(f"{partial.shards_dir.name}/{name}", entry.name) for shards in gathered.shards.values() for name, entry in shards]
    entries = [entry for split in splits.values() for entry in (split.index, split.labels) if entry]
    moves += [(f"{partial.ready_dir.name}/{name}", name) for name in [entry.name for entry in entries] + others]
    partial.write_json(partial.ready_dir / MOVES_NAME, moves)
    DatasetManifest(
        task=plan.task,
        class_names=plan.class_names,
        splits=splits,
        image_stats=stats,
        preparation=plan.preparation,
        info=info,
        digest="",
        folder=partial.ready_dir,
    ).save()


def _gather(partial: Partial, shards: list[ShardPlan], rejects: Rejects) -> Gathered:
    gathered = Gathered()
    for path in sorted(partial.hashes_dir.glob("*.json")):
        rejects.add(json.loads(path.read_bytes())["rejected"].values())
    for shard in shards:
        sidecar = partial.read_sidecar(shard.name)
        assert sidecar is not None
        rejects.add(sidecar["rejected"])
        gathered.add(shard, sidecar)
    return gathered


def _info(plan: Plan, rejects: Rejects) -> dict[str, Any]:
    return {
        "source": plan.source,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_fingerprint": plan.fingerprint,
        "num_ignored": plan.num_ignored,
        "num_rejected": len(rejects),
        "rejected": rejects.by_reason(),
        "tool_version": pipeline.__version__,
    }


# ---- what is refused ----


def _require_few(rejects: Rejects, num_listed: int, max_rejected: float, partial: Partial) -> None:
    if len(rejects) <= max_rejected * num_listed:
        return
    # Beside a complete data set lies that one's own list.
    complete = (partial.folder / MANIFEST_NAME).exists()
    path = partial.rejected_path if complete else partial.folder / REJECTED_NAME
    rejects.write(path)
    raise DataError(
        f"{len(rejects):,} of {num_listed:,} images cannot be decoded, more than the share of {max_rejected:g} that "
        f"`dataset.max_rejected` allows: {_named(rejects)}. All of them are in {path}. Replace or remove them, "
        "or allow more with --max-rejected; the work done is kept."
    )


def _named(rejects: Rejects) -> str:
    named = "; ".join(f"{name} ({reason})" for name, reason in rejects.first(IMAGES_NAMED))
    more = len(rejects) - IMAGES_NAMED
    return f"{named}; and {more:,} more" if more > 0 else named


def _require_classes(gathered: Gathered, layout: Layout, plan: Plan, rejects: Rejects) -> None:
    for label, planned in layout.class_counts["train"].items():
        if label >= 0 and not gathered.train_labels[label]:
            raise DataError(
                f"class `{plan.class_names[label]}`: none of its {planned} images for train can be decoded. Rejected were "
                f"{_named(rejects)}. Replace them or remove the class."
            )


# ---- index and labels ----


def _write_split(partial: Partial, plan: Plan, split: str, shards: list[tuple[str, ShardEntry]]) -> SplitEntry:
    """Write SPLIT.index.npy and, with several labels an image, SPLIT.labels.npy."""
    entries = [entry for _, entry in shards]
    num_samples, num_classes = sum(entry.num_samples for entry in entries), len(plan.class_names)
    class_counts = np.zeros(num_classes, np.int64)
    index_path = partial.ready_dir / f"{split}.index.npy"
    labels_path = partial.ready_dir / f"{split}.labels.npy" if plan.task == "multi" else None
    with index_path.open("wb") as index, (labels_path or Path("/dev/null")).open("wb") as labels:
        _write_header(index, INDEX_ROW, (num_samples,))
        if labels_path:
            _write_header(labels, np.dtype(np.uint8), (num_samples, num_classes))
        for number, rows in enumerate(_rows_of(partial, shards)):
            of_index = _index_rows(number, rows)
            index.write(of_index.tobytes())
            if labels_path:
                hot = _label_rows(rows, num_classes)
                labels.write(hot.tobytes())
                class_counts += hot.sum(axis=0, dtype=np.int64)
            else:
                class_counts += np.bincount(of_index["label"], minlength=num_classes)
    return SplitEntry(entries, _entry(index_path), class_counts.tolist(), _entry(labels_path) if labels_path else None)


def _rows_of(partial: Partial, shards: list[tuple[str, ShardEntry]]) -> Iterator[list[list[int]]]:
    for name, _ in shards:
        sidecar = partial.read_sidecar(name)
        assert sidecar is not None
        yield sidecar["rows"]


def _index_rows(shard: int, rows: list[list[int]]) -> npt.NDArray[np.void]:
    return np.array([(shard, row[0], row[1], _first_label(row)) for row in rows], dtype=INDEX_ROW)


def _label_rows(rows: list[list[int]], num_classes: int) -> npt.NDArray[np.uint8]:
    hot = np.zeros((len(rows), num_classes), np.uint8)
    for number, (_, _, *labels) in enumerate(rows):
        hot[number, labels] = 1
    return hot


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    # Written like any file: a memory map of a file that the disk has no room for ends the process by SIGBUS.
    values = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, values)


def _entry(path: Path) -> IndexEntry:
    fsync_file(path)
    return IndexEntry(path.name, sha256_of(path))


# ---- into its place ----


def publish_dataset(partial: Partial) -> DatasetManifest:
    """Give an assembled data set its place; the one that is there is kept under another name."""
    folder = partial.folder
    moves = json.loads((partial.ready_dir / MOVES_NAME).read_bytes())
    move_earlier_out(partial)
    _remove_leftovers(folder, keep={name for _, name in moves})
    for origin, name in moves:
        if (partial.root / origin).exists():  # not yet moved by a run that was cut short here
            (partial.root / origin).rename(folder / name)
    fsync_folder(folder)
    (partial.ready_dir / MANIFEST_NAME).rename(folder / MANIFEST_NAME)
    fsync_folder(folder)
    partial.remove()
    return load_dataset(folder)


def move_earlier_out(partial: Partial) -> None:
    """Move a complete data set out of the folder, which from then on holds none, and keep it beside under another name."""
    folder = partial.folder
    manifest = folder / MANIFEST_NAME
    if not manifest.exists() and not partial.earlier_dir.exists():
        return
    partial.earlier_dir.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST_NAME):
        if path.name != PARTIAL:
            path.rename(partial.earlier_dir / path.name)
    fsync_folder(partial.earlier_dir)
    aside = move_aside(partial.earlier_dir, like=folder.resolve())
    fsync_folder(folder.resolve().parent)
    say(f"the earlier data set is kept as {aside}")


def _remove_leftovers(folder: Path, keep: set[str]) -> None:
    """Remove shards of an attempt that never became complete: who reads `train-*.tar` would train on them too."""
    for path in folder.iterdir():
        if OWN_NAMES.fullmatch(path.name) and path.name not in keep and path.name != PARTIAL:
            path.unlink()
