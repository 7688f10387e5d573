"""Any optimizer of torch.optim and any scheduler of torch.optim.lr_scheduler, named in the configuration, and one of our own.

Weight decay falls on weights only: biases and normalisation parameters (one axis) are left alone. Parts of a network may have
learning rates of their own (`optimizer.lr_factors`); every scheduler keeps their ratios.
"""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainerConfig
from pipeline.errors import ConfigError, nearest
from pipeline.metrics import direction

SGD_MOMENTUM = 0.9
# Arguments that choose how a step is computed.
WAYS = {"fused", "foreach", "capturable", "differentiable"}
LENGTH_ARGUMENTS = ("total_steps", "T_max")
# Arguments that are learning rates; all other schedulers multiply what a group has.
RATE_ARGUMENTS = ("max_lr", "base_lr")


class WarmupCosine(lr_scheduler.LRScheduler):
    """A linear rise (Goyal et al., 2017, arXiv 1706.02677), then half a cosine (Loshchilov and Hutter, 2016, arXiv 1608.03983).

    The rise takes `warmup_steps` moves, or the share `warmup_share` of all; it begins at `start_share` of the learning rate,
    and the cosine ends at `final_share` of it. The rate is a function of the number of moves alone, unlike that of torch's
    SequentialLR: so a schedule can go on from any place, also a translated one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int | None = None,
        warmup_share: float = 0.05,
        start_share: float = 0.01,
        final_share: float = 0.0,
    ) -> None:
        for name, share in (("warmup_share", warmup_share), ("start_share", start_share), ("final_share", final_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {share}")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup_share * total_steps) if warmup_steps is None else warmup_steps
        if not 0 <= self.warmup_steps < max(total_steps, 1):
            raise ValueError(f"a warm-up of {self.warmup_steps} moves leaves nothing of the {total_steps} of the training")
        self.start_share, self.final_share = start_share, final_share
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group after `last_epoch` moves."""
        return [rate * self._share(self.last_epoch) for rate in self.base_lrs]

    def _share(self, moves: int) -> float:
        if moves < self.warmup_steps:
            return self.start_share + (1 - self.start_share) * moves / self.warmup_steps
        progress = min(1.0, (moves - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2


def _classes(module: Any, base: type) -> dict[str, type]:
    return {
        name: item
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, base) and item is not base and not name.startswith("_")
    }


def build_optimizer(network: nn.Module, config: OptimizerConfig, *, fuse: bool = True) -> Optimizer:
    """Return the optimizer over the network's trainable parameters. Raises ConfigError for an unknown name or argument.

    Where torch has one for it and the arguments say nothing else, it is one kernel a step (`fuse`): on AlexNet 1.25 times as
    fast with SGD and 1.46 with AdamW.
    """
    known = _classes(torch.optim, Optimizer)
    if config.name not in known:
        suggestion = nearest(config.name, known) or f" Known: {', '.join(sorted(known))}."
        raise ConfigError(f"`optimizer.name` is '{config.name}', which torch.optim does not have.{suggestion}")
    arguments = dict(config.args)
    if config.name == "SGD":
        arguments.setdefault("momentum", SGD_MOMENTUM)
    kind = known[config.name]
    _require_arguments("optimizer", kind, arguments)
    known_arguments = inspect.signature(kind).parameters
    groups = _groups(network, config, decays="weight_decay" in known_arguments)
    if fuse and "fused" in known_arguments and not WAYS & arguments.keys() and _has_kernels(groups):
        arguments["fused"] = True
    try:
        built: Optimizer = kind(groups, lr=config.lr, **arguments)
    except Exception as error:  # each optimizer has its own way of saying no
        raise ConfigError(f"`optimizer`: {config.name} refuses its arguments: {error}.") from error
    return built


def _has_kernels(groups: list[dict[str, Any]]) -> bool:
    """Whether every parameter is of a type and on a device that fused optimizers take; torch itself only says so at a step."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(each.is_floating_point() and each.device.type in ("cpu", "cuda") for each in parameters)


def may_fuse(trainer: TrainerConfig, model: ModelConfig) -> bool:
    """Whether gradients are whole before the optimizer moves: a fused one would undo the scale of half precision by itself.

    Lightning also clips none of a fused optimizer's with mixed precision, and fused SGD fails where a parameter gets its first
    gradient later than others (`model.unfreeze`).
    """
    is_whole = trainer.precision == "32-true" or (trainer.precision == "bf16-mixed" and trainer.gradient_clip_norm is None)
    return is_whole and not model.unfreeze


def _groups(network: nn.Module, config: OptimizerConfig, *, decays: bool) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: for each learning rate those that decay, then those that do not."""
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("`model.freeze` leaves no parameter to train. Take the classifier out of it.")
    factors = _factors(list(trainable), [name for name, _ in network.named_parameters()], config.lr_factors)
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys([1.0, *factors.values()]):  # the plain rate first: it is the one that is shown
        own = [parameter for name, parameter in trainable.items() if factors[name] == factor]
        with_rate = {"lr": config.lr * factor} if factor != 1.0 else {}
        if decays:
            groups.append({"params": [each for each in own if each.ndim > 1], **with_rate})
            groups.append({"params": [each for each in own if each.ndim <= 1], "weight_decay": 0.0, **with_rate})
        else:
            groups.append({"params": own, **with_rate})
    return [group for group in groups if group["params"]]


def _factors(trainable: list[str], names: list[str], lr_factors: dict[str, float]) -> dict[str, float]:
    """The factor of each trainable parameter: that of its longest prefix. Raises ConfigError for a prefix of none."""
    prefixes = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)}
    for prefix, factor in lr_factors.items():
        if prefix not in prefixes:
            parts = sorted(known for known in prefixes if "." not in known)
            suggestion = nearest(prefix, sorted(prefixes)) or f" The network has: {', '.join(parts)}."
            raise ConfigError(f"`optimizer.lr_factors` names '{prefix}', and no parameter's name begins so.{suggestion}")
        if not 0 < factor < math.inf:
            raise ConfigError(f"`optimizer.lr_factors.{prefix}` is {factor}; it must be greater than 0.")

    def factor_of(name: str) -> float:
        own = [prefix for prefix in lr_factors if f"{name}.".startswith(f"{prefix}.")]
        return float(lr_factors[max(own, key=len)]) if own else 1.0

    return {name: factor_of(name) for name in trainable}


