"""The two plain networks: stages of convolutions that each halve the image, global average pooling, one linear layer."""

from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.blocks import GlobalAveragePool, Parts, conv_norm_act, feature_dropout, linear_head, scaled


def build_small_cnn(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """Each stage: convolutions, then max pooling. Raises ConfigError for an image too small for the number of stages."""
    _require_stages(config, size)
    features: list[nn.Module] = []
    before = 3
    for channels in (scaled(number, config) for number in config.channels):
        for _ in range(config.convs_per_stage):
            features += conv_norm_act(before, channels, config)
            before = channels
        features += [nn.MaxPool2d(2), *feature_dropout(config)]
    # The pooling is the classifier's first layer, as in every checkpoint of this network.
    classifier = nn.Sequential(GlobalAveragePool(), *linear_head(config, before, num_outputs))
    return Parts(nn.Sequential(*features), classifier)


def build_plain_cnn(config: ModelConfig, num_outputs: int, size: tuple[int, int]) -> Parts:
    """A stem at full size; each stage's first convolution has stride 2, so nothing is pooled before the end.

    (Springenberg et al. 2014, "Striving for Simplicity", arXiv 1412.6806.) Raises ConfigError for too small an image.
    """
    _require_stages(config, size)
    channels = [scaled(number, config) for number in config.channels]
    features = conv_norm_act(3, channels[0], config)
    before = channels[0]
    for outputs in channels:
        for number in range(config.convs_per_stage):
            features += conv_norm_act(before, outputs, config, stride=1 if number else 2)
            before = outputs
        features += feature_dropout(config)
    return Parts(nn.Sequential(*features), linear_head(config, before, num_outputs), GlobalAveragePool())


def _require_stages(config: ModelConfig, size: tuple[int, int]) -> None:
    if not config.channels or min(config.channels) < 1:
        raise ConfigError(f"`model.channels` is {config.channels}; it must be a list of positive numbers.")
    side = min(size)
    for stage in range(len(config.channels)):
        if side < 2:
            raise ConfigError(
                f"`model.channels` has {len(config.channels)} stages, but a {size[0]} x {size[1]} "
                f"image has nothing left to halve at stage {stage + 1}. Use at most {stage} stages or larger images."
            )
        side //= 2
