"""`shardline bench model`: what an exported model costs to ask, by runtime, precision, batch size and number of threads.

Every contender answers the golden vectors first; one that answers otherwise is not timed. They take turns in one process, so
that a machine that is busy with something else for a while slows all of them alike. What is not installed here, or was not
exported, is left out by name.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.bench.plot import draw_models
from pipeline.bench.results import describe_machine
from pipeline.bench.runtimes import FORMS, Answer, Images, Runtime, runtimes
from pipeline.config import Precision
from pipeline.console import say
from pipeline.errors import ModelError, RunError
from pipeline.export.latency import Turns, percentile_ms, take_turns, times_as_long
from pipeline.files import write_json
from pipeline.golden import GOLDEN, MOST_ABS, GoldenVectors
from pipeline.predictor import Predictor
from pipeline.run import RUN_NAME

BATCHES = (1, 8, 32)
PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")
SECONDS_A_TURN = 0.2
BESIDE = "onnxruntime fp32"  # the published model as it is served
FIGURES, PICTURE = Path("model.json"), Path("model.png")


@dataclass(frozen=True)
class ModelFigures:
    """Milliseconds of a call with `batch` images; `times` is how many times as long as onnxruntime's with fp32 it is."""

    contender: str
    batch: int
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_a_second: float
    times: float


@dataclass
class ModelBenchmark:
    """All figures of a model, and who was left out and why."""

    model: str
    figures: list[ModelFigures] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def bench_model(path: Path, out: Path, rounds: int) -> ModelBenchmark:
    """Time everything that can ask the model of a run, or the model file, `path`; leaves model.json and model.png in `out`."""
    export_dir, run_dir = find_model(path)
    golden = {precision: read_golden(export_dir / form) for precision, form in FORMS.items() if (export_dir / form).is_file()}
    benchmark = ModelBenchmark(str(export_dir / FORMS["fp32"]))
    for threads in thread_counts():
        _bench_threads(benchmark, runtimes(export_dir, run_dir), golden, threads, rounds)
    if not any(figures.contender == BESIDE for figures in benchmark.figures):
        raise ModelError(f"{benchmark.model}: {benchmark.left_out[BESIDE]}. `shardline verify` says more.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FIGURES, {**dataclasses.asdict(benchmark), "rounds": rounds, "machine": describe_machine(PACKAGES)})
    draw_models(benchmark.figures, out / PICTURE)
    return benchmark


def find_model(path: Path) -> tuple[Path, Path | None]:
    """The folder of a model and its forms, and its run folder if it lies in one. Raises ModelError or RunError."""
    if path.is_dir():
        if not (path / RUN_NAME).is_file():
            raise RunError(f"{path}: no run there (no {RUN_NAME}). Name a run folder or a model.onnx.")
        path = path / "export" / FORMS["fp32"]
    folder = path.parent
    Predictor(path)  # which says what is wrong with a file that is no model
    if folder.name in FORMS:
        folder = folder.parent
        Predictor(folder / FORMS["fp32"])
    run_dir = folder.parent
    return folder, run_dir if (run_dir / RUN_NAME).is_file() else None


def read_golden(path: Path) -> GoldenVectors:
    """The golden vectors beside a model. Raises ModelError where there are none."""
    if not path.with_name(GOLDEN).is_file():
        raise ModelError(
            f"{path}: has no {GOLDEN} beside it to compare answers with. Copy it along, or export the model again."
        )
    return GoldenVectors.read(path.with_name(GOLDEN))


def thread_counts() -> list[int]:
    """One thread, and as many as this process has CPUs."""
    return sorted({1, len(os.sched_getaffinity(0))})


def _bench_threads(
    benchmark: ModelBenchmark,
    contenders: dict[str, Runtime],
    golden: dict[Precision, GoldenVectors],
    threads: int,
    rounds: int,
) -> None:
    answers: dict[str, Answer] = {}
    for name, contender in contenders.items():
        try:
            answers[name] = contender.make(threads)
        except Exception as error:  # each runtime has its own
            benchmark.left_out[name] = _reason(error)
    for batch in BATCHES:
        say(f"batches of {batch} on {threads} thread{'s' if threads > 1 else ''}")
        calls = {}
        for name, answer in answers.items():
            precision = contenders[name].precision
            images, wanted = golden_batch(golden[precision], batch)
            try:
                require_same(answer(images), wanted, precision)
            except Exception as error:
                benchmark.left_out[name] = _reason(error)
            else:
                calls[name] = functools.partial(answer, images)
        if BESIDE not in calls:
            return
        turns = take_turns(calls, rounds, SECONDS_A_TURN)
        benchmark.figures += [_figures(name, batch, threads, taken, turns[BESIDE]) for name, taken in turns.items()]


def golden_batch(golden: GoldenVectors, size: int) -> tuple[Images, npt.NDArray[np.float32]]:
    """Images (size, 3, H, W) and their probabilities (size, K): the golden ones, from the start again as often as needed."""
    places = np.arange(size) % len(golden.pixels)
    return np.ascontiguousarray(golden.pixels[places].transpose(0, 3, 1, 2)), golden.probabilities[places]


def require_same(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], precision: Precision) -> None:
    """Raises ModelError where the answers are not those that the model was published with."""
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not difference <= MOST_ABS[precision]:
        raise ModelError(f"answers otherwise: probabilities differ by {difference:.1e} (at most {MOST_ABS[precision]:.0e})")


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _figures(name: str, batch: int, threads: int, taken: Turns, beside: Turns) -> ModelFigures:
    seconds = [each for turn in taken for each in turn]
    p50, p90, p99 = (percentile_ms(taken, percent) for percent in (50, 90, 99))
    a_second = batch * len(seconds) / sum(seconds)
    return ModelFigures(name, batch, threads, p50, p90, p99, a_second, times_as_long(taken, beside))
