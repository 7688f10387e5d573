"""`shardline bench serve`: our server beside others with the same ONNX file, images and clients, in turns; tables and verdicts.

A server and all its processes have one core, the clients another. Verdicts on throughput are passed on requests a CPU-second:
what one core answers in a second that it has for itself, also on a machine where others want their share of it.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pipeline.bench.load import Answer
from pipeline.bench.measure import Figures, in_process
from pipeline.bench.results import Benchmark, Target, median
from pipeline.bench.served_models import CASES, Case
from pipeline.bench.servers import (
    FASTAPI,
    LITSERVE,
    MLFLOW,
    OURS,
    SERVERS,
    Running,
    ask_all,
    is_installed,
    pinned,
    request_for,
    serving,
    top_of,
)
from pipeline.console import say
from pipeline.errors import ConfigError
from pipeline.predictor import Predictor
from pipeline.preprocess import decode_image

PARTS = tuple(CASES)
PACKAGES = ("onnxruntime", "numpy", "pillow", "uvicorn", "fastapi", "litserve", "mlflow")
# Of a probability: a server may resize in another order, not see other pixels.
MOST_ABS = 1e-3
# Beside whom, with requests of which form, how many times as many requests a CPU-second.
GOALS = ((FASTAPI, "multipart", 1.5), (LITSERVE, "multipart", 4.0), (MLFLOW, "json", 4.0))
MOST_MS_ABOVE_MODEL = 1.0
ALONE = "model alone"

Found = dict[str, list[Figures]]  # by row of a table: one a round


def require_right(predictor: Predictor, image: Path, answer: Answer) -> None:
    """Raise RuntimeError unless a server answers as the model does: one that does not, does other work."""
    if answer.status != 200:
        raise RuntimeError(f"answered {answer.status}: {answer.body[:200]!r}")
    (row,) = predictor.probabilities([decode_image(image.read_bytes(), predictor.spec)])
    label, probability = top_of(answer.body, predictor.class_names)
    wanted = predictor.class_names[int(row.argmax())]
    if label != wanted or abs(probability - float(row.max())) > MOST_ABS:
        raise RuntimeError(f"says {label} {probability:.4f} of {image.name}, the model {wanted} {row.max():.4f}")


def run_benchmark(out: Path, parts: list[str], rounds: int) -> Benchmark:
    """Measure every server that is installed, each in turn in every round, and leave bench.json in `out`.

    Raises ConfigError on a machine with one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("`bench serve` needs two cores, one for the server and one for its clients; here is one.")
    benchmark = Benchmark({}, [], {name: "not installed" for name in SERVERS if not is_installed(name)})
    for part in parts:
        case = CASES[part](out / part)
        alone: Found = {ALONE: []}
        found: dict[int, Found] = {clients: {} for clients in case.clients}
        for number in range(rounds):
            with pinned(cores[0]):
                alone[ALONE].append(in_process("model", model=str(case.model), images=[str(path) for path in case.images]))
            for name in [name for name in SERVERS if name not in benchmark.left_out]:
                say(f"{part}, round {number + 1} of {rounds}: {name}")
                try:
                    _measure_server(name, case, found, cores[0], cores[1])
                except (RuntimeError, OSError) as error:
                    benchmark.left_out[name] = f"failed: {error}"
        add_verdicts(benchmark, part, alone, found)
    benchmark.write(out / "bench.json", PACKAGES)
    return benchmark


def _measure_server(name: str, case: Case, found: dict[int, Found], core: int, core_of_clients: int) -> None:
    """One turn of a server: every form with every number of clients."""
    folder, predictor = case.model.parent, Predictor(case.model)
    requests = {
        form: [request_for(SERVERS[name], form, path.read_bytes(), predictor) for path in case.images]
        for form in SERVERS[name].urls
    }
    first = next(iter(requests.values()))[0]
    with serving(name, case.model, core, first, folder / f"{name}.log") as server:
        for form, contents in requests.items():
            for image, answer in zip(case.images, asyncio.run(ask_all(server.port, contents)), strict=True):
                require_right(predictor, image, answer)
            kept = _keep(contents, folder / f"{name}-{form}")
            for clients in case.clients:
                with pinned(core_of_clients):
                    figures = _load(server, kept, clients, case.seconds)
                found[clients].setdefault(f"{name}, {form}", []).append(figures)


def _keep(requests: list[bytes], folder: Path) -> Path:
    """Write requests where the clients find them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, request in enumerate(requests):
        (folder / f"{number:03d}.http").write_bytes(request)
    return folder


def _load(server: Running, folder: Path, clients: int, seconds: float) -> Figures:
    """What the clients say, and what they got for the CPU time of the server's processes."""
    wanted = json.dumps({"port": server.port, "folder": str(folder), "clients": clients, "seconds": seconds})
    command = [sys.executable, "-m", "pipeline.bench.load", wanted]
    before = server.cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    spent = server.cpu_seconds() - before
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RuntimeError(f"{clients} clients: {said[-1]}")
    figures: Figures = json.loads(done.stdout)
    # Linux counts in ticks of 10 ms: at least one.
    return {"requests_a_cpu_second": figures.pop("requests") / max(spent, 0.01), **figures}


def add_verdicts(benchmark: Benchmark, part: str, alone: Found, found: dict[int, Found]) -> None:
    """Add the tables of a part, and the verdicts: with digits, where it is not the network that takes the time."""
    benchmark.figures[part] = {ALONE: median(alone[ALONE])}
    for clients, rows in found.items():
        benchmark.figures[f"{part}, clients: {clients}"] = {name: median(rounds) for name, rounds in rows.items()}
    if part != "digits":
        return
    for name, form, goal in GOALS:
        for clients, rows in list(found.items())[1:]:
            ratio = _ratio(rows, f"{OURS}, {form}", f"{name}, {form}")
            if ratio is not None:
                what = f"requests a CPU-second beside {name}, {clients} clients"
                benchmark.targets.append(Target(what, ratio, f">= {goal} x", ratio >= goal))
    ours = found[1].get(f"{OURS}, raw")
    if ours:
        # The least of the rounds: a busy machine only ever adds.
        above = min(us["p50_ms"] for us in ours) - min(model["run_ms"] for model in alone[ALONE])
        goal_ms = f"<= {MOST_MS_ABOVE_MODEL:.0f} ms"
        benchmark.targets.append(
            Target("p50 of one client above the model's time", above, goal_ms, above <= MOST_MS_ABOVE_MODEL)
        )


def _ratio(rows: Found, ours: str, theirs: str) -> float | None:
    """Median over the rounds of our requests a CPU-second beside theirs; None where one of them is missing."""
    if not {ours, theirs} <= rows.keys():
        return None
    pairs = zip(rows[ours], rows[theirs], strict=False)
    return statistics.median(us["requests_a_cpu_second"] / them["requests_a_cpu_second"] for us, them in pairs)
