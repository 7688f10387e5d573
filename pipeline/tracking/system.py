"""CPU, memory, disk, network and GPUs of a machine as curves of the run.

Each machine has a journal of its own, since a journal has one writer; that of rank 0 delivers them all.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking.journal import FOLDER, Journal, last_steps
from pipeline.tracking.server import quieten

SECONDS_BETWEEN_SAMPLES = 10.0


def sample_until(ended: threading.Event, run_dir: Path, node: str | None = None) -> None:
    """Write down a sample now and then until the event is set; `node` names the machine where there are several."""
    path = run_dir / FOLDER / f"system-{socket.gethostname()}.jsonl"
    with contextlib.suppress(OSError):  # no room on the disk: others say so
        journal = Journal(path)
        prefix = f"system/{node}/" if node else "system/"
        step = _next_step(run_dir, prefix)
        monitors = build_monitors()
        while not ended.wait(SECONDS_BETWEEN_SAMPLES if step else 1.0):
            now = int(time.time() * 1000)
            figures = read_monitors(monitors)
            journal.add({"points": [[f"{prefix}{name}", value, now, step] for name, value in figures.items()]})
            step += 1


def _next_step(run_dir: Path, prefix: str) -> int:
    """The step after the last of these curves: a job that is requeued goes on with them on another machine."""
    paths = (run_dir / FOLDER).glob("system-*.jsonl")
    return 1 + max((step for path in paths for key, step in last_steps(path).items() if key.startswith(prefix)), default=-1)


def build_monitors() -> list[Any]:
    """MLflow's own monitors, of what this machine has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [kind() for kind in (CPUMonitor, DiskMonitor, NetworkMonitor)]
    with contextlib.suppress(ImportError, RuntimeError):  # no GPU
        monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
    return monitors


def read_monitors(monitors: list[Any]) -> dict[str, float]:
    """What the machine does right now, by MLflow's names."""
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return figures


@contextlib.contextmanager
def sampled(run_dir: Path, node: str | None = None) -> Iterator[threading.Event]:
    """Sample in a thread of this process as long as the block lasts, or until the event is set."""
    ended = threading.Event()
    thread = threading.Thread(target=sample_until, args=(ended, run_dir, node), daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join(timeout=10)


def start_sampling(run_dir: Path) -> "subprocess.Popen[bytes]":
    """Sample this machine in a process that ends with this one; for machines other than the one that delivers."""
    command = [sys.executable, "-m", "pipeline.tracking.system", str(run_dir.resolve())]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)


def node_name() -> str | None:
    """What this machine is called among the run's curves; None where it is the only one."""
    several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return socket.gethostname() if several else None


if __name__ == "__main__":
    os.nice(5)
    quieten()
    with sampled(Path(sys.argv[1]), node_name()):
        sys.stdin.buffer.read()
