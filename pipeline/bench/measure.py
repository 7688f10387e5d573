"""One measurement in a process of its own: `python -m pipeline.bench.measure JSON` prints its figures as JSON.

CPU time of a loader is that of a whole epoch, in this process with all its threads and in the worker processes, which end with
the epoch. Imports are not counted.
"""

import hashlib
import importlib
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Figures = dict[str, float]
BARE_WARM_UP = 50  # images
MODEL_SECONDS = 0.5  # for each figure of a model alone


def cpu_seconds() -> float:
    """User and system time of this process with its threads, and of its children, those that run and those that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + _cpu_seconds_of_children(os.getpid())


def _cpu_seconds_of_children(pid: int) -> float:
    seconds = 0.0
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            except FileNotFoundError:  # it ended meanwhile
                continue
            ticks = sum(int(field) for field in fields[11:15])  # utime, stime, and both of its ended children: proc(5)
            seconds += ticks / os.sysconf("SC_CLK_TCK") + _cpu_seconds_of_children(int(child))
    return seconds


def resident_bytes() -> int:
    """Memory of this process that is not shared with files: its own, and what it shares with its worker processes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def measure_loader(**arguments: Any) -> Figures:
    """Images a second and CPU milliseconds an image of a contender's second epoch; seconds to the first batch of its first.

    The first epoch is there for what is done once: caches, and what compiles itself. Arguments: as of `open_contender`.
    """
    begin, seconds_to_open = open_contender(**arguments)
    begun = time.perf_counter()
    _, first, _ = _run_epoch(begin())
    startup = seconds_to_open + first - begun
    before = cpu_seconds()
    number, first, num_first = _run_epoch(begin())
    seconds = time.perf_counter() - first
    cpu = cpu_seconds() - before
    if number == num_first:
        raise RuntimeError("there are too few images for two batches")
    return {
        "images_a_second": (number - num_first) / seconds,
        "cpu_ms": cpu / number * 1e3,
        "startup_seconds": startup,
        "images": number,
    }


def open_contender(
    name: str, folder: str, dataset: str, copies: str, num_workers: int
) -> tuple[Callable[[], Iterator["torch.Tensor"]], float]:
    """What begins an epoch of the contender, and the seconds it took to make; without the imports, which come before."""
    import torch

    from pipeline.bench.contenders import CONTENDERS, Material

    torch.set_num_threads(1)
    contender = CONTENDERS[name]
    for module in contender.modules:
        importlib.import_module(module)
    begun = time.perf_counter()
    begin = contender.open(Material(Path(folder), Path(dataset), Path(copies), num_workers))
    return begin, time.perf_counter() - begun


def _run_epoch(batches: Iterator["torch.Tensor"]) -> tuple[int, float, int]:
    """The number of images, the moment of the first batch, and its number of images. Raises RuntimeError without any."""
    import torch

    number, first, num_first = 0, 0.0, 0
    for images in batches:
        if not number:
            first, num_first = time.perf_counter(), len(images)
            assert images.dtype == torch.uint8 and sorted(images.shape[1:]) == [3, 224, 224], (images.dtype, images.shape)
        number += len(images)
    if not number:
        raise RuntimeError("yielded nothing")
    return number, first, num_first


def prepare_contender(name: str, folder: str, dataset: str, copies: str, num_workers: int) -> Figures:
    """Make the form of the images that the contender reads, where it needs one of its own."""
    from pipeline.bench.contenders import CONTENDERS, Material

    prepare = CONTENDERS[name].prepare
    if prepare is not None:
        prepare(Material(Path(folder), Path(dataset), Path(copies), num_workers))
    return {}


def measure_bare_decode(folder: str) -> Figures:
    """Milliseconds of one thread that decodes each JPEG of a folder whole by libjpeg-turbo, its bytes in memory already."""
    import simplejpeg

    contents = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]
    for content in contents[:BARE_WARM_UP]:
        simplejpeg.decode_jpeg(content)
    begun, before = time.perf_counter(), cpu_seconds()
    for content in contents:
        simplejpeg.decode_jpeg(content)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - before
    return {"images_a_second": len(contents) / seconds, "cpu_ms": cpu / len(contents) * 1e3, "images": len(contents)}


def measure_memory(epochs: int, **arguments: Any) -> Figures:
    """Megabytes that this process holds after each epoch of a loader. Arguments: as of `open_contender`."""
    begin, _ = open_contender(**arguments)
    figures = {}
    for number in range(epochs):
        _run_epoch(begin())
        figures[f"after {number + 1}"] = resident_bytes() / 1e6
    return figures


def measure_step(folder: str, steps: int, rounds: int) -> Figures:
    """Microseconds of CPU that a training step takes, the least of some rounds: `pipeline.bench.step`."""
    from pipeline.bench.step import step_costs

    return {name: figures["us a step"] for name, figures in step_costs(Path(folder), steps, rounds).items()}


