"""What each layer does at one moment of training: its activations, its gradient, and how far a step moves its weights.

Healthy networks look alike in these figures: activations neither vanish nor explode with depth, few units are dead, and a step
moves weights by about a thousandth of their size (Karpathy, "CS231n: babysitting the learning process").
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

RECTIFIERS = (nn.ReLU, nn.ReLU6)


@dataclass
class Layer:
    """One layer's figures; None where it has none of the kind."""

    layer: str
    kind: str
    mean: float | None = None
    std: float | None = None
    dead: float | None = None  # share of a rectifier's channels that are 0 at every place of every image
    gradient: float | None = None  # norm
    weight: float | None = None  # norm
    update: float | None = None  # norm of the last step's change over that of the weights


def parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """A layer's own parameters, not those of layers inside it."""
    return list(layer.parameters(recurse=False))


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Every module that holds no other, by name."""
    return {name: module for name, module in network.named_modules() if not any(module.children())}


@torch.no_grad()
def measure_gradients(network: nn.Module) -> dict[str, float]:
    """Norm of each layer's gradient, where it has one."""
    norms = {}
    for name, layer in layers_of(network).items():
        gradients = [parameter.grad for parameter in parameters_of(layer) if parameter.grad is not None]
        if gradients:
            norms[name] = float(nn.utils.get_total_norm(gradients))
    return norms


@torch.no_grad()
def copy_weights(network: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Each layer's parameters as they are now."""
    return {name: [each.clone() for each in parameters_of(layer)] for name, layer in layers_of(network).items()}


@torch.no_grad()
def measure_updates(network: nn.Module, before: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """How far each layer has moved from `before`, as a share of its size then; layers of zeros are left out."""
    moved = {}
    for name, layer in layers_of(network).items():
        size = float(nn.utils.get_total_norm(before[name]))
        if size:
            changes = [now - old for now, old in zip(parameters_of(layer), before[name], strict=True)]
            moved[name] = float(nn.utils.get_total_norm(changes)) / size
    return moved


@torch.no_grad()
def observe(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[Layer]]:
    """Logits of uint8 images (n, 3, H, W) in evaluation mode, and what each layer gave; the modes are put back."""
    found = {name: Layer(name, type(layer).__name__) for name, layer in layers_of(network).items()}
    modes = {module: module.training for module in network.modules()}
    hooks = [layer.register_forward_hook(_recorder(found[name])) for name, layer in layers_of(network).items()]
    try:
        # `forward` and not a call: a compiled network would look past the hooks.
        logits: torch.Tensor = network.eval().forward(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, is_training in modes.items():
            module.training = is_training
    for name, layer in layers_of(network).items():
        if parameters_of(layer):
            found[name].weight = float(nn.utils.get_total_norm(parameters_of(layer)))
    return logits, list(found.values())


def _recorder(row: Layer) -> Any:
    def record(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):  # an attention gives several
            return
        values = output.detach().float()
        row.mean, row.std = float(values.mean()), float(values.std())
        if isinstance(layer, RECTIFIERS):
            others = [axis for axis in range(values.ndim) if axis != 1]
            row.dead = float((values.abs().amax(dim=others) == 0).float().mean())

    return record


def summarise(layers: Iterable[Layer]) -> dict[str, float]:
    """The few figures of all layers that go into curves: extremes and median, by name."""
    rows = [asdict(layer) for layer in layers]
    figures: dict[str, float] = {}
    for name in ("std", "gradient", "update"):
        values = [row[name] for row in rows if row[name] is not None and math.isfinite(row[name])]
        if values:
            shown = {"min": min(values), "median": statistics.median(values), "max": max(values)}
            figures |= {f"{name}_{which}": value for which, value in shown.items()}
    dead = [row["dead"] for row in rows if row["dead"] is not None]
    return figures | ({"dead_max": max(dead)} if dead else {})
