from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.blocks import ResidualBlock
from pipeline.models.shapes import describe_network
from tests.unit.models.given import on_meta, spec_of


def test_each_block_is_one_child_of_the_features() -> None:
    blocks: list[dict[str, Any]] = [
        {"conv": 32, "kernel": 5, "repeat": 2},
        {"pool": 2, "kind": "average"},
        {"residual": 64, "stride": 2, "repeat": 2, "bottleneck": True},
        {"dropout": 0.1},
    ]
    network = on_meta(ModelConfig(blocks=blocks, stochastic_depth=0.2), num_outputs=5, side=32)
    kinds = [[type(layer) for layer in block.children()] for block in network.get_submodule("features").children()]
    assert kinds == [
        [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2,
        [nn.AvgPool2d],
        [ResidualBlock, ResidualBlock],
        [nn.Dropout2d],
    ]
    shapes = {layer.name: layer.shape for layer in describe_network(network, spec_of(32, 32))}
    assert shapes["features.1.0"] == (32, 16, 16)
    assert shapes["features.2.1"] == (64, 8, 8)
    drops = [block.drop.p for block in network.modules() if isinstance(block, ResidualBlock)]
    assert drops == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"cnov": 32}, r"`model\.blocks\[1\]` is {'cnov': 32}; it must have one of conv, .*\. Did you mean 'conv'\?"),
        ({"conv": 8, "pool": 2}, r"it must have one of conv, pool, residual, dropout\.$"),
        ({"conv": 8, "strid": 2}, r"conv has no option 'strid'\. Did you mean 'stride'\?"),
        ({"dropout": 0.1, "stride": 2}, r"dropout has no option 'stride'\. It has: none\."),
        ({"conv": "wide"}, r"conv must be a whole number, 1 or more"),
        ({"conv": 0}, r"conv must be a whole number, 1 or more"),
        ({"conv": True}, r"conv must be a whole number"),
        ({"conv": 8, "kernel": 4}, r"kernel must be odd"),
        ({"pool": 2, "kind": "mex"}, r"kind must be one of max, average\. Did you mean 'max'\?"),
        ({"residual": 8, "bottleneck": 1}, r"bottleneck must be true or false"),
        ({"residual": 10, "bottleneck": True}, r"a bottleneck of 10 channels"),
        ({"dropout": 1}, r"dropout must be a number, 0 or more and less than 1"),
        ({}, r"a block is written like {conv: 32}"),
    ],
)
def test_a_block_that_is_not_understood_is_refused_by_its_place(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_meta(ModelConfig(blocks=[{"conv": 8}, block]), side=16)


def test_a_block_that_does_not_fit_is_named_with_what_it_gets() -> None:
    blocks: list[dict[str, Any]] = [{"conv": 8}, {"pool": 4}, {"pool": 4}, {"pool": 2}]
    message = r"`model\.blocks\[3\]` {'pool': 2} cannot take its input of 8 x 1 x 1: "
    with pytest.raises(ConfigError, match=message):
        on_meta(ModelConfig(blocks=blocks), side=16)


def test_group_norm_that_cannot_share_the_channels_names_the_block() -> None:
    with pytest.raises(ConfigError, match=r"`model\.blocks\[0\]` {'conv': 12}: .*cannot share 12 channels"):
        on_meta(ModelConfig(blocks=[{"conv": 12}], norm="group"), side=16)


def test_the_blocks_use_norm_and_activation_of_the_model() -> None:
    network = on_meta(ModelConfig(blocks=[{"conv": 8}], norm="none", activation="elu", feature_dropout=0.3), side=16)
    assert [type(layer) for layer in network.get_submodule("features.0").children()] == [nn.Conv2d, nn.ELU, nn.Dropout2d]
    assert torch.is_tensor(network.get_parameter("features.0.0.bias"))
