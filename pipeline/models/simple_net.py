"""A fully connected network: an image as one long row of numbers, hidden layers, classes."""

from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.blocks import Parts, activation, linear_head, scaled


def build_simple_net(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """12288-84-50-K for 64 x 64 images and `hidden: [84, 50]`. Raises ConfigError for sizes that are none."""
    if not config.hidden or min(config.hidden) < 1:
        raise ConfigError(f"`model.hidden` is {config.hidden}; it must be a list of positive numbers.")
    layers: list[nn.Module] = [nn.Flatten()]
    before = 3 * size[0] * size[1]
    for outputs in (scaled(hidden, config) for hidden in config.hidden):
        layers += [nn.Linear(before, outputs), activation(config)]
        before = outputs
    return Parts(nn.Sequential(*layers), linear_head(config, before, num_outputs))
