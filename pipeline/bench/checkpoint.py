"""What a checkpoint costs the training: CPU time of the thread that trains, by the size of the network."""

import statistics
import time
from pathlib import Path

import torch
from torch import nn

from pipeline.bench.measure import Figures
from pipeline.console import say
from pipeline.training.checkpoint import checksum_path
from pipeline.training.checkpoint_writer import DurableCheckpointIO

# Networks of torchvision with about as many parameters as people train.
NETWORKS = ("squeezenet1_1", "resnet18", "resnet50", "alexnet", "vgg11")
SECONDS_BETWEEN_SAVES = 60.0


def checkpoint_costs(folder: Path, rounds: int) -> dict[str, Figures]:
    """Save each network with SGD's momentum, `rounds` times, into `folder`; medians. The files are removed."""
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
        "seconds": statistics.median(wall),
        "% at one a minute": 100 * statistics.median(cpu) / SECONDS_BETWEEN_SAVES,
    }
