"""The loaders beside each other: the same images, the same crops, in turns; then what of our own each figure is to show."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.contenders import CONTENDERS, FFCV_RAW, OURS
from pipeline.bench.copies import QUALITY, SMALL_SIDE, bytes_of, mark
from pipeline.bench.measure import Figures, in_process
from pipeline.bench.results import Benchmark, Target, median
from pipeline.config import DatasetConfig
from pipeline.console import say
from pipeline.data import native
from pipeline.data.writer import prepare_dataset

MARKED = f"{OURS}, restart markers"
ONE_WORKER = f"{OURS}, 1 worker"
SMALL = f"{OURS} ({SMALL_SIDE} px)"
BARE, BARE_MARKED = "bare decode", "bare decode, restart markers"
GOALS = {
    "FFCV (JPEG)": 1.8,
    "DALI (CPU)": 2.0,
    "SPDL + torchvision": 2.2,
    "webdataset + torchvision": 2.6,
    "webdataset + Pillow": 3.5,
    "timm": 3.5,
    "litData": 3.0,
    "MosaicML Streaming": 4.5,
}
NUM_SHARDS = 8
MEMORY_EPOCHS = 10


@dataclass(frozen=True)
class Sets:
    """The images of a benchmark as class folders and as data sets, below one folder."""

    out: Path
    num_images: int

    @property
    def folder(self) -> Path:
        """Class folders of JPEG, as made."""
        return self.out / f"images-{self.num_images}"

    @property
    def dataset(self) -> Path:
        """Shards of them."""
        return self.out / f"shards-{self.num_images}"

    @property
    def marked_folder(self) -> Path:
        """Class folders of the same JPEGs with restart markers."""
        return self.out / f"images-{self.num_images}-marked"

    @property
    def copies(self) -> Path:
        """What only one contender reads."""
        return self.out / f"copies-{self.num_images}"

    def write(self, source: Path, target: Path, max_side: int | None = None) -> Path:
        """Shards of `source`, all of it for training."""
        config = DatasetConfig(
            source=str(source),
            val_fraction=0.0,
            test_fraction=0.0,
            samples_per_shard=max(1, self.num_images // NUM_SHARDS),
            max_side=max_side,
            jpeg_quality=QUALITY,
        )
        prepare_dataset(config, target)
        return target

    def loader(self, name: str, num_workers: int, dataset: Path | None = None) -> Callable[[], Figures]:
        """A turn of contender `name`."""
        arguments = self.arguments(name, num_workers, dataset)
        return lambda: in_process("loader", **arguments)

    def arguments(self, name: str, num_workers: int, dataset: Path | None = None) -> dict[str, str | int]:
        """How a contender is opened."""
        return {
            "name": name,
            "folder": str(self.folder),
            "dataset": str(dataset or self.dataset),
            "copies": str(self.copies),
            "num_workers": num_workers,
        }


def bench_loader(benchmark: Benchmark, sets: Sets, num_workers: int, rounds: int) -> None:
    """All loaders of the same images, and the bare decode of each file."""
    turns: dict[str, Callable[[], Figures]] = {}
    for name in (OURS, *GOALS, "ImageFolder + Pillow"):
        if _is_prepared(benchmark, sets, name):
            turns[name] = sets.loader(name, num_workers)
    if num_workers > 1:
        turns[ONE_WORKER] = sets.loader(OURS, 1)
    bare = {BARE: sets.folder}
    if native.is_built():
        marked = sets.write(mark(sets.folder, sets.marked_folder), sets.out / f"{sets.dataset.name}-marked")
        turns[MARKED] = sets.loader(OURS, num_workers, marked)
        bare[BARE_MARKED] = sets.marked_folder
    else:
        benchmark.left_out[MARKED] = f"the native decoder is not built; {native.HOW_TO_BUILD}"
    for name, folder in bare.items():
        turns[name] = lambda folder=folder: in_process("bare", folder=str(folder))  # type: ignore[misc]
    take_rounds(benchmark, "loader", turns, rounds)
    judge_loader(benchmark)


def judge_loader(benchmark: Benchmark) -> None:
    """Hold the figures of part `loader` against their goals."""
    for ours, bare, goal, shards in ((OURS, BARE, 0.9, "ordinary shards"), (MARKED, BARE_MARKED, 0.8, "restart markers")):
        benchmark.judge("loader", f"CPU of the loader beside a bare full decode, {shards}", "cpu_ms", ours, bare, most=goal)
    for name, goal in GOALS.items():
        benchmark.judge("loader", f"images/s beside {name}", "images_a_second", OURS, name, least=goal)
    peers = {name: benchmark.figures["loader"][name] for name in GOALS if name in benchmark.figures["loader"]}
    if peers:
        best = max(peers, key=lambda name: peers[name]["images_a_second"])
        benchmark.judge("loader", f"images/s beside the best, {best} (an aim)", "images_a_second", OURS, best, least=2.0)
    benchmark.judge("loader", "two workers beside one, images/s", "images_a_second", OURS, ONE_WORKER, least=1.85)
    if OURS in benchmark.figures["loader"]:
        seconds = [figures["startup_seconds"] for figures in benchmark.rounds["loader"][OURS]]
        what = f"seconds from opening {NUM_SHARDS} indexed shards to the first batch"
        middle = statistics.median(seconds)
        benchmark.targets.append(Target(what, middle, "< 0.5 s", middle < 0.5, (min(seconds), max(seconds))))


def bench_small(benchmark: Benchmark, sets: Sets, num_workers: int, rounds: int) -> None:
    """JPEGs of 256 px beside FFCV's raw pixels of the same size."""
    dataset = sets.write(sets.folder, sets.out / f"{sets.dataset.name}-{SMALL_SIDE}", SMALL_SIDE)
    turns = {SMALL: sets.loader(OURS, num_workers, dataset)}
    if _is_prepared(benchmark, sets, FFCV_RAW):
        turns[FFCV_RAW] = sets.loader(FFCV_RAW, num_workers)
    take_rounds(benchmark, "small", turns, rounds)
    if {SMALL, FFCV_RAW} <= benchmark.figures["small"].keys():
        what = f"{SMALL_SIDE} px JPEG shards beside FFCV's raw pixels, images/s"
        benchmark.judge("small", what, "images_a_second", SMALL, FFCV_RAW, least=0.85)
        ratio = bytes_of(sets.copies / "raw.beton") / sum(bytes_of(path) for path in dataset.glob("*.tar"))
        benchmark.targets.append(Target("bytes of FFCV's raw pixels beside these shards", ratio, ">= 7 x", ratio >= 7))


