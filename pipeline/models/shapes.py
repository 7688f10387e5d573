"""Shapes, parameters and multiply-accumulates of a network, layer by layer, on the meta device: nothing is computed.

So a layer that does not fit its input is found in milliseconds, by name, before any rank starts.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError
from pipeline.preprocess import PreprocessSpec

COLUMNS = ["layer", "", "output", "parameters", "MACs"]
TOLD_APART = ("in_channels", "out_channels", "kernel_size", "stride", "in_features", "out_features", "p")


@dataclass(frozen=True)
class Layer:
    """One row of the summary: a module that is no Sequential, and what it makes of one image."""

    name: str
    what: str
    shape: tuple[int, ...]  # without the batch
    parameters: int
    macs: int


def describe_network(network: nn.Sequential, spec: PreprocessSpec) -> list[Layer]:
    """Every layer with its output for one image. Raises ConfigError for the first that cannot take its input, by name."""
    assert spec.fixed_size is not None
    values = torch.empty(1, 3, *spec.fixed_size, dtype=torch.uint8, device="meta")
    layers = []
    for name, module in leaves(network):
        with FlopCounterMode(display=False) as counter:
            values = output_of(module, values, f"`model`: {name} ({describe(module)})")
        parameters = sum(parameter.numel() for parameter in module.parameters())
        # The counter counts a multiply-accumulate as two operations.
        layers.append(Layer(name, describe(module), tuple(values.shape[1:]), parameters, counter.get_total_flops() // 2))
    return layers


def network_table(layers: list[Layer]) -> list[list[str]]:
    """The rows below COLUMNS, the sum last. Layers that neither hold parameters nor change the shape are left out."""
    rows = []
    shape: tuple[int, ...] = ()
    for layer in layers:
        if layer.parameters or layer.shape != shape:
            shape = layer.shape
            rows.append([layer.name, layer.what, " x ".join(map(str, shape)), f"{layer.parameters:,}", f"{layer.macs:,}"])
    return [
        *rows,
        ["total", "", "", *(f"{sum(column):,}" for column in ([x.parameters for x in layers], [x.macs for x in layers]))],
    ]


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules in the order in which a Sequential runs them, nested ones opened."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def output_of(module: nn.Module, values: torch.Tensor, where: str) -> torch.Tensor:
    """What `module` makes of a meta tensor, in evaluation mode. Raises ConfigError, which begins with `where`."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    try:
        with evaluating(module), torch.no_grad():
            output = functional_call(module, on_meta, (values,))
    except Exception as error:
        shape = " x ".join(map(str, values.shape[1:]))
        raise ConfigError(f"{where} cannot take its input of {shape}: {' '.join(str(error).split())[:200]}") from error
    assert isinstance(output, torch.Tensor)
    return output


def feature_map(channels: int, height: int, width: int) -> torch.Tensor:
    """A meta tensor (1, C, H, W) to try layers on."""
    return torch.empty(1, channels, height, width, device="meta")


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block; each module has its own mode back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def describe(module: nn.Module) -> str:
    """The class of a layer and the numbers that tell it from others of the class."""
    facts = []
    for name in TOLD_APART:
        value = getattr(module, name, None)
        if isinstance(value, (int, float, tuple)):
            facts.append("x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}")
    return " ".join([type(module).__name__, *facts])
