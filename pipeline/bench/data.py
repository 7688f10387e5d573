"""`shardline bench data`: our loader and loop beside the others, interleaved in one run; table, plot and verdicts."""

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.bench.contenders import OURS
from pipeline.bench.images import make_images
from pipeline.bench.loaders import Sets, bench_loader, bench_memory, bench_small, packages
from pipeline.bench.measure import Figures, in_process
from pipeline.bench.results import Benchmark, Target, median
from pipeline.bench.table import as_markdown
from pipeline.console import say
from pipeline.data import native
from pipeline.files import write_bytes
from pipeline.manifest import INDEX_ROW, DatasetManifest, ImageStats, IndexEntry, ShardEntry, SplitEntry

PARTS = ("loader", "small", "memory", "step", "read", "open", "write")
RESULTS = "results"  # in the folder of the benchmark; beside it lie the images
SYNTHETIC_SAMPLES = 100_000_000
SYNTHETIC_SHARDS = 20_000


def run_benchmark(out: Path, parts: list[str], num_images: int, num_workers: int, rounds: int, steps: int = 500) -> Benchmark:
    """Measure `parts`, each contender in turn in every round, and leave bench.json, bench.md and bench.png in OUT/results."""
    sets = Sets(out, num_images)
    make_images(sets.folder, num_images)
    sets.write(sets.folder, sets.dataset)
    benchmark = Benchmark({}, [], {}, notes=[f"Our crops are decoded by {native.describe(None)}."])
    measures: dict[str, Callable[[], None]] = {
        "loader": lambda: bench_loader(benchmark, sets, num_workers, rounds),
        "small": lambda: bench_small(benchmark, sets, num_workers, rounds),
        "memory": lambda: bench_memory(benchmark, sets, num_workers),
        "step": lambda: _bench_step(benchmark, out, steps, rounds),
        "read": lambda: _bench_read(benchmark, sets.dataset, rounds),
        "open": lambda: _bench_open(benchmark, out),
        "write": lambda: _bench_write(benchmark, out, sets.folder, rounds),
    }
    for part, measure in measures.items():
        if part in parts:
            measure()
            _write_results(benchmark, out / RESULTS)  # an hour's work is not lost with what comes after it
    return benchmark


def _write_results(benchmark: Benchmark, folder: Path) -> None:
    benchmark.write(folder / "bench.json", packages())
    write_bytes(folder / "bench.md", as_markdown(benchmark, packages()).encode())
    if benchmark.rounds.get("loader"):
        from pipeline.bench.plot import draw

        draw(benchmark.rounds["loader"], folder / "bench.png")


def _bench_step(benchmark: Benchmark, out: Path, steps: int, rounds: int) -> None:
    from pipeline.bench.step import MOST_ADDED

    say(f"a training step, {rounds} rounds")
    figures = in_process("step", folder=str(out / "step"), steps=steps, rounds=rounds)
    benchmark.figures["step"] = {name: {"cpu_us": figure} for name, figure in figures.items()}
    benchmark.rounds["step"] = {name: [figure] for name, figure in benchmark.figures["step"].items()}
    added = figures["shardline train"] - figures["bare Trainer"]
    what = "CPU us a step that metrics, logging and callbacks add to a bare Trainer"
    benchmark.targets.append(Target(what, added, f"<= {MOST_ADDED:g}", added <= MOST_ADDED))


def _bench_read(benchmark: Benchmark, dataset: Path, rounds: int) -> None:
    found: dict[str, list[Figures]] = {OURS: [], "webdataset": []}
    for _ in range(rounds):
        for name, figures in found.items():
            one = in_process("read", name=name, dataset=str(dataset))
            figures.append({**one, "samples_a_second": one["samples"] / one["seconds"]})
    benchmark.figures["read"] = {name: median(figures) for name, figures in found.items()}
    pairs = zip(found[OURS], found["webdataset"], strict=True)
    ratio = statistics.median(us["samples_a_second"] / them["samples_a_second"] for us, them in pairs)
    benchmark.targets.append(Target("reading without decoding beside webdataset", ratio, ">= 3 x", ratio >= 3))


