"""`shardline index`: a data set around shards that others wrote, which are read and never touched.

dataset.json and the index files are written beside them. Shards for training may also be named without being read
(`--stream`): they are then trained on as a stream.
"""

import datetime
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pipeline
from pipeline.console import say, track
from pipeline.data.encode import PixelSums, stats_of
from pipeline.data.labels import (
    CLASS_LIST,
    RawLabel,
    SampleRule,
    are_numbers,
    numbered_classes,
    read_class_list,
    require_label_rule,
    require_text,
)
from pipeline.data.parallel import run_parallel
from pipeline.data.shards import read_samples
from pipeline.errors import ConfigError, DataError
from pipeline.files import move_aside, publish, sha256_of, temporary_name
from pipeline.manifest import (
    INDEX_ROW,
    MANIFEST_NAME,
    DatasetManifest,
    ImageStats,
    IndexEntry,
    ShardEntry,
    SplitEntry,
    Task,
    read_manifest,
)
from pipeline.preprocess import WHITE, open_image

SPLITS = ("train", "val", "test")
SPLIT_IN_NAME = re.compile(r"(?:^|[/_.-])(train|val|test)(?:ing|id|idation)?(?=[/_.-]|\d|$)", re.IGNORECASE)
COMPRESSED_NAMES = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")
IMAGES_FOR_STATISTICS = 10_000
DEFECTS_NAMED = 3


@dataclass(frozen=True)
class Adoption:
    """What the user said of the shards: patterns of each split, where labels and images lie, and the classes."""

    patterns: dict[str, str] = field(default_factory=dict)
    stream: str = ""
    label: str = "cls"
    image: str = ""
    classes: Path | None = None


@dataclass(frozen=True)
class ReadShard:
    """What reading a shard once gave; `labels` are as written there."""

    split: str
    number: int
    name: str
    num_bytes: int
    sha256: str
    places: npt.NDArray[np.uint64]  # (n, 2): offset and size of each image
    labels: list[list[RawLabel]]
    defect: str = ""


def adopt_shards(folder: Path, adoption: Adoption, *, fresh: bool = False) -> tuple[DatasetManifest, bool]:
    """Return the data set of the shards in `folder`, and whether it had to be written. Raises ConfigError or DataError."""
    require_label_rule(adoption.label)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards.")
    names = find_shards(folder, adoption)
    streams = {"train": expand(folder, adoption.stream)} if adoption.stream else {}
    preparation: dict[str, Any] = {"source": "index", "label": adoption.label, "image": adoption.image}
    known = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    if known is not None and not fresh:
        listed = listed_classes(folder, adoption.classes)
        if _is_same(known, names, streams, preparation) and listed in (None, known.class_names):
            return known, False
        raise DataError(f"{folder}: has a {MANIFEST_NAME} of other shards or settings. Give --fresh to write another.")
    shards = read_all(folder, names, SampleRule(adoption.label, adoption.image, ()))
    class_names = find_classes(folder, adoption.classes, shards)
    manifest = build(folder, shards, class_names, preparation)
    if known is not None:
        say(f"the earlier {MANIFEST_NAME} is kept as {move_aside(folder / MANIFEST_NAME)}")
    return replace(manifest, streams=streams).save(), True


def _is_same(
    known: DatasetManifest, names: dict[str, list[str]], streams: dict[str, list[str]], preparation: dict[str, Any]
) -> bool:
    found = {split: [(shard.name, shard.num_bytes) for shard in entry.shards] for split, entry in known.splits.items()}
    wanted = {split: [(name, (known.folder / name).stat().st_size) for name in shards] for split, shards in names.items()}
    return (found, known.streams, known.preparation) == (wanted, streams, preparation)


# ---- which shards ----


def find_shards(folder: Path, adoption: Adoption) -> dict[str, list[str]]:
    """The shards of each split, by the patterns or else by their names. Raises DataError for what cannot be told."""
    if adoption.patterns:
        names = {split: expand(folder, adoption.patterns[split]) for split in SPLITS if split in adoption.patterns}
    else:
        names = _by_name(folder, adoption)
    for split, shards in names.items():
        for name in shards:
            if not (folder / name).is_file():
                raise DataError(f"{folder / name}: no such shard (named for {split}).")
    every = [name for shards in names.values() for name in shards]
    twice = next((name for name in every if every.count(name) > 1), None) if len(set(every)) < len(every) else None
    if twice is not None:
        raise DataError(f"{folder / twice}: is named for two splits, or twice for one.")
    if not every:
        raise DataError(f"{folder}: holds no shard that could be indexed. Name them: --train 'PATTERN' --val 'PATTERN'.")
    return names


