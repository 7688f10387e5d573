"""Figures of all workers in one piece of shared memory, and Prometheus' text about them.

Each worker adds to a row of its own, so nothing is locked, and any worker can be asked: it sums the rows. A worker that takes
the place of a dead one goes on in its row, so that no counter falls. (Prometheus' own client keeps a file for each process and
metric, and reads all of them at every scrape.)
"""

import bisect
import mmap
import os
import resource
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROUTES = ("predict", "tensor", "infer", "other", "none")
STATUSES = (200, 204, 400, 404, 405, 408, 413, 415, 422, 429, 431, 500, 503)
REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
PAGE_BYTES = resource.getpagesize()

COUNTERS = {
    "images_total": "Images that were answered.",
    "reloads_total": "Models that took the place of another.",
    "refused_models_total": "New models that were not taken.",
}
GAUGES = {
    "waiting_images": "Images that wait for their answer.",
    "connections": "Open connections.",
    "held_bytes": "Bytes of bodies that are held.",
    "resident_bytes": "Resident memory of the workers.",
    "ready_workers": "Workers that answer.",
}
HISTOGRAMS = {
    "request_seconds": ("From the first byte of a request for predictions to its answer.", REQUEST_SECONDS),
    "batch_seconds": ("Decoding and answering of a batch.", REQUEST_SECONDS),
    "batch_images": ("Images in a batch.", BATCH_SIZES),
}


def _places() -> dict[str, int]:
    """Where each series lies in a row."""
    names = [f"requests {route} {status}" for route in ROUTES for status in STATUSES]
    names += [*COUNTERS, *GAUGES]
    for name, (_, bounds) in HISTOGRAMS.items():
        names += [f"{name} {number}" for number in range(len(bounds) + 1)] + [f"{name} sum"]
    return {name: place for place, name in enumerate(names)}


PLACES = _places()


class Board:
    """Shared memory of (workers, series) doubles. `descriptor` is handed to the workers."""

    def __init__(self, num_workers: int, worker: int = 0, descriptor: int | None = None) -> None:
        num_bytes = num_workers * len(PLACES) * 8
        if descriptor is None:
            descriptor = os.memfd_create("shardline-metrics")
            os.truncate(descriptor, num_bytes)
        self.descriptor = descriptor
        memory = np.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=np.float64)
        self.rows: npt.NDArray[np.float64] = memory.reshape(num_workers, len(PLACES))
        self.row = self.rows[worker]

    def forget(self, worker: int) -> None:
        """Forget what a worker that died was at; what it has done stays."""
        for name in GAUGES:
            self.rows[worker, PLACES[name]] = 0

    def add(self, name: str, number: float = 1) -> None:
        """Count up."""
        self.row[PLACES[name]] += number

    def show(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.row[PLACES[name]] = value

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Take note of an answered request."""
        self.row[PLACES[f"requests {route} {status}"]] += 1
        if route in ROUTES[:3]:
            self.observe("request_seconds", seconds)

    def observe(self, name: str, value: float) -> None:
        """Put a value into a histogram."""
        first, (_, bounds) = PLACES[f"{name} 0"], HISTOGRAMS[name]
        self.row[first + bisect.bisect_left(bounds, value)] += 1
        self.row[first + len(bounds) + 1] += value

    def total(self, name: str) -> float:
        """The sum over all workers."""
        return float(self.rows[:, PLACES[name]].sum())


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def exposition(board: Board, info: dict[str, str]) -> str:
    """Prometheus' text format 0.0.4 of all workers; `info` are labels of the model that this worker has, if any."""
    lines = ["# HELP shardline_model_info The model.", "# TYPE shardline_model_info gauge"]
    if info:
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in info.items())
        lines.append(f"shardline_model_info{{{labels}}} 1")
    lines += ["# HELP shardline_requests_total Answered requests.", "# TYPE shardline_requests_total counter"]
    for route in ROUTES:
        for status in STATUSES:
            if number := board.total(f"requests {route} {status}"):
                lines.append(f'shardline_requests_total{{route="{route}",status="{status}"}} {number:.0f}')
    for kind, metrics in (("counter", COUNTERS), ("gauge", GAUGES)):
        for name, meaning in metrics.items():
            lines += [f"# HELP shardline_{name} {meaning}", f"# TYPE shardline_{name} {kind}"]
            lines.append(f"shardline_{name} {board.total(name):.0f}")
    for name, (meaning, bounds) in HISTOGRAMS.items():
        lines += [f"# HELP shardline_{name} {meaning}", f"# TYPE shardline_{name} histogram"]
        number = 0.0
        for place, bound in enumerate((*bounds, "+Inf")):
            number += board.total(f"{name} {place}")
            lines.append(f'shardline_{name}_bucket{{le="{bound}"}} {number:.0f}')
        lines += [f"shardline_{name}_sum {board.total(f'{name} sum'):.9g}", f"shardline_{name}_count {number:.0f}"]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
