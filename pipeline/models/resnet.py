"""ResNets as one Sequential: stem, four stages of residual blocks, global pooling (He et al. 2015, arXiv 1512.03385)."""

import re
from collections import OrderedDict

from torch import nn

from pipeline.config import ModelConfig
from pipeline.models.blocks import (
    EXPANSION,
    GlobalAveragePool,
    Parts,
    ResidualBlock,
    activation,
    falling,
    linear_head,
    norm,
    scaled,
)

CHANNELS = (64, 128, 256, 512)
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
WITH_BOTTLENECK = ("resnet50",)
# Torchvision's names of parameters, and ours.
NAMES = (
    (re.compile(r"^fc\."), "classifier.1."),
    (re.compile(r"^bn1\."), "features.norm1."),
    (re.compile(r"^conv1\."), "features.conv1."),
    (re.compile(r"^(layer\d\.\d+)\.conv(\d)\."), r"features.\1.body.conv\2."),
    (re.compile(r"^(layer\d\.\d+)\.bn(\d)\."), r"features.\1.body.norm\2."),
    (re.compile(r"^(layer\d\.\d+)\.downsample\."), r"features.\1.shortcut."),
)


def build_resnet(config: ModelConfig, num_outputs: int, _size: tuple[int, int]) -> Parts:
    """A stem that quarters the image, then stages of which all but the first halve it."""
    stem = scaled(CHANNELS[0], config)
    features: OrderedDict[str, nn.Module] = OrderedDict()
    features["conv1"] = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=config.norm == "none")
    features.update(("norm1", layer) for layer in norm(config, stem))
    features["act1"] = activation(config)
    features["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    bottleneck = config.name in WITH_BOTTLENECK
    before, depths = stem, DEPTHS[config.name]
    drops = falling(config.stochastic_depth or 0.0, sum(depths))
    for stage, (channels, depth) in enumerate(zip(CHANNELS, depths, strict=True), start=1):
        outputs = scaled(channels, config) * (EXPANSION if bottleneck else 1)
        blocks = []
        for number in range(depth):
            stride = 2 if stage > 1 and number == 0 else 1
            blocks.append(ResidualBlock(before, outputs, config, stride=stride, bottleneck=bottleneck, drop=next(drops)))
            before = outputs
        features[f"layer{stage}"] = nn.Sequential(*blocks)
    head = linear_head(config, before, num_outputs)
    return Parts(nn.Sequential(features), head, GlobalAveragePool(), rename=own_name)


def own_name(name: str) -> str:
    """Our name of a parameter of torchvision's ResNet."""
    for pattern, ours in NAMES:
        name = pattern.sub(ours, name)
    return name
