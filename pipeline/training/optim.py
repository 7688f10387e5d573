"""Any optimizer of torch.optim and any scheduler of torch.optim.lr_scheduler, named in the configuration.

Weight decay falls on weights only: biases and normalisation parameters (one axis) are left alone.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.config import OptimizerConfig, SchedulerConfig
from pipeline.errors import ConfigError, nearest
from pipeline.metrics import direction

SGD_MOMENTUM = 0.9
LENGTH_ARGUMENTS = ("total_steps", "T_max")


def _classes(module: Any, base: type) -> dict[str, type]:
    return {
        name: item
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, base) and item is not base and not name.startswith("_")
    }


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer over the network's trainable parameters. Raises ConfigError for an unknown name or argument."""
    known = _classes(torch.optim, Optimizer)
    if config.name not in known:
        suggestion = nearest(config.name, known) or f" Known: {', '.join(sorted(known))}."
        raise ConfigError(f"`optimizer.name` is '{config.name}', which torch.optim does not have.{suggestion}")
    arguments = dict(config.args)
    if config.name == "SGD":
        arguments.setdefault("momentum", SGD_MOMENTUM)
    kind = known[config.name]
    _require_arguments("optimizer", kind, arguments)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if "weight_decay" not in inspect.signature(kind).parameters:
        groups = [{"params": trainable}]
    try:
        built: Optimizer = kind(groups, lr=config.lr, **arguments)
    except Exception as error:  # each optimizer has its own way of saying no
        raise ConfigError(f"`optimizer`: {config.name} refuses its arguments: {error}.") from error
    return built


def build_scheduler(optimizer: Optimizer, config: SchedulerConfig, total_steps: int, monitor: str) -> Any | None:
    """Return the scheduler, or None. Raises ConfigError.

    A missing `total_steps` or `T_max` is the whole training; a missing `mode` of ReduceLROnPlateau follows `monitor`.
    """
    if config.name is None:
        return None
    known = _classes(lr_scheduler, lr_scheduler.LRScheduler)
    if config.name not in known:
        suggestion = nearest(config.name, known) or f" Known: {', '.join(sorted(known))}."
        raise ConfigError(f"`scheduler.name` is '{config.name}', which torch.optim.lr_scheduler does not have.{suggestion}")
    kind = known[config.name]
    arguments = dict(config.args)
    _require_arguments("scheduler", kind, arguments)
    for name in LENGTH_ARGUMENTS:
        if name in inspect.signature(kind).parameters:
            arguments.setdefault(name, total_steps)
    for name in LENGTH_ARGUMENTS:
        if not isinstance(arguments.get(name, 1), int):
            raise ConfigError(f"`scheduler`: {config.name} needs a whole number as {name}, not {arguments[name]!r}.")
    if kind is lr_scheduler.OneCycleLR and arguments["total_steps"] < total_steps:
        raise ConfigError(
            f"`scheduler`: OneCycleLR with total_steps {arguments['total_steps']} ends before the training, "
            f"which takes {total_steps}. Leave `total_steps` out."
        )
    if kind is lr_scheduler.ReduceLROnPlateau:
        arguments.setdefault("mode", direction(monitor))
    try:
        return kind(optimizer, **arguments)
    except Exception as error:
        raise ConfigError(f"`scheduler`: {config.name} refuses its arguments: {error}.") from error


def scheduler_length(config: SchedulerConfig, total_steps: int, max_epochs: int) -> int:
    """How often the scheduler moves in a whole training."""
    return total_steps if config.interval == "step" else max_epochs


def _require_arguments(section: str, kind: type, arguments: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params", "optimizer", "lr")]
    for name in arguments:
        if name not in known:
            suggestion = nearest(name, known) or f" Known: {', '.join(known)}."
            raise ConfigError(f"`{section}.args.{name}`: {kind.__name__} has no such argument.{suggestion}")