def build_scheduler(optimizer: Optimizer, config: SchedulerConfig, total_steps: int, monitor: str) -> Any | None:
    """Return the scheduler, or None. Raises ConfigError.

    A missing `total_steps` or `T_max` is the whole training; a missing `mode` of ReduceLROnPlateau follows `monitor`.
    """
    if config.name is None:
        return None
    known = {**_classes(lr_scheduler, lr_scheduler.LRScheduler), WarmupCosine.__name__: WarmupCosine}
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
    for name in RATE_ARGUMENTS:
        if isinstance(arguments.get(name), (int, float)):
            arguments[name] = _rate_of_each_group(optimizer, arguments[name])
    try:
        return kind(optimizer, **arguments)
    except Exception as error:
        raise ConfigError(f"`scheduler`: {config.name} refuses its arguments: {error}.") from error


def _rate_of_each_group(optimizer: Optimizer, rate: float) -> float | list[float]:
    """A scheduler's learning rate for each group, in the ratio of the groups' own; one number where all are the same."""
    ratios = [float(group["lr"]) / float(optimizer.defaults["lr"]) for group in optimizer.param_groups]
    return rate if set(ratios) == {1.0} else [rate * ratio for ratio in ratios]


def scheduler_length(config: SchedulerConfig, total_steps: int, max_epochs: int) -> int:
    """How often the scheduler moves in a whole training."""
    return total_steps if config.interval == "step" else max_epochs


def _require_arguments(section: str, kind: type, arguments: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params", "optimizer", "lr")]
    for name in arguments:
        if name not in known:
            suggestion = nearest(name, known) or f" Known: {', '.join(known)}."
            raise ConfigError(f"`{section}.args.{name}`: {kind.__name__} has no such argument.{suggestion}")
