"""Which parts of a network train at which epoch.

A parameter follows the longest prefix of its name that is mentioned, so `freeze: [features]` with `unfreeze: {features.10: 3}`
holds all features but lets features.10 train from epoch 3 on. Prefixes end at a dot: features.1 does not mean features.10.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, nearest

THAWED = "!"


def frozen(config: ModelConfig, epoch: int) -> list[str]:
    """What does not train in this epoch, as prefixes; one that begins with `!` is an exception that does."""
    waiting = {prefix for prefix, first in config.unfreeze.items() if epoch < first}
    thawed = config.unfreeze.keys() - waiting
    return [
        *sorted({*config.freeze, *waiting} - thawed),
        *(f"{THAWED}{prefix}" for prefix in sorted(thawed)),
    ]


def freeze_parameters(network: nn.Module, prefixes: list[str]) -> None:
    """Make exactly the parameters below `prefixes` (of `frozen`) untrainable, and keep their BatchNorm's statistics.

    Call it again after `network.train()`. Dropout goes on: it regularises the parts that train.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not is_frozen(name, prefixes))
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            module.train(network.training and not is_frozen(name, prefixes))


def is_frozen(name: str, prefixes: list[str]) -> bool:
    """Whether the longest of `prefixes` that fits `name` freezes it."""
    fitting = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix.removeprefix(THAWED)}.")]
    return bool(fitting) and not max(fitting, key=lambda prefix: len(prefix.removeprefix(THAWED))).startswith(THAWED)


def require_known_prefixes(network: nn.Module, config: ModelConfig) -> None:
    """Refuse a prefix that no parameter has, and an epoch before the first. Raises ConfigError."""
    names = [name for name, _ in network.named_parameters()]
    known = {".".join(parts[:depth]) for name in names for parts in [name.split(".")] for depth in range(1, len(parts) + 1)}
    for key, prefixes in (("freeze", config.freeze), ("unfreeze", list(config.unfreeze))):
        for prefix in prefixes:
            if prefix not in known:
                parts = sorted({name.split(".")[0] for name in names})
                suggestion = nearest(prefix, known) or f" The network has: {', '.join(parts)}."
                raise ConfigError(f"`model.{key}` names '{prefix}', and no parameter's name begins so.{suggestion}")
    for prefix, epoch in config.unfreeze.items():
        if epoch < 1:
            raise ConfigError(f"`model.unfreeze` lets {prefix} train from epoch {epoch} on; it must be 1 or later.")
