"""A plain convolutional network, one nn.Sequential from normalisation to logits.

Read it top to bottom: normalize, features (each stage: convolutions, then half the size), classifier (pool, dropout, linear).
"""

from collections import OrderedDict

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.normalize import Normalize
from pipeline.preprocess import PreprocessSpec

GROUPS = 8


class GlobalAveragePool(nn.Module):
    """Features (N, C, H, W) -> (N, C). The backward of AdaptiveAvgPool2d has no deterministic form on a GPU; a mean's has."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the mean over height and width."""
        return features.mean(dim=(2, 3))


def build_network(config: ModelConfig, num_classes: int, spec: PreprocessSpec) -> nn.Sequential:
    """Return a network from uint8 images (N, 3, H, W) to logits (N, K), its weights drawn from torch's default generator.

    Raises ConfigError when the image is too small for the number of stages, naming the stage.
    """
    if not config.channels or min(config.channels) < 1:
        raise ConfigError(f"`model.channels` is {config.channels}; it must be a list of positive numbers.")
    _require_room(config, spec)
    features: list[nn.Module] = []
    in_channels = 3
    for channels in config.channels:
        for _ in range(config.convs_per_stage):
            features.append(nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=config.norm == "none"))
            features.extend(_norm(config.norm, channels))
            features.append(nn.ReLU())
            in_channels = channels
        features.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(
        GlobalAveragePool(),
        nn.Dropout(config.dropout),
        nn.Linear(in_channels, num_classes),
    )
    network = nn.Sequential(OrderedDict(normalize=Normalize(spec), features=nn.Sequential(*features), classifier=classifier))
    initialise(network)
    return network


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        if channels % GROUPS:
            raise ConfigError(f"`model.channels` holds {channels}, which group norm cannot share among {GROUPS} groups.")
        return [nn.GroupNorm(GROUPS, channels)]
    return []


def _require_room(config: ModelConfig, spec: PreprocessSpec) -> None:
    assert spec.fixed_size is not None
    side = min(spec.fixed_size)
    for stage in range(len(config.channels)):
        if side < 2:
            raise ConfigError(
                f"`model.channels` has {len(config.channels)} stages, but a {spec.fixed_size[0]} x {spec.fixed_size[1]} "
                f"image has nothing left to halve at stage {stage + 1}. Use at most {stage} stages or larger images."
            )
        side //= 2


def initialise(network: nn.Module) -> None:
    """He initialisation for convolutions; a small last layer, so that the first loss is that of a guess (ln K)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def require_forward(network: nn.Module, spec: PreprocessSpec) -> None:
    """Push one empty image through, in evaluation mode, so that a shape error is found before any rank starts."""
    assert spec.fixed_size is not None
    network.eval()
    with torch.no_grad():
        network(torch.zeros(1, 3, *spec.fixed_size, dtype=torch.uint8))
    network.train()
