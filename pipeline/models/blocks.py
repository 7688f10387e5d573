"""The pieces that networks are made of: each takes features (N, C, H, W) and stands in an nn.Sequential as any layer does."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError

GROUPS = 8
EXPANSION = 4  # a bottleneck's outputs to its inner channels (He et al. 2015, "Deep Residual Learning")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Parts:
    """A network between its normalisation and its logits. `rename` turns torchvision's parameter names into ours."""

    features: nn.Module
    classifier: nn.Sequential
    pool: nn.Module | None = None
    rename: Callable[[str], str] = str
    initialised: bool = False  # its maker has drawn the weights of the features


def activation(config: ModelConfig) -> nn.Module:
    """The layer of `model.activation`."""
    return ACTIVATIONS[config.activation or "relu"]()


def norm(config: ModelConfig, channels: int) -> list[nn.Module]:
    """The layer of `model.norm`, or nothing. Raises ConfigError where channels cannot be shared among the groups."""
    if config.norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if config.norm == "group":
        if channels % GROUPS:
            raise ConfigError(f"`model.norm: group` cannot share {channels} channels among {GROUPS} groups.")
        return [nn.GroupNorm(GROUPS, channels)]
    return []


def scaled(channels: int, config: ModelConfig) -> int:
    """Channels times `model.width`, to the nearest multiple of 8, so that groups and tensor cores can share them."""
    return channels if config.width == 1 else max(GROUPS, round(channels * config.width / GROUPS) * GROUPS)


def conv_norm_act(
    in_channels: int, channels: int, config: ModelConfig, kernel: int = 3, stride: int = 1, bias: bool | None = None
) -> list[nn.Module]:
    """Convolution, normalisation, activation. A bias before a normalisation would be subtracted again."""
    bias = config.norm == "none" if bias is None else bias
    convolution = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return [convolution, *norm(config, channels), activation(config)]


def feature_dropout(config: ModelConfig) -> list[nn.Module]:
    """Dropout of whole channels, where it is asked for."""
    return [nn.Dropout2d(config.feature_dropout)] if config.feature_dropout else []


class GlobalAveragePool(nn.Module):
    """Features (N, C, H, W) -> (N, C). The backward of AdaptiveAvgPool2d has no deterministic form on a GPU; a mean's has."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the mean over height and width."""
        return features.mean(dim=(2, 3))


class AdaptiveAveragePool(nn.Module):
    """AdaptiveAvgPool2d from one known size to another, (N, C, H, W) -> (N, C, h, w), as two products of matrices.

    Those have a deterministic backward on a GPU. Where the sizes are equal nothing is computed, so logits stay the same.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        self.is_identity = before == after
        # Not in the state_dict: torchvision's has nothing there.
        self.register_buffer("rows", averages(before[0], after[0]), persistent=False)  # (h, H)
        self.register_buffer("columns", averages(before[1], after[1]), persistent=False)  # (w, W)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the average of each cell."""
        if self.is_identity:
            return features
        return self.rows.to(features.dtype) @ features @ self.columns.to(features.dtype).T


def averages(before: int, after: int) -> torch.Tensor:
    """(after, before): row i averages what AdaptiveAvgPool does, from floor(i b / a) up to ceil((i + 1) b / a)."""
    matrix = [[0.0] * before for _ in range(after)]
    for row in range(after):
        first, end = row * before // after, -(-(row + 1) * before // after)
        matrix[row][first:end] = [1 / (end - first)] * (end - first)
    return torch.tensor(matrix)


class StochasticDepth(nn.Module):
    """Drops a whole branch (N, C, H, W) for a sample, in training only (Huang et al. 2016, arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return zeros for dropped samples; the others are scaled so that the mean stays."""
        if not self.training or not self.p:
            return branch
        kept = torch.empty(len(branch), 1, 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.p)
        return branch * kept / (1 - self.p)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"p={self.p:g}"


class ResidualBlock(nn.Module):
    """activation(body(x) + shortcut(x)): two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 where `bottleneck`.

    The stride is that of the (first) 3 x 3 convolution, as in torchvision.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        config: ModelConfig,
        *,
        stride: int = 1,
        bottleneck: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        inner = channels // EXPANSION if bottleneck else channels
        layers = [(in_channels, inner, 1, 1), (inner, inner, 3, stride), (inner, channels, 1, 1)]
        if not bottleneck:
            layers = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        body: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after, kernel, step) in enumerate(layers, start=1):
            convolution, *others = conv_norm_act(before, after, config, kernel, step)
            body[f"conv{number}"] = convolution
            if config.norm != "none":
                body[f"norm{number}"] = others[0]
            if number < len(layers):
                body[f"act{number}"] = others[-1]
        self.body = nn.Sequential(body)
        shortcut: list[nn.Module] = []
        if stride != 1 or in_channels != channels:
            shortcut = conv_norm_act(in_channels, channels, config, kernel=1, stride=stride)[:-1]
        self.shortcut = nn.Sequential(*shortcut)
        self.drop = StochasticDepth(drop)
        self.activation = activation(config)

    @property
    def last_scale(self) -> nn.Parameter:
        """The weights whose zeros make the block the identity: of the body's last normalisation, or convolution."""
        weight = self.body[-1].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride), halves rounded up."""
        total: torch.Tensor = self.activation(self.drop(self.body(features)) + self.shortcut(features))
        return total


def falling(p: float, number: int) -> Iterator[float]:
    """Probabilities of stochastic depth for `number` blocks, linear from p / number to p."""
    return (p * (place + 1) / number for place in range(number))


def linear_head(config: ModelConfig, features: int, num_outputs: int) -> nn.Sequential:
    """Dropout and the last layer. The dropout is there even at 0, so that parameter names do not depend on it."""
    return nn.Sequential(nn.Dropout(config.dropout or 0.0), nn.Linear(features, num_outputs))
