"""The networks that `model.name` knows: who builds each, which settings it has, and its own values of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, nearest
from pipeline.models.blocks import Parts
from pipeline.models.classics import VGG_DEPTHS, build_alexnet, build_vgg
from pipeline.models.custom import build_custom
from pipeline.models.resnet import DEPTHS, build_resnet
from pipeline.models.simple_net import build_simple_net
from pipeline.models.small_cnn import build_plain_cnn, build_small_cnn
from pipeline.models.torchvision_net import build_torchvision
from pipeline.pretraining import TORCHVISION


@dataclass(frozen=True)
class Family:
    """Builds Parts from (config, number of outputs, size of the images); `own` are its values of settings left at null."""

    build: Callable[[ModelConfig, int, tuple[int, int]], Parts]
    options: frozenset[str]
    own: dict[str, Any] = field(default_factory=dict)


SHAPED = {"width", "norm", "activation", "dropout"}
STAGED = frozenset({*SHAPED, "channels", "convs_per_stage", "feature_dropout"})
RESIDUAL = {"stochastic_depth", "zero_init_residual"}
MODERN = {"norm": "batch", "activation": "relu", "dropout": 0.2, "stochastic_depth": 0.0}
CLASSIC = {**MODERN, "norm": "none", "dropout": 0.5}
RESNET = Family(build_resnet, frozenset({*SHAPED, *RESIDUAL}), {**MODERN, "dropout": 0.0})
VGG = Family(build_vgg, frozenset(SHAPED), CLASSIC)
CUSTOM = Family(build_custom, frozenset({*SHAPED, *RESIDUAL, "blocks", "feature_dropout"}), MODERN)
OF_TORCHVISION = Family(build_torchvision, frozenset({"dropout", "stochastic_depth"}))
FAMILIES = {
    "simple_net": Family(
        build_simple_net, frozenset({"hidden", "width", "activation", "dropout"}), {**CLASSIC, "dropout": 0.2}
    ),
    "small_cnn": Family(build_small_cnn, STAGED, MODERN),
    "plain_cnn": Family(build_plain_cnn, STAGED, MODERN),
    "alexnet": Family(build_alexnet, frozenset(SHAPED), CLASSIC),
    **dict.fromkeys(VGG_DEPTHS, VGG),
    **dict.fromkeys(DEPTHS, RESNET),
}
# Of any network.
COMMON = {"name", "prior_bias", "weights", "freeze", "unfreeze"}


def family_of(config: ModelConfig) -> Family:
    """Who builds this network. Raises ConfigError for an unknown name."""
    if config.blocks:
        return CUSTOM
    if config.name.startswith(TORCHVISION):
        return OF_TORCHVISION
    if config.name not in FAMILIES:
        known = [*FAMILIES, f"{TORCHVISION}NAME"]
        suggestion = nearest(config.name, known) or f" Known: {', '.join(known)}."
        raise ConfigError(f"`model.name` is '{config.name}', which is no network.{suggestion}")
    return FAMILIES[config.name]


def with_defaults(config: ModelConfig) -> ModelConfig:
    """The same with the network's own values where the configuration says null; those of torchvision stay null."""
    own = family_of(config).own
    return dataclasses.replace(config, **{key: value for key, value in own.items() if getattr(config, key) is None})


def require_options(config: ModelConfig) -> None:
    """Refuse a setting that the network does not have, unless it is at its default or off. Raises ConfigError."""
    called = "a network of `model.blocks`" if config.blocks else config.name
    if config.blocks and config.name != ModelConfig().name:
        raise ConfigError(
            f"`model.blocks` describes a network of its own, and `model.name` is {config.name}: give one of them."
        )
    family, defaults = family_of(config), ModelConfig()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        is_off = value is None or value is False or value == 0 or value == getattr(defaults, item.name)
        if not is_off and item.name not in family.options | COMMON:
            options = ", ".join(sorted(family.options - {"blocks"}))
            raise ConfigError(f"`model.{item.name}` is {value}, but {called} has no such setting (it has {options}).")