def _by_name(folder: Path, adoption: Adoption) -> dict[str, list[str]]:
    streamed = set(expand(folder, adoption.stream)) if adoption.stream else set()
    names: dict[str, list[str]] = {}
    unknown = []
    # Compressed ones are refused where they are opened, with what to do about them.
    found = itertools.chain.from_iterable(folder.rglob(pattern) for pattern in ("*.tar", *COMPRESSED_NAMES))
    for path in sorted(found):
        name = path.relative_to(folder).as_posix()
        if name in streamed:
            continue
        split = SPLIT_IN_NAME.search(name)
        if split is None:
            unknown.append(name)
        else:
            names.setdefault(split[1].lower(), []).append(name)
    if unknown:
        shown = ", ".join(unknown[:DEFECTS_NAMED]) + (", ..." if len(unknown) > DEFECTS_NAMED else "")
        raise DataError(f"{folder}: no split can be told from the names of {shown}. Say --train 'PATTERN' --val 'PATTERN'.")
    return {split: names[split] for split in SPLITS if split in names}


def expand(folder: Path, patterns: str) -> list[str]:
    """Names relative to `folder`, or URLs, of a list of patterns: globs, brace lists (`{000..017}`), a listing (URL/)."""
    names: list[str] = []
    for pattern in _split_at_commas(patterns):
        for name in _braces(pattern):
            if "://" in name or name.startswith("pipe:"):
                names += _expand_url(name)
            elif any(letter in name for letter in "*?["):
                found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(name))
                if not found:
                    raise DataError(f"{folder}: no file fits '{name}'.")
                names += found
            else:
                names.append(name)
    return names


def _split_at_commas(patterns: str) -> list[str]:
    depth, parts = 0, [""]
    for letter in patterns:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"'{pattern}' has unbalanced braces.") from error


def _expand_url(url: str) -> list[str]:
    import fsspec

    protocol = url.partition(":")[0]
    if protocol not in fsspec.available_protocols():
        raise ConfigError(f"'{url}' begins with {protocol}:, from which no shard is read. Use https, s3, gs or a path.")
    if not url.endswith("/"):
        return [url]
    system, path = fsspec.core.url_to_fs(url)
    try:
        found = sorted(str(name) for name in system.ls(path, detail=False) if str(name).endswith((".tar", ".tar.gz", ".tgz")))
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be listed ({error or type(error).__name__}).") from error
    if not found:
        raise DataError(f"{url}: lists no .tar file.")
    return [name if "://" in name else system.unstrip_protocol(name) for name in found]


# ---- what they hold ----


def read_all(folder: Path, names: dict[str, list[str]], rule: SampleRule) -> list[ReadShard]:
    """Read every shard once, in parallel; in the order of splits and names. Raises DataError naming defective ones."""
    jobs = [(split, number, name) for split, shards in names.items() for number, name in enumerate(shards)]
    results = run_parallel(lambda job: _read_shard(folder, *job, rule), jobs)
    shards = sorted(track(results, "index", len(jobs), "shards"), key=lambda shard: (SPLITS.index(shard.split), shard.number))
    defects = [shard.defect for shard in shards if shard.defect]
    if defects:
        more = f" And {len(defects) - 1} other shards are defective." if len(defects) > 1 else ""
        raise DataError(f"{defects[0]}{more}")
    return shards


def _read_shard(folder: Path, split: str, number: int, name: str, rule: SampleRule) -> ReadShard:
    path = folder / name
    try:
        samples = list(read_samples(path, rule))
    except DataError as error:
        return ReadShard(split, number, name, 0, "", np.zeros((0, 2), np.uint64), [], defect=str(error))
    places = np.array([(sample.offset, sample.size) for sample in samples], np.uint64).reshape(-1, 2)
    labels = [sample.labels for sample in samples]
    return ReadShard(split, number, name, path.stat().st_size, sha256_of(path), places, labels)


def listed_classes(folder: Path, listed: Path | None) -> list[str] | None:
    """The classes in the list that was named, or else in classes.txt beside the shards; None where there is neither."""
    path = listed if listed is not None else folder / CLASS_LIST
    if listed is not None and not listed.is_file():
        raise DataError(f"{listed}: no such list of classes (one name a line).")
    if not path.is_file():
        return None
    return read_class_list(path)