def _bench_open(benchmark: Benchmark, out: Path) -> None:
    synthetic = make_synthetic(out / "synthetic")
    found = {f"at {share:.0%}": in_process("open", dataset=str(synthetic), share=share) for share in (0.0, 0.9)}
    shutil.rmtree(synthetic)
    benchmark.figures["open"] = found
    start, late = found["at 0%"], found["at 90%"]
    benchmark.targets.extend(
        [
            Target("seconds to open 100 million samples", start["seconds"], "< 1 s", start["seconds"] < 1),
            Target("megabytes to open 100 million samples", start["megabytes"], "< 100 MB", start["megabytes"] < 100),
            Target("bytes a sample of the index", start["index_bytes_a_sample"], "<= 24", start["index_bytes_a_sample"] <= 24),
            Target(
                "first batch at 90 % of an epoch beside 0 %",
                late["batch_seconds"] / start["batch_seconds"],
                "about 1 x",
                late["batch_seconds"] < 2 * start["batch_seconds"] + 0.02,
            ),
        ]
    )


def make_synthetic(folder: Path) -> Path:
    """A data set of 100 million samples whose index is a file of holes, and which has no shard."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = np.lib.format.open_memmap(folder / "train.index.npy", "w+", INDEX_ROW, (SYNTHETIC_SAMPLES,))
    del rows
    each = SYNTHETIC_SAMPLES // SYNTHETIC_SHARDS
    shards = [ShardEntry(f"train-{number:06d}.tar", each, 1, f"{number:064x}") for number in range(SYNTHETIC_SHARDS)]
    split = SplitEntry(shards, IndexEntry("train.index.npy", "0" * 64), [SYNTHETIC_SAMPLES, 0])
    stats = ImageStats("train", [0.5] * 3, [0.25] * 3)
    DatasetManifest("single", ["a", "b"], {"train": split}, stats, {"source": "synthetic"}, {}, "", folder=folder).save()
    return folder


def _bench_write(benchmark: Benchmark, out: Path, folder: Path, rounds: int) -> None:
    cases = {
        "1 worker": (1, False),
        "2 workers": (2, False),
        "1 worker, trusting": (1, True),
        "2 workers, trusting": (2, True),
    }
    found: dict[str, list[Figures]] = {name: [] for name in ("parts alone", *cases)}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: writing")
        found["parts alone"].append(in_process("parts", folder=str(folder)))
        for name, (workers, trust) in cases.items():
            target = out / "written"
            shutil.rmtree(target, ignore_errors=True)
            found[name].append(in_process("write", folder=str(folder), target=str(target), workers=workers, trust=trust))
            shutil.rmtree(target)
    benchmark.figures["write"] = {name: median(figures) for name, figures in found.items()}

    def ratio(name: str, figure: str, to: Callable[[Figures], float], of: str = "parts alone") -> float:
        return statistics.median(one[figure] / to(other) for one, other in zip(found[name], found[of], strict=True))

    cpu = ratio("1 worker", "cpu_ms", lambda alone: alone["decode"] + alone["sha256"] + alone["tar"])
    scaling = ratio("2 workers", "images_a_second", lambda one: one["images_a_second"], of="1 worker")
    trusting = ratio("2 workers, trusting", "images_a_second", lambda alone: alone["tar_and_sha256_images_a_second"])
    benchmark.targets.extend(
        [
            Target("CPU time of writing beside decode + sha256 + tar", cpu, "<= 1.2 x", cpu <= 1.2),
            Target("writing with 2 workers beside 1", scaling, "> 1 x", scaling > 1),
            Target("writing with --trust and 2 workers beside tar + sha256", trusting, ">= 0.7 x", trusting >= 0.7),
        ]
    )