def measure_read(name: str, dataset: str) -> Figures:
    """Samples a second without decoding, in the order of training."""
    from pipeline.config import DataConfig, PreprocessConfig
    from pipeline.data.dataset import ShardDataset
    from pipeline.data.order import GlobalBatchSampler
    from pipeline.manifest import load_dataset
    from pipeline.preprocess import build_spec

    manifest = load_dataset(Path(dataset))
    if name == "webdataset":
        import webdataset

        shards = [str(manifest.folder / shard.name) for shard in manifest.split("train").shards]
        begun = time.perf_counter()
        number = sum(1 for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False) if sample["jpg"])
        return {"samples": number, "seconds": time.perf_counter() - begun}
    reader = ShardDataset(manifest, "train", build_spec(PreprocessConfig(resize=256, crop=[224, 224]), manifest.image_stats))
    batches = GlobalBatchSampler.of_training(reader.shards, DataConfig(drop_last=False), seed=0)
    begun = time.perf_counter()
    number = sum(1 for refs in batches for ref in refs if ref.weight and reader.encoded(ref.sample_index))
    return {"samples": number, "seconds": time.perf_counter() - begun}


def measure_open(dataset: str, share: float) -> Figures:
    """Seconds and bytes to open a data set and take the references of one batch, `share` of an epoch in."""
    import numpy as np
    import torch

    from pipeline.config import DataConfig, PreprocessConfig
    from pipeline.data.dataset import ShardDataset
    from pipeline.data.order import GlobalBatchSampler
    from pipeline.manifest import read_manifest
    from pipeline.preprocess import build_spec

    np.argsort(torch.zeros(2).numpy())
    before, begun = resident_bytes(), time.perf_counter()
    manifest = read_manifest(Path(dataset))
    data = ShardDataset(manifest, "train", build_spec(PreprocessConfig(resize=256, crop=[224, 224]), manifest.image_stats))
    batches = GlobalBatchSampler.of_training(data.shards, DataConfig(), seed=0)
    opened = time.perf_counter()
    batches.start = int(len(batches) * share)
    refs = next(iter(batches))
    labels = data.rows["label"][[ref.sample_index for ref in refs]]
    now = time.perf_counter()
    return {
        "samples": len(data),
        "seconds": now - begun,
        "batch_seconds": now - opened,
        "megabytes": (resident_bytes() - before) / 1e6,
        "index_bytes_a_sample": data.rows.nbytes / len(data),
        "batch": float(len(labels)),
    }


def measure_parts(folder: str) -> Figures:
    """CPU milliseconds an image of what writing cannot do without: full decode, sha256, tar; each alone."""
    from PIL import Image

    paths = sorted(Path(folder).rglob("*.jpg"))
    contents = [path.read_bytes() for path in paths]

    def timed(work: Callable[[], object]) -> float:
        begun = cpu_seconds()
        work()
        return (cpu_seconds() - begun) / len(paths) * 1e3

    def decode() -> None:
        for content in contents:
            Image.open(io.BytesIO(content)).load()

    archive = Path(folder).with_suffix(".reference.tar")
    begun = time.perf_counter()
    tar = timed(lambda: subprocess.run(["tar", "-cf", archive, "-C", folder, "."], check=True))
    hashed = timed(lambda: hashlib.sha256(archive.read_bytes()).hexdigest())
    seconds = time.perf_counter() - begun
    archive.unlink()
    return {"decode": timed(decode), "sha256": hashed, "tar": tar, "tar_and_sha256_images_a_second": len(paths) / seconds}


def measure_write(folder: str, target: str, workers: int, trust: bool) -> Figures:
    """CPU milliseconds an image and images a second of writing a data set."""
    from pipeline.config import DatasetConfig
    from pipeline.data.writer import prepare_dataset

    begun, cpu = time.perf_counter(), cpu_seconds()
    manifest, made = prepare_dataset(DatasetConfig(source=folder), Path(target), workers=workers, trust=trust)
    assert made
    number = sum(split.num_samples for split in manifest.splits.values())
    seconds = time.perf_counter() - begun
    return {"cpu_ms": (cpu_seconds() - cpu) / number * 1e3, "images_a_second": number / seconds, "images": number}


def measure_model(model: str, images: list[str]) -> Figures:
    """Milliseconds to decode one image and to run the network alone on one and on 16 of them, on one thread."""
    import numpy as np

    from pipeline.bench.session import Session
    from pipeline.export.latency import percentile_ms, take_turns

    session, photos = Session(Path(model)), itertools.cycle(images)
    one = session.decode(images[0])[None]
    many = np.repeat(one, 16, axis=0)
    calls: dict[str, Callable[[], object]] = {
        "decode_ms": lambda: session.decode(next(photos)),
        "run_ms": lambda: session.run(one),
        "run_16_ms": lambda: session.run(many),
    }
    turns = take_turns(calls, rounds=2, seconds=MODEL_SECONDS / 2)
    return {name: percentile_ms(taken, 50) for name, taken in turns.items()}


MEASUREMENTS: dict[str, Callable[..., Figures]] = {
    "loader": measure_loader,
    "prepare": prepare_contender,
    "bare": measure_bare_decode,
    "memory": measure_memory,
    "step": measure_step,
    "read": measure_read,
    "open": measure_open,
    "parts": measure_parts,
    "write": measure_write,
    "model": measure_model,
}


def in_process(kind: str, **arguments: Any) -> Figures:
    """Run a measurement in a fresh process and return its figures. Raises RuntimeError with the end of its error output."""
    command = [sys.executable, "-m", "pipeline.bench.measure", json.dumps({"kind": kind, **arguments})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    wanted = json.loads(sys.argv[1])
    print(json.dumps(MEASUREMENTS[wanted.pop("kind")](**wanted)))
