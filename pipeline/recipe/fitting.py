"""Training on the same few images over and over, as several checks do."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.recipe.verdict import Subject

# The first one that learns is good enough; networks without norms need the small one.
LEARNING_RATES = (3e-3, 3e-4)


def without_dropout(network: nn.Sequential) -> nn.Sequential:
    """The same network with every module that drops something at random (dropout of any kind, stochastic depth) told not to."""
    for module in network.modules():
        if isinstance(getattr(module, "p", None), float) and (
            "Drop" in type(module).__name__ or "Depth" in type(module).__name__
        ):
            vars(module)["p"] = 0.0
    return network


def fit_batch(
    subject: Subject,
    network: nn.Sequential,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    lr: float,
    max_steps: int,
    learned: Callable[[int, torch.Tensor], bool] = lambda step, losses: False,
) -> list[torch.Tensor]:
    """The losses (n,) before each of at most `max_steps` Adam steps, and after the last; ends early when `learned` says so."""
    optimizer = torch.optim.Adam([parameter for parameter in network.parameters() if parameter.requires_grad], lr=lr)
    curve = []
    for step in range(max_steps + 1):
        losses = subject.sample_losses(network(images), labels)
        curve.append(losses.detach())
        if step == max_steps or learned(step, losses.detach()):
            break
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean())
        optimizer.step()
    return curve