def find_classes(folder: Path, listed: Path | None, shards: list[ReadShard]) -> list[str]:
    """The class names: of a list if there is one, else the names among the labels, else numbers."""
    given = listed_classes(folder, listed)
    if given is not None:
        return given
    found = {label for shard in shards for labels in shard.labels for label in labels}
    names = sorted(label for label in found if isinstance(label, str))
    require_text(names, str(folder))
    numbers = {label for label in found if isinstance(label, int)}
    if names and numbers:
        raise DataError(
            f"{folder}: labels are names ({names[0]}) and numbers ({min(numbers)}). Say which classes: --classes FILE."
        )
    if are_numbers(names):
        names, numbers = [], set(map(int, names))
    classes = names or numbered_classes(numbers, str(folder), "name a file with --classes")
    if len(classes) < 2:
        raise DataError(f"{folder}: has {len(classes)} classes ({', '.join(classes)}); at least 2 are needed.")
    return classes


def build(folder: Path, shards: list[ReadShard], class_names: list[str], preparation: dict[str, Any]) -> DatasetManifest:
    """Write the index files and return the manifest, which is not yet written."""
    is_list = any(len(labels) != 1 for shard in shards for labels in shard.labels)
    task: Task = "multi" if is_list else "single"
    splits = {}
    for split in SPLITS:
        of_split = [shard for shard in shards if shard.split == split]
        if of_split:
            splits[split] = _write_split(folder, split, of_split, class_names, task)
    statistics_of = "train" if "train" in splits else next(iter(splits))
    return DatasetManifest(
        task=task,
        class_names=class_names,
        splits=splits,
        image_stats=sample_statistics(folder, statistics_of, [shard for shard in shards if shard.split == statistics_of]),
        preparation=preparation,
        info={
            "source": "index",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tool_version": pipeline.__version__,
            "num_ignored": 0,
        },
        digest="",
        folder=folder,
    )


def _write_split(folder: Path, split: str, shards: list[ReadShard], class_names: list[str], task: Task) -> SplitEntry:
    rule = SampleRule("", "", tuple(class_names))
    num_samples = sum(len(shard.labels) for shard in shards)
    rows = np.zeros(num_samples, INDEX_ROW)
    matrix = np.zeros((num_samples, len(class_names)) if task == "multi" else (0, 0), np.uint8)  # (N, K)
    first = 0
    for shard in shards:
        part = rows[first : first + len(shard.labels)]
        part["shard"], part["offset"], part["size"] = shard.number, shard.places[:, 0], shard.places[:, 1]
        for place, labels in enumerate(shard.labels):
            try:
                numbers = [rule.class_number(label) for label in labels]
            except DataError as error:
                raise DataError(f"{folder / shard.name}: sample number {place + 1} {error} of {len(class_names)}.") from error
            part["label"][place] = numbers[0] if numbers else -1
            if task == "multi":
                matrix[first + place, numbers] = 1
        first += len(part)
    index = _save_array(folder / f"{split}.index.npy", rows)
    labels_entry = _save_array(folder / f"{split}.labels.npy", matrix) if task == "multi" else None
    counts = matrix.sum(axis=0, dtype=np.int64) if task == "multi" else np.bincount(rows["label"], minlength=len(class_names))
    entries = [ShardEntry(shard.name, len(shard.labels), shard.num_bytes, shard.sha256) for shard in shards]
    return SplitEntry(entries, index, counts.tolist(), labels_entry)


def _save_array(path: Path, array: npt.NDArray[Any]) -> IndexEntry:
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        np.save(file, array)
    publish(temporary, path)
    return IndexEntry(path.name, sha256_of(path))


def sample_statistics(folder: Path, split: str, shards: list[ReadShard]) -> ImageStats:
    """Mean and standard deviation over at most 10,000 images, spread evenly over the shards; undecodable ones are left out."""
    total = sum(len(shard.labels) for shard in shards)
    chosen = np.unique(np.linspace(0, total - 1, min(total, IMAGES_FOR_STATISTICS)).round().astype(np.int64))
    jobs, first = [], 0
    for shard in shards:
        mine = chosen[(chosen >= first) & (chosen < first + len(shard.labels))] - first
        jobs.append((folder / shard.name, shard.places[mine]))
        first += len(shard.labels)
    count, sums, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for pixels in run_parallel(lambda job: _sums_of(*job), jobs):
        count += pixels[0]
        sums += pixels[1]
        squares += pixels[2]
    return stats_of(count, sums.tolist(), squares.tolist(), split)


def _sums_of(path: Path, places: npt.NDArray[np.uint64]) -> tuple[int, list[int], list[int]]:
    sums = PixelSums()
    with path.open("rb") as file:
        for offset, size in places.tolist():
            file.seek(offset)
            for image in _decodable(file.read(size)):
                sums.add(image)
    return sums.totals()


def _decodable(encoded: bytes) -> Iterator[Any]:
    try:
        yield open_image(encoded, WHITE)
    except DataError:
        return
