"""How weights begin: He before an activation, next to nothing in the last layer, the identity in residual blocks."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.blocks import ResidualBlock

HEAD_STD = 0.01
SMALLEST_SHARE = 1e-6  # a class without a sample would make its bias infinite


def head_of(network: nn.Sequential) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that makes the logits."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def initialise(network: nn.Module, head: nn.Module) -> None:
    """He initialisation of convolutions and linear layers (He et al. 2015, arXiv 1502.01852); biases are 0.

    The last layer is small instead, so that the first loss is that of a guess (ln K).
    """
    for layer in network.modules():
        if layer is head:
            initialise_head(layer)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def initialise_head(head: nn.Module) -> None:
    """Weights so small that the logits of a fresh network are next to 0."""
    assert isinstance(head, (nn.Conv2d, nn.Linear)) and head.bias is not None
    nn.init.normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)


def start_as_identity(network: nn.Module) -> None:
    """Let every residual block begin as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1)."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.last_scale)


def set_prior_bias(head: nn.Linear | nn.Conv2d, shares: Sequence[float], *, independent: bool) -> None:
    """Let the last layer begin with the class shares as its answer: log p behind a softmax, log p / (1 - p) behind sigmoids.

    Of two classes behind one output the second is meant. Raises ConfigError where the number of shares is another.
    """
    num_outputs = len(head.weight)
    shares = shares[-1:] if num_outputs == 1 else shares
    if len(shares) != num_outputs or head.bias is None:
        raise ConfigError(f"`model.prior_bias`: {len(shares)} class shares for {num_outputs} outputs.")
    inside = [min(max(share, SMALLEST_SHARE), 1 - SMALLEST_SHARE) for share in shares]
    bias = [math.log(share / (1 - share) if independent or num_outputs == 1 else share) for share in inside]
    with torch.no_grad():
        head.bias.copy_(torch.tensor(bias))