def bench_memory(benchmark: Benchmark, sets: Sets, num_workers: int) -> None:
    """What our loader holds after each of ten epochs."""
    figures = in_process("memory", epochs=MEMORY_EPOCHS, **sets.arguments(OURS, num_workers))
    benchmark.figures["memory"] = {OURS: figures}
    held = list(figures.values())
    growth = statistics.mean(held[-3:]) / statistics.mean(held[1:4])  # the first epoch fills what is then used again
    benchmark.targets.append(Target("memory after epochs 8 to 10 beside 2 to 4", growth, "<= 1.05 x", growth <= 1.05))


def take_rounds(benchmark: Benchmark, part: str, turns: dict[str, Callable[[], Figures]], rounds: int) -> None:
    """Let all take their turn in every round. One that fails is left out from then on, with the reason."""
    found: dict[str, list[Figures]] = {}
    for number in range(rounds):
        for name, turn in turns.items():
            if name in benchmark.left_out:
                continue
            say(f"round {number + 1} of {rounds}: {name}")
            try:
                found.setdefault(name, []).append(turn())
            except RuntimeError as error:
                benchmark.left_out[name] = f"failed: {error}"
                found.pop(name, None)
    benchmark.rounds[part] = found
    benchmark.figures[part] = {name: median(figures) for name, figures in found.items()}


def packages() -> Sequence[str]:
    """The packages whose versions belong to the figures."""
    named = dict.fromkeys(contender.package for contender in CONTENDERS.values())
    return (*named, "nvidia-dali-cuda120", "lightning", "mlflow", "numpy", "pillow", "simplejpeg")


def _is_prepared(benchmark: Benchmark, sets: Sets, name: str) -> bool:
    if not CONTENDERS[name].is_installed:
        benchmark.left_out[name] = "not installed"
        return False
    if CONTENDERS[name].prepare is not None:
        say(f"preparing {name}")
        try:
            in_process("prepare", **sets.arguments(name, 1))
        except RuntimeError as error:
            benchmark.left_out[name] = f"failed: {error}"
            return False
    return True
