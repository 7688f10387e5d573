"""What checkpoints cost: CPU time of the thread that trains, by the size of the network, and time to begin from one."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from pipeline.bench.measure import Figures
from pipeline.console import say
from pipeline.errors import ProcessError
from pipeline.training.checkpoint import checkpoints_in, checksum_path, step_of
from pipeline.training.checkpoint_writer import DurableCheckpointIO

# Networks of torchvision with about as many parameters as people train.
NETWORKS = ("squeezenet1_1", "resnet18", "resnet50", "alexnet", "vgg11")
SECONDS_BETWEEN_SAVES = 60.0


def checkpoint_costs(folder: Path, rounds: int) -> dict[str, Figures]:
    """Save each network with SGD's momentum, `rounds` times, into `folder`. The files are removed.

    Medians, and the least: a virtual machine whose host takes back free memory pays for the pages of each file anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    costs = {}
    for name in NETWORKS:
        say(f"saving {name} {rounds} times")
        costs[name] = _cost_of(_build(name), folder / f"{name}.ckpt", rounds)
    return costs


def _build(name: str) -> nn.Module:
    from torchvision import models

    network: nn.Module = models.get_model(name, weights=None)
    return network


def _cost_of(network: nn.Module, path: Path, rounds: int) -> Figures:
    momenta = {number: {"momentum_buffer": torch.zeros_like(weight)} for number, weight in enumerate(network.parameters())}
    content = {"state_dict": network.state_dict(), "optimizer_states": [{"state": momenta}]}
    cpu, wall = [], []
    try:
        for _ in range(rounds):
            began, began_cpu = time.monotonic(), time.thread_time()
            DurableCheckpointIO().save_checkpoint(content, path)
            cpu.append(time.thread_time() - began_cpu)
            wall.append(time.monotonic() - began)
        num_bytes = path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
        checksum_path(path).unlink(missing_ok=True)
    return {
        "million parameters": sum(weight.numel() for weight in network.parameters()) / 1e6,
        "MB": num_bytes / 1e6,
        "cpu seconds": statistics.median(cpu),
        "at least": min(cpu),
        "seconds": statistics.median(wall),
        "% at one a minute": 100 * statistics.median(cpu) / SECONDS_BETWEEN_SAVES,
    }


def start_seconds(folder: Path, rounds: int) -> dict[str, Figures]:
    """Seconds from the command to the first saved step of a training of the digits on one process, new and resumed in turns.

    Medians of `rounds`; the data set and the runs stay in `folder`. Raises ProcessError if a command fails.
    """
    folder = folder.resolve()
    dataset = folder / "digits"
    subprocess.run(
        [sys.executable, "-m", "pipeline", "shard", f"--dataset.path={dataset}"], check=True, stdout=subprocess.DEVNULL
    )
    new, resumed = [], []
    for number in range(rounds):
        say(f"starting a training, and going on with it: {number + 1}/{rounds}")
        run_dir = folder / f"run-{time.time_ns()}"
        new.append(_seconds_to_a_step(dataset, run_dir))
        resumed.append(_seconds_to_a_step(dataset, run_dir))
    cold, warm = statistics.median(new), statistics.median(resumed)
    return {"cold start": {"seconds": cold, "ratio": 1.0}, "resume": {"seconds": warm, "ratio": warm / cold}}


def _seconds_to_a_step(dataset: Path, run_dir: Path) -> float:
    settings = [f"--dataset.path={dataset}", f"--runs_dir={run_dir.parent}", f"--name={run_dir.name}"]
    command = [sys.executable, "-m", "pipeline", "train", *settings, "--trainer.checkpoint_every_steps=1"]
    before, began = _newest_step(run_dir), time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PROCS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while _newest_step(run_dir) <= before:
            if process.poll() is not None:
                raise ProcessError(f"the training in {run_dir} ended before its first step.")
            time.sleep(0.005)
        return time.monotonic() - began
    finally:
        process.terminate()  # it saves, and what follows goes on from there
        process.wait()


def _newest_step(run_dir: Path) -> int:
    return max((step_of(path) for path in checkpoints_in(run_dir)), default=0)
