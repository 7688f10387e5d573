"""How long models take to answer, side by side: in turns, so that a machine that is busy for a while slows all of them alike.

A newcomer would time one model after the other. What is compared is the ratio within each round, never two means of
different minutes.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime

from pipeline.config import Precision

# One call at a time on one thread: what a model costs, rather than how a machine shares out its cores.
THREADS = 1
ROUNDS = 7
SECONDS_A_TURN = 0.1
LEAST_CALLS = 3
Turns = list[list[float]]  # seconds of each call, by round
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call with `batch` images on `threads` CPU threads.

    `times_fp32` is how many times as long as fp32's it is: the median of the rounds' own ratios.
    """

    batch: int
    threads: int
    median_ms: float
    p90_ms: float
    times_fp32: float


def take_turns(contenders: Mapping[Name, Callable[[], object]], rounds: int, seconds: float) -> dict[Name, Turns]:
    """Time calls of each contender in every round, for `seconds` after one call to warm up; every second round backwards."""
    found: dict[Name, Turns] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            found[name].append(_turn(contenders[name], seconds))
    return found


def _turn(call: Callable[[], object], seconds: float) -> list[float]:
    call()
    taken = list[float]()
    while len(taken) < LEAST_CALLS or sum(taken) < seconds:
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return taken


def percentile_ms(turns: Turns, percent: float) -> float:
    """The percentile of all calls, in milliseconds."""
    return 1e3 * float(np.percentile(np.concatenate(turns), percent))


def times_as_long(turns: Turns, other: Turns) -> float:
    """How many times as long as the other's a call takes: the median of the ratios of the rounds' medians."""
    return statistics.median(
        statistics.median(mine) / statistics.median(theirs) for mine, theirs in zip(turns, other, strict=True)
    )


def open_timed(content: bytes, threads: int = THREADS) -> onnxruntime.InferenceSession:
    """A session as servers open it, on so many CPU threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def measure_latency(contents: Mapping[Precision, bytes], images: npt.NDArray[np.uint8]) -> dict[Precision, list[Latency]]:
    """Time serialized models, of which one is `fp32`, on one of `images`, (N, 3, H, W), and on all of them."""
    sessions = {name: open_timed(content) for name, content in contents.items()}
    found: dict[Precision, list[Latency]] = {name: [] for name in contents}
    for batch in sorted({1, len(images)}):
        feeds = {"image": images[:batch]}
        calls = {name: functools.partial(session.run, ["probabilities"], feeds) for name, session in sessions.items()}
        turns = take_turns(calls, ROUNDS, SECONDS_A_TURN)
        for name, taken in turns.items():
            median, p90 = percentile_ms(taken, 50), percentile_ms(taken, 90)
            found[name].append(Latency(batch, THREADS, median, p90, times_as_long(taken, turns["fp32"])))
    return found
