"""`trainer.compile`: torch.compile where it wins, measured before the first step on the run's own network and batches.

It may as well lose: training a small CNN on a CPU it took 1.6 times as long. A run keeps what it began with, because a compiled
network rounds otherwise, and a resumed run ends with the weights of the undisturbed one.
"""

import contextlib
import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline import accelerator, distributed
from pipeline.config import Config
from pipeline.console import say
from pipeline.data.order import local_batch_size

WARM_UP_STEPS, NUM_STEPS = 2, 7
LEAST_GAIN = 1.05  # times as fast as eager; less is noise
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Trial:
    """Milliseconds of a forward and backward pass, the least of NUM_STEPS, and seconds that compiling took."""

    eager: float
    compiled: float
    seconds: float

    @property
    def gain(self) -> float:
        """How many times as fast as eager."""
        return self.eager / self.compiled

    @property
    def is_won(self) -> bool:
        """Whether to train the compiled network."""
        return self.gain >= LEAST_GAIN

    def __str__(self) -> str:
        verdict = "trained compiled" if self.is_won else "not compiled"
        return (
            f"torch.compile is {self.gain:.2f} x as fast as eager ({self.compiled:.1f} ms for {self.eager:.1f}, "
            f"{self.seconds:.0f} s to compile): {verdict}"
        )


def choose_compiled(config: Config, network: nn.Module, size: tuple[int, int], before: dict[str, Any] | None) -> bool:
    """Whether all ranks train the network compiled: as the checkpoint's run did if it asked, else as rank 0 measures.

    `size` is that of the images, (H, W), and `before` what the checkpoint says of itself.
    """
    if not config.trainer.compile:
        return False
    if before is not None and before["config"]["trainer"]["compile"]:
        return bool(before.get("compiled", True))
    decision = [False]
    if distributed.rank() == 0:
        trial = measure(config, network, size)
        say(str(trial))
        decision = [trial.is_won]
    if dist.is_initialized():
        dist.broadcast_object_list(decision, src=0)
    return decision[0]


def measure(config: Config, network: nn.Module, size: tuple[int, int]) -> Trial:
    """Train copies of the network on grey images, eager and compiled in turns."""
    number = local_batch_size(config.data.micro_batch_size, distributed.world_size())
    device = accelerator.device()
    images = torch.full((number, 3, *size), 128, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
    eager, compiled = (copy.deepcopy(network).to(device).train() for _ in range(2))
    compiled.compile()
    with torch.random.fork_rng(devices=[]):
        began = time.perf_counter()
        for _ in range(WARM_UP_STEPS):
            _step(compiled, images, config.trainer.precision)
        seconds = time.perf_counter() - began
        rounds = []
        for _ in range(WARM_UP_STEPS + NUM_STEPS):
            rounds.append([_step(one, images, config.trainer.precision) for one in (eager, compiled)])
    least = [min(times) for times in zip(*rounds[WARM_UP_STEPS:], strict=True)]
    return Trial(least[0], least[1], seconds)


def _step(network: nn.Module, images: torch.Tensor, precision: str) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    network.zero_grad()
    dtype = AUTOCAST.get(precision)
    with torch.autocast(images.device.type, dtype) if dtype else contextlib.nullcontext():
        loss = network(images).float().square().mean()
    loss.backward()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return 1000 * (time.perf_counter() - began)
