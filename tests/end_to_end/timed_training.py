"""`shardline train` as one rank, with a clock on everything that it says to its tracker: how long did its main thread wait?

usage: timed_training.py REPORT.json ARGUMENTS... (of `shardline train`)
"""

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cli import main
from pipeline.tracking import run as run_module
from pipeline.tracking.run import RunTracker

PUBLIC = ("log", "log_final", "set_tags", "log_file", "log_image", "log_table", "flush", "finish")


def timed(name: str, function: Callable[..., Any], report: dict[str, Any]) -> Callable[..., Any]:
    """Note the longest wait of `function`; a process that is preempted loses time without waiting for anything."""

    def call(*arguments: Any, **options: Any) -> Any:
        assert threading.current_thread() is threading.main_thread()
        switches, began, cpu = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, time.perf_counter(), time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            waited = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > switches
            seconds = (time.perf_counter() - began) if waited else 0.0
            place = "open" if name == "open" else "longest_wait"  # opening it starts a process, before training begins
            report[place] = max(report[place], [seconds, name])
            if name == "log":
                report["cpu_seconds"].append(time.thread_time() - cpu)

    return call


if __name__ == "__main__":
    report: dict[str, Any] = {"open": [0.0, ""], "longest_wait": [0.0, ""], "cpu_seconds": []}
    for name in PUBLIC:
        setattr(RunTracker, name, timed(name, getattr(RunTracker, name), report))
    from pipeline.training import fit as fit_module

    setattr(fit_module, "open_tracker", timed("open", run_module.open_tracker, report))  # noqa: B010 - it only imports it
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = main(["train", *sys.argv[2:]])
    Path(sys.argv[1]).write_text(json.dumps(report))
    raise SystemExit(code)
