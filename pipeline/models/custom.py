"""A network of one's own from `model.blocks`, a short list in YAML; each entry becomes one child of the features.

- {conv: 32}                        # also kernel: 3, stride: 1, repeat: 1
- {pool: 2}                         # also kind: max | average
- {residual: 64, stride: 2}         # also bottleneck: false, repeat: 1 (the stride is the first one's)
- {dropout: 0.1}                    # of whole channels
"""

from typing import Any

import torch
from torch import nn

from pipeline.config import COUNT, SHARE, ModelConfig, Range
from pipeline.errors import ConfigError, nearest
from pipeline.models.blocks import (
    EXPANSION,
    GlobalAveragePool,
    Parts,
    ResidualBlock,
    conv_norm_act,
    falling,
    feature_dropout,
    linear_head,
    scaled,
)
from pipeline.models.shapes import feature_map, output_of

# The options of each kind of block, with their defaults.
KINDS: dict[str, dict[str, Any]] = {
    "conv": {"kernel": 3, "stride": 1, "repeat": 1},
    "pool": {"kind": "max"},
    "residual": {"stride": 1, "repeat": 1, "bottleneck": False},
    "dropout": {},
}
POOLS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


def build_custom(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """Build block after block. Raises ConfigError for one that is not understood or does not fit, by its place and text."""
    read = [_read(number, block) for number, block in enumerate(config.blocks)]
    num_residual = sum(options["repeat"] for kind, _, options in read if kind == "residual")
    drops = falling(config.stochastic_depth or 0.0, num_residual)
    features: list[nn.Module] = []
    values = feature_map(3, *size)
    for number, (kind, value, options) in enumerate(read):
        where = f"`model.blocks[{number}]` {config.blocks[number]}"
        try:
            layers = _layers(kind, value, options, values, config, drops)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        features.append(nn.Sequential(*layers))
        values = output_of(features[-1], values, where)
    return Parts(nn.Sequential(*features), linear_head(config, values.shape[1], num_outputs), GlobalAveragePool())


def _layers(
    kind: str, value: Any, options: dict[str, Any], values: torch.Tensor, config: ModelConfig, drops: Any
) -> list[nn.Module]:
    before = values.shape[1]
    if kind == "pool":
        return [POOLS[options["kind"]](value)]
    if kind == "dropout":
        return [nn.Dropout2d(value)]
    channels, layers = scaled(value, config), list[nn.Module]()
    for number in range(options["repeat"]):
        stride = 1 if number else options["stride"]
        if kind == "conv":
            layers += conv_norm_act(before, channels, config, options["kernel"], stride)
        else:
            bottleneck = options["bottleneck"]
            if bottleneck and channels % EXPANSION:
                raise ConfigError(f"a bottleneck of {channels} channels cannot have a quarter of them inside.")
            layers.append(ResidualBlock(before, channels, config, stride=stride, bottleneck=bottleneck, drop=next(drops)))
        before = channels
    return [*layers, *feature_dropout(config)]


def _read(number: int, block: Any) -> tuple[str, Any, dict[str, Any]]:
    """(kind, value, all its options). Raises ConfigError."""
    where = f"`model.blocks[{number}]` is {block}"
    kinds = [key for key in block if key in KINDS] if isinstance(block, dict) else []
    if not isinstance(block, dict) or not block:
        raise ConfigError(f"{where}; a block is written like {{conv: 32}}.")
    if len(kinds) != 1:
        suggestion = "" if kinds else nearest(str(next(iter(block))), KINDS)
        raise ConfigError(f"{where}; it must have one of {', '.join(KINDS)}.{suggestion}")
    kind = kinds[0]
    for key in block:
        if key != kind and key not in KINDS[kind]:
            suggestion = nearest(str(key), KINDS[kind]) or f" It has: {', '.join(KINDS[kind]) or 'none'}."
            raise ConfigError(f"{where}; {kind} has no option '{key}'.{suggestion}")
    options = {**KINDS[kind], **{key: value for key, value in block.items() if key != kind}}
    _require_value(where, kind, block[kind], SHARE if kind == "dropout" else COUNT)
    for key, value in options.items():
        _require_option(where, key, value)
    return kind, block[kind], options


def _require_option(where: str, key: str, value: Any) -> None:
    if key == "kind":
        if value not in POOLS:
            raise ConfigError(f"{where}; kind must be one of {', '.join(POOLS)}.{nearest(str(value), POOLS)}")
    elif key == "bottleneck":
        if not isinstance(value, bool):
            raise ConfigError(f"{where}; bottleneck must be true or false.")
    else:
        _require_value(where, key, value, COUNT)
        if key == "kernel" and value % 2 == 0:
            raise ConfigError(f"{where}; kernel must be odd, so that the image keeps its size.")


def _require_value(where: str, key: str, value: Any, allowed: Range) -> None:
    is_number = isinstance(value, int) or (allowed is SHARE and isinstance(value, float))
    if not is_number or isinstance(value, bool) or value not in allowed:
        number = "number" if allowed is SHARE else "whole number"
        raise ConfigError(f"{where}; {key} must be a {number}, {allowed}.")
